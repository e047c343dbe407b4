"""Denoisers: from a preset, a diffusers folder or a hub id to something that predicts the clean image.

`inspect` reads only the folder's own configs and hashes its files; `load` builds the network. This module knows one
family, pixel-space UNets; a new family is a module beside `pixel_unet.py`.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from boomgen import catalog, hub
from boomgen.errors import BoomgenError, UsageError
from boomgen.sources import HUB_ID
from boomgen.untrusted import read_json, read_yaml

if TYPE_CHECKING:  # plans are read without torch
    from torch import Tensor

WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
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


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Own(_Config):
    """A boomgen.yaml: what diffusers' configs cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    patch: int = Field(default=1, ge=1, le=64)
    null_class: int | None = Field(default=None, ge=0)
    classes: tuple[str, ...] = ()
    licence: str | None = None


class _UNet(_Config):
    """What matters of a unet/config.json."""

    sample_size: int = Field(ge=1, le=2**14)
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    num_class_embeds: int | None = Field(default=None, ge=1)
    time_embedding_type: str = "positional"


class _Scheduler(_Config):
    """What matters of a scheduler_config.json."""

    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    num_train_timesteps: int = Field(default=1000, ge=1, le=10**6)


C = TypeVar("C", bound=_Config)


class ModelInfo(BaseModel):
    """What was recognised of a model, as the plan freezes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    path: str
    sha256: str  # over names and sha256 of the files that are loaded
    weights: str  # name of the weights' file
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


def locate(name: str, allow_pickle: bool) -> tuple[Path, str]:
    """The folder of a model, and how the plan names it. Hub models are downloaded (or found in the cache)."""
    preset = catalog.models().get(name)
    if preset and preset.builtin:
        return catalog.asset(preset.builtin), f"builtin:{preset.builtin}"
    if Path(name).is_dir():
        return Path(name).resolve(), str(Path(name).resolve())
    if HUB_ID.fullmatch(name):
        folder = hub.model(name, allow_pickle)
        return folder, str(folder)
    raise UsageError(
        f"no model {name!r}{catalog.suggest(name, catalog.models())}; expected a preset (boomgen models), a diffusers "
        "folder, or owner/name on the Hugging Face Hub"
    )


def inspect(name: str, allow_pickle: bool = False) -> ModelInfo:
    """Recognise a model from its folder's own configs.

    Raises:
        UsageError: not a model folder, one whose parts do not fit, or of a family that boomgen does not run yet.
    """
    folder, path = locate(name, allow_pickle)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    pipeline, unet_file = folder / "model_index.json", unet_folder / "config.json"
    if pipeline.exists() and not unet_file.exists():
        raise UsageError(f"model {name} is a {_read(pipeline, name).get('_class_name')}; {ONLY}")
    kind = _read(unet_file, name).get("_class_name", "folder without _class_name")
    if kind != "UNet2DModel":
        raise UsageError(f"model {name} is a {kind}; {ONLY}")
    unet = _checked(_UNet, unet_file, name)
    scheduler_file = scheduler_folder / "scheduler_config.json"
    _check_chain(name, unet, str(_read(scheduler_file, name).get("_class_name")))
    scheduler = _checked(_Scheduler, scheduler_file, name)
    _check_prediction(name, scheduler)
    own_file = folder / "boomgen.yaml"
    own = _checked(_Own, own_file, name) if own_file.exists() else _Own()
    class_count = (unet.num_class_embeds or 0) - (own.null_class is not None)
    _check_fit(name, unet, own, class_count)
    weights = _weights(unet_folder, name, allow_pickle)
    preset = catalog.models().get(name)
    return ModelInfo(
        name=name,
        path=path,
        sha256=_fingerprint(folder, [unet_file, unet_folder / weights, scheduler_file]),
        weights=weights,
        family="pixel-unet",
        size=unet.sample_size * own.patch,
        channels=unet.in_channels // own.patch**2,
        patch=own.patch,
        prediction=scheduler.prediction_type,
        clip=scheduler.clip_sample,
        classes=own.classes,
        class_count=class_count,
        null_class=own.null_class,
        trained_steps=scheduler.num_train_timesteps,
        licence=own.licence or (preset.licence if preset else "not stated"),
    )


def _weights(folder: Path, name: str, allow_pickle: bool) -> str:
    """The weights' file: safetensors, or with the user's word a pickled one, which torch reads as data only."""
    if (folder / WEIGHTS).exists():
        return WEIGHTS
    if not (allow_pickle and (folder / PICKLED).exists()):
        raise UsageError(
            f"model {name} has no {WEIGHTS}; pickled weights are programs: save it again with safetensors, or trust "
            "its author with --allow-pickle"
        )
    return PICKLED


def _check_chain(name: str, unet: _UNet, scheduler: str) -> None:
    """What would run and give wrong images is refused: here, and in the two that follow."""
    if unet.time_embedding_type != "positional":
        raise UsageError(f"model {name} has a {unet.time_embedding_type} time embedding; {ONLY}")
    if scheduler not in CHAINS:
        raise UsageError(f"model {name} has a {scheduler}; this version knows {', '.join(CHAINS)}")
    if unet.out_channels != unet.in_channels:
        raise UsageError(
            f"model {name} has {unet.out_channels} output and {unet.in_channels} input channels; "
            "this version does not run learned variances"
        )


def _check_prediction(name: str, scheduler: _Scheduler) -> None:
    if scheduler.prediction_type not in PREDICTIONS:
        raise UsageError(f"model {name} predicts {scheduler.prediction_type}; expected {', '.join(PREDICTIONS)}")
    if scheduler.thresholding or scheduler.clip_sample_range != 1.0:
        raise UsageError(f"model {name} clips by thresholding or to another range than [-1, 1]; expected neither")


def _check_fit(name: str, unet: _UNet, own: _Own, class_count: int) -> None:
    channels, rest = divmod(unet.in_channels, own.patch**2)
    if rest or channels not in (1, 3):
        raise UsageError(
            f"model {name} has {unet.in_channels} channels in patches of {own.patch}; expected 1 (grey) or 3 (RGB) "
            "for each pixel of a patch"
        )
    if own.null_class is not None and own.null_class != class_count:
        raise UsageError(
            f"model {name}: boomgen.yaml says that class {own.null_class} is none, of {unet.num_class_embeds or 0} "
            "classes; expected the last one"
        )
    if own.classes and len(own.classes) != class_count:
        raise UsageError(f"model {name}: boomgen.yaml names {len(own.classes)} classes; expected {class_count}")


def _read(path: Path, name: str) -> dict[str, Any]:
    """A config file's mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        found = read_json(text) if path.suffix == ".json" else read_yaml(text)
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or " ".join(str(err).split())
        raise UsageError(f"model {name}: {path.name}: {why}; expected a folder saved by diffusers") from err
    return found


def _checked(kind: type[C], path: Path, name: str) -> C:
    """A config file as far as it matters here."""
    try:
        return kind.model_validate(_read(path, name))
    except ValidationError as err:
        first = err.errors()[0]
        what = ".".join(map(str, first["loc"]))
        raise UsageError(f"model {name}: {path.name}: {what}: {first['msg']}; {ONLY}") from err


def _fingerprint(folder: Path, files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(f"{file.relative_to(folder)} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check(info: ModelInfo) -> None:
    """Refuse a model whose files are no longer those that were planned."""
    place = info.name if info.path.startswith("builtin:") else info.path
    found = inspect(place, allow_pickle=info.weights == PICKLED).sha256
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
