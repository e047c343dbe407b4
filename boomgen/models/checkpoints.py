"""Checkpoints of original code, as torch.save wrote them, written anew as folders that boomgen runs.

They are read as data only. Which code wrote one follows from the name of a weight that all its networks have.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from boomgen.errors import UsageError
from boomgen.models.folder import OWN

State = Mapping[str, Tensor]
NEST = 2  # how deep in lists and dicts, beside optimisers and counters, a state dict may lie


class Imported(NamedTuple):
    """A network with its weights, the scheduler that it was trained for, and what its boomgen.yaml says."""

    network: Any
    scheduler: Any
    own: dict[str, Any]


def import_checkpoint(file: Path, out: Path, size: int | None = None) -> None:
    """Write the network and the scheduler that it was trained for, as diffusers saves them, to a new folder.

    Raises:
        UsageError: no checkpoint that is known here, an unknown size, or the folder exists.
        OSError: the file cannot be read, or the folder not be written.
    """
    from boomgen.models import adm, pesser

    converters = {pesser.MARK: pesser.convert, adm.MARK: adm.convert}
    if out.exists():
        raise UsageError(f"--out {out} exists; expected a new folder")
    state = _state(file, converters.keys())
    try:
        imported = next(convert for mark, convert in converters.items() if mark in state)(state, size)
    except (MemoryError, UsageError):
        raise
    except Exception as err:  # torch and diffusers have a dozen kinds for shapes that do not fit each other
        raise _refuse(file, f"a network of another shape: {' '.join(str(err).split())[:200]}") from err
    write(imported, out)


def write(imported: Imported, out: Path) -> None:
    """The folder, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        made = Path(staging) / out.name
        imported.network.save_pretrained(made / "unet")
        imported.scheduler.save_pretrained(made / "scheduler")
        if imported.own:
            (made / OWN).write_text(yaml.safe_dump(imported.own), encoding="utf-8")
        made.rename(out)


def plain(name: str, tensor: Tensor) -> Tensor:
    """A weight as it is to be saved: fp32, in memory of its own.

    Raises:
        ValueError: it claims to be larger than what the file holds.
    """
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} is {tuple(tensor.shape)}, more than was saved")
    return tensor.detach().float().clone(memory_format=torch.contiguous_format)


def _state(file: Path, marks: Iterable[str]) -> State:
    """The state dict in a file, read as data only; averaged weights (EMA) where there are some."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles of another protocol
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as err:
        raise _refuse(file, "no tensors as torch.save writes them") from err
    found = list(_states(saved, marks, NEST))
    if not found:
        raise _refuse(file, "no weights of such a network")
    return max(enumerate(found), key=lambda each: ("ema" in each[1][0], each[0]))[1][1]


def _states(saved: Any, marks: Iterable[str], nest: int, place: str = "") -> Iterator[tuple[str, State]]:
    """Every state dict of such a network, and where it lies; DDIM's lists have the averaged weights last."""
    if isinstance(saved, Mapping):
        named = {str(name).removeprefix("module."): value for name, value in saved.items()}
        if any(isinstance(named.get(mark), Tensor) for mark in marks):
            yield place, {name: value for name, value in named.items() if isinstance(value, Tensor)}
            return
        inner = list(named.items())
    else:
        inner = [(str(i), value) for i, value in enumerate(saved)] if isinstance(saved, list | tuple) else []
    for name, value in inner if nest else ():
        yield from _states(value, marks, nest - 1, f"{place}.{name}".lower())


def _refuse(file: Path, found: str) -> UsageError:
    return UsageError(f"{file} holds {found}; expected a checkpoint of pytorch_diffusion, FastDPM or guided-diffusion")
