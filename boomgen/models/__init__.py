"""Denoisers: from a preset, a diffusers folder or a hub id to something that predicts the clean image.

`inspect` reads only the folder's own configs and hashes its files; `load` builds the network. This module knows one
family, pixel-space UNets; a new family is a module beside `pixel_unet.py`.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict

from boomgen import catalog
from boomgen.errors import BoomgenError, UsageError
from boomgen.sources import HUB_ID

if TYPE_CHECKING:  # plans are read without torch
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
CHAINS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
"""Schedulers whose configs describe a chain trained as a DDPM; which solver it names does not matter."""
ONLY = "this version runs pixel-space UNet2DModel folders (DDPM and patched DDPM), see boomgen models"
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Denoiser(Protocol):
    """A diffusion model as Boomerang needs it. States are fp32, shape (B, ...)."""

    def encode(self, images: "Tensor") -> "Tensor":
        """Images, uint8 (B, H, W, C), to the state in which noise is added."""

    def decode(self, state: "Tensor") -> "Tensor":
        """A state to images, uint8 (B, H, W, C)."""

    def prepare(self, labels: "Tensor") -> "Tensor":
        """Labels of the data set, int64 (B,), -1 for none, to the condition that `predict_x0` takes."""

    def predict_x0(self, x: "Tensor", k: int, condition: "Tensor") -> "Tensor":
        """The predicted clean state at level k, clipped where the model clips."""


class ModelInfo(BaseModel):
    """What was recognised of a model, as the plan freezes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    path: str
    sha256: str  # over names and sha256 of the files that are loaded
    family: str
    size: int  # side of the square native image, pixels
    channels: int  # 1 grey, 3 RGB
    patch: int  # side of the patches that the network sees as channels; 1: none
    prediction: str  # epsilon, sample or v_prediction
    clip: bool  # the predicted clean image is clipped to [-1, 1]
    classes: tuple[str, ...]  # names in class order, where the folder tells them
    class_count: int  # without the null class; 0: unconditional
    null_class: int | None
    trained_steps: int
    licence: str

    @property
    def root(self) -> Path:
        """The folder, with the package's own models found wherever the package is."""
        return Path(catalog.resolved(self.path))


def locate(name: str) -> tuple[Path, str]:
    """The folder of a model, and how the plan names it. Hub models are downloaded (or found in the cache)."""
    preset = catalog.models().get(name)
    if preset and preset.builtin:
        return catalog.asset(preset.builtin), f"builtin:{preset.builtin}"
    if Path(name).is_dir():
        return Path(name).resolve(), str(Path(name).resolve())
    if HUB_ID.fullmatch(name):
        folder = _download(name)
        return folder, str(folder)
    raise UsageError(
        f"no model {name!r}{catalog.suggest(name, catalog.models())}; expected a preset (boomgen models), a diffusers "
        "folder, or owner/name on the Hugging Face Hub"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.yaml", "**/*.json", f"*{WEIGHTS}"]))
    except GatedRepoError as err:
        raise BoomgenError(
            f"model {name} is gated; accept its terms on its page, then log in (hf auth login, or HF_TOKEN)"
        ) from err
    except RepositoryNotFoundError as err:
        raise UsageError(f"no model {name!r} on the Hugging Face Hub; see boomgen models") from err
    except OSError as err:
        raise BoomgenError(
            f"cannot fetch model {name}: the Hugging Face Hub is not reachable from here; use a diffusers folder as "
            "--model, or a machine with network whose cache (HF_HOME) this one shares"
        ) from err


def inspect(name: str) -> ModelInfo:
    """Recognise a model from its folder's own configs.

    Raises:
        UsageError: not a model folder, or of a family that boomgen does not run yet.
    """
    folder, path = locate(name)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    pipeline = folder / "model_index.json"
    if pipeline.exists() and not (unet_folder / "config.json").exists():
        raise UsageError(f"model {name} is a {_config(pipeline, name).get('_class_name')}; {ONLY}")
    unet = _config(unet_folder / "config.json", name)
    scheduler = _config(scheduler_folder / "scheduler_config.json", name)
    own = yaml.safe_load((folder / "boomgen.yaml").read_text()) if (folder / "boomgen.yaml").exists() else {}
    if unet.get("_class_name") != "UNet2DModel" or unet.get("time_embedding_type", "positional") != "positional":
        raise UsageError(f"model {name} is a {unet.get('_class_name', 'folder without _class_name')}; {ONLY}")
    patch = int(own.get("patch", 1))
    _check_chain(name, unet, scheduler)
    files = [unet_folder / "config.json", unet_folder / WEIGHTS, scheduler_folder / "scheduler_config.json"]
    if not files[1].exists():
        raise UsageError(f"model {name} has no {WEIGHTS}; expected safetensors weights, pickled ones are not loaded")
    embeds = unet.get("num_class_embeds") or 0
    null_class = own.get("null_class")
    return ModelInfo(
        name=name,
        path=path,
        sha256=_fingerprint(folder, files),
        family="pixel-unet",
        size=int(unet["sample_size"]) * patch,
        channels=int(unet["in_channels"]) // patch**2,
        patch=patch,
        prediction=scheduler.get("prediction_type", "epsilon"),
        clip=bool(scheduler.get("clip_sample", True)),
        classes=tuple(own.get("classes", ())),
        class_count=embeds - (null_class is not None),
        null_class=null_class,
        trained_steps=int(scheduler.get("num_train_timesteps", 1000)),
        licence=str(
            own.get("licence") or (catalog.models()[name].licence if name in catalog.models() else "not stated")
        ),
    )


def _check_chain(name: str, unet: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """What would run and give wrong images is refused."""
    if scheduler.get("_class_name") not in CHAINS:
        raise UsageError(f"model {name} has a {scheduler.get('_class_name')}; this version knows {', '.join(CHAINS)}")
    if scheduler.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise UsageError(f"model {name} predicts {scheduler['prediction_type']}; expected {', '.join(PREDICTIONS)}")
    if scheduler.get("thresholding") or scheduler.get("clip_sample_range", 1.0) != 1.0:
        raise UsageError(f"model {name} clips by thresholding or to another range than [-1, 1]; expected neither")
    if unet.get("out_channels") != unet.get("in_channels"):
        raise UsageError(
            f"model {name} has {unet.get('out_channels')} output and {unet.get('in_channels')} input channels; "
            "this version does not run learned variances"
        )


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise UsageError(f"model {name}: no readable {path.name}; expected a folder saved by diffusers") from err
    if not isinstance(found, dict):
        raise UsageError(f"model {name}: {path.name} is not a JSON object; expected a folder saved by diffusers")
    return found


def _fingerprint(folder: Path, files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(f"{file.relative_to(folder)} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check(info: ModelInfo) -> None:
    """Refuse a model whose files are no longer those that were planned."""
    found = inspect(info.name if info.path.startswith("builtin:") else info.path).sha256
    if found != info.sha256:
        raise BoomgenError(f"model {info.name} in {info.path} has changed since the plan was made; plan a new run")


def class_map(info: ModelInfo, classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The model's class of each of the data set's labels; None where the model is to run without classes.

    Names must match where both sides have them: a wrong condition is worse than none.
    """
    if not info.class_count or not classes:
        return None
    if info.classes:
        known = {name.casefold(): number for number, name in enumerate(info.classes)}
        found = [known.get(name.casefold()) for name in classes]
        return None if None in found else tuple(number for number in found if number is not None)
    return tuple(range(len(classes))) if len(classes) <= info.class_count else None
