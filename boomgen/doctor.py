"""Is this machine ready? Each finding says what it means, and what to do where it is bad."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from boomgen import env, models
from boomgen.errors import BoomgenError
from boomgen.shard import write_durable

ENOUGH = 1e9  # bytes; a million images of 32x32 in png


class Finding(NamedTuple):
    """One check: what was seen, and what that means for a run."""

    good: bool
    seen: str
    meaning: str


def findings(out: Path) -> Iterator[Finding]:
    """All checks, for runs that are to be written to `out`."""
    yield from _devices()
    here = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    yield from _disk(out, here)
    free = shutil.disk_usage(here).free
    room = f"{free / 1e9:.0f} GB free for {out}"
    if free > ENOUGH:
        yield Finding(True, room, "boomgen plan tells how many images there will be; a full disk loses nothing")
    else:
        yield Finding(False, room, "expected 1 GB or more: free some, or choose another --out")
    try:
        sha256 = models.inspect("fashion-patched-ddpm").sha256
        yield Finding(True, f"embedded model {sha256[:12]} is readable", "the examples run without any download")
    except BoomgenError as err:
        yield Finding(False, str(err), "the installation is not whole: install boomgen again")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding(True, "HF_HUB_OFFLINE=1", "only hub models and data sets in the cache (HF_HOME) can be used")
    else:
        yield Finding(
            True, "the Hugging Face Hub is not switched off", "its models and data sets are fetched as needed"
        )


def _devices() -> Iterator[Finding]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        device, seen = "cuda", f"torch {torch.__version__}, {gpus} GPUs ({torch.cuda.get_device_name()})"
        yield Finding(True, seen, "each gets a worker of its own; --gpus N uses fewer")
    else:
        device, seen = "cpu", f"torch {torch.__version__}, no GPU"
        yield Finding(
            True, seen, "the work runs on the CPU, which suits small models; if there is a GPU, see nvidia-smi"
        )
    yield Finding(
        True,
        f"{env.cores()} CPU cores, {env.default_dtype(device)} on {device}",
        "without a GPU each core gets a worker; the precision is the fastest that this device multiplies well",
    )
    compiler = shutil.which("g++")
    yield Finding(
        True,
        f"g++ is {compiler}" if compiler else "no g++",
        "long CPU jobs are compiled ahead of time"
        if compiler
        else "long CPU jobs run uncompiled: install g++ for speed",
    )


def _disk(out: Path, here: Path) -> Iterator[Finding]:
    """Write, sync, link and rename, as publishing a shard and closing a run do."""
    probe = here / f".boomgen-doctor-{uuid.uuid4().hex[:8]}"
    try:
        probe.mkdir()
        write_durable(probe / "a", b"x")
        probe = probe.rename(probe.with_suffix(".moved"))
        yield Finding(True, f"{out} can be written, synced and renamed in", "a shard appears whole or not at all")
        os.link(probe / "a", probe / "b")
        yield Finding(True, "it has hard links", "the finished data set takes no second copy of the shards")
    except OSError as err:
        if (probe / "a").exists():
            yield Finding(True, f"it has no hard links ({err.strerror})", "the finished data set is a second copy")
        else:
            yield Finding(False, f"{out} cannot hold a run: {err.strerror}", "choose another --out")
    finally:
        shutil.rmtree(probe, ignore_errors=True)
