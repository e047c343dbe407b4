"""Models: from a preset, a diffusers folder or a hub id to what is known of it before it is loaded.

`inspect` reads only a folder's own configs and hashes its files. Each family is a module here: its `recognise` says
what a folder holds, its `Network` is what is called. `chain.py` makes the levels, `denoiser.py` puts it together.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from boomgen import catalog, hub
from boomgen.errors import BoomgenError, UsageError
from boomgen.models.folder import INDEX, Folder, sha256_of
from boomgen.sources import HUB_ID

Prediction = Literal["epsilon", "sample", "v_prediction", "score", "velocity", "consistency"]
IMAGENET = 1000  # classes, in the order of their sorted WordNet ids
VARIANCE_PRESERVING = ("epsilon", "sample", "v_prediction")


class ModelInfo(BaseModel):
    """What was recognised of a model, as the plan freezes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    path: str
    sha256: str  # over names and sha256 of the files that are loaded
    family: str
    kind: str  # class of the network in diffusers
    size: int  # side of the square native image, pixels
    channels: int  # 1 grey, 3 RGB
    state: tuple[int, int, int]  # (C, H, W) in which noise is added: of pixels, or of latents
    prediction: Prediction
    trained_steps: int
    licence: str
    pickled: bool = False  # weights are a pickle, which torch reads as data only
    variant: str | None = None  # of the weights' files
    pipeline: str = ""  # class of the pipeline, which encodes prompts
    patch: int = 1  # side of the patches that the network sees as channels; 1: none
    patch_order: Literal["c p1 p2", "p1 p2 c"] = "c p1 p2"
    variance: Literal["none", "adm", "patched"] = "none"  # how the network tells the reverse step's variance
    clip: bool = False  # the predicted clean image is clipped to [-1, 1]
    classes: tuple[str, ...] = ()  # names in class order, where the folder tells them
    class_count: int = 0  # without the null class; 0: unconditional
    null_class: int | None = None
    text: bool = False  # takes prompts
    known: tuple[int, ...] = ()  # the only trained indices that a distilled network knows; empty: all
    guidance: float = 1.0  # as its diffusers pipeline has it; 1: none
    sampler: str = "ancestral"
    snr: float | None = None  # of the Langevin corrector, for score models
    sigma_min: float | None = None  # at which a consistency model returns its input
    lora: str | None = None
    why: tuple[str, ...] = ()  # how it was recognised, for people

    @property
    def root(self) -> Path:
        """The folder, with the package's own models found wherever the package is."""
        return Path(catalog.resolved(self.path))

    @property
    def latent(self) -> bool:
        return self.family != "pixel-unet"

    @property
    def tells_guidance(self) -> bool:
        """Guidance is told to the network, or not known to it, instead of computed from two calls."""
        return self.family == "flux" or (self.sampler == "renoise" and self.text)


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


def inspect(name: str, allow_pickle: bool = False, lora: str | None = None) -> ModelInfo:
    """Recognise a model from its folder's own configs.

    Raises:
        UsageError: not a model folder, one whose parts do not fit, or of a family that boomgen does not run.
    """
    from boomgen.models import dit, flow, latent_unet, pixel_unet

    root, path = locate(name, allow_pickle)
    folder = Folder(name, root, path, allow_pickle)
    index = folder.read(root / INDEX) if (root / INDEX).exists() else {}
    part = "transformer" if (root / "transformer").is_dir() else "unet"
    pipeline = str(index.get("_class_name") or "")
    file = folder.part(part) / "config.json"
    if pipeline and not file.exists():
        raise folder.refuse(f"is a {pipeline} without unet/ or transformer/; expected a whole pipeline's folder")
    kind = str(folder.read(file).get("_class_name", "folder without _class_name"))
    families = {kind: family for family in (pixel_unet, latent_unet, dit, flow) for kind in family.KINDS}
    if kind not in families:
        raise folder.refuse(f"is a {kind}; expected one of {', '.join(families)} (see boomgen models)")
    try:
        info: ModelInfo = families[kind].recognise(folder, index)
    except ValidationError as err:
        first = err.errors()[0]
        raise folder.refuse(f"has {first['loc'][0]} {first['input']!r}; {first['msg'].lower()}") from err
    return with_lora(info, lora) if lora else info


def with_lora(info: ModelInfo, lora: str) -> ModelInfo:
    """The model with a LoRA, a .safetensors file, added to its weights."""
    file = Path(lora).resolve()
    if not info.text:
        raise UsageError(f"--lora {lora} with model {info.name}; expected a model that takes prompts")
    if file.suffix != ".safetensors" or not file.is_file():
        raise UsageError(f"--lora {lora}; expected a .safetensors file on this machine")
    total = hashlib.sha256(f"{info.sha256} {sha256_of(file)}".encode()).hexdigest()
    return info.model_copy(update={"sha256": total, "lora": str(file)})


def check(info: ModelInfo) -> None:
    """Refuse a model whose files are no longer those that were planned."""
    place = info.name if info.path.startswith("builtin:") else info.path
    if inspect(place, info.pickled, info.lora).sha256 != info.sha256:
        raise BoomgenError(f"model {info.name} in {info.path} has changed since the plan was made; plan a new run")


def class_map(info: ModelInfo, classes: tuple[str, ...], imagenet: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """The model's class of each of the data set's labels; None where the model is to run without classes.

    Names must match where both sides have them: a wrong condition is worse than none. `imagenet`: the place of each
    label among the 1,000 classes of ImageNet, for models that were trained on these.
    """
    if not info.class_count or not classes:
        return None
    if info.class_count == IMAGENET and imagenet:
        return imagenet
    if info.classes:
        known = {name.casefold(): number for number, name in enumerate(info.classes)}
        found = [known.get(name.casefold()) for name in classes]
        if None not in found:
            return tuple(number for number in found if number is not None)
    if info.classes and len(classes) != IMAGENET:
        return None
    return tuple(range(len(classes))) if len(classes) <= info.class_count else None
