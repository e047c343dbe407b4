"""What the user asked for. Flags, YAML keys and help text are derived from these two models.

`Job` decides the bytes that are written and is frozen into the plan. `Launch` says where and how the work is done;
nothing in it changes a byte on devices of one class.
"""

import re
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from boomgen.errors import UsageError
from boomgen.levels import parse_t_boom
from boomgen.places import is_url

Mode = Literal["anonymize", "augment", "enhance"]
ENHANCE = ("scale", "interpolation", "degrade", "cascade", "keep_intermediates")
"""The options that enhance alone has."""
SAMPLER_NAMES = ("ancestral", "learned", "dpm++", "predictor-corrector", "renoise", "one-call")


def _option(text: str, default: Any = None, **limits: Any) -> Any:
    return Field(default=default, description=text, **limits)


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Job(_Options):
    """One pass of a data set through Boomerang. None means: as the data set's or the model's preset says."""

    mode: Mode
    dataset: str = Field(description="a named data set, a folder, a .tar, or owner/name on the Hugging Face Hub")
    data_dir: str | None = _option("folder that holds the named data set")
    split: str | None = _option("split to read (default: train, or the only one)")
    image_column: str | None = _option("column of the images, in a table (default: the first of type image)")
    label_column: str | None = _option("column of the labels, in a table (default: one of class labels)")
    caption_column: str | None = _option("column of the captions, in a table (default: caption, text or prompt)")
    limit: int | None = _option("only the first N images of the source", ge=1)
    model: str | None = _option("model preset, diffusers folder, or owner/name on the Hugging Face Hub")
    t_boom: str | None = _option("how far to noise: a fraction of the chain (0.4) or a level (40/100)")
    steps: int | None = _option("length of the whole chain; t_boom of it is run (default 100)", ge=1)
    spacing: Literal["even", "fastdpm-linear", "fastdpm-quadratic"] = _option(
        "which trained levels make up the chain", "even"
    )
    eta: float = _option("noise of the reverse step: 1 is the paper's, 0 is DDIM", 1.0, ge=0, le=1)
    sampler: str | None = _option(
        f"way back from t_boom: {', '.join(SAMPLER_NAMES)} (default: the model's, mostly ancestral)"
    )
    prompt: str | None = _option(
        "what a text model is told; {class} is the class's name, {caption} the image's own (column, .txt)"
    )
    guidance: float | None = _option("classifier-free guidance, 1 is none (default: the model's)", ge=0, le=100)
    lora: str | None = _option("LoRA to add to a text model, a .safetensors file")
    variants: int = _option("Boomerang versions of every image (augment, enhance)", 1, ge=1)
    scale: float | None = _option("factor between a low-resolution image and its output (enhance)", ge=1, le=64)
    interpolation: Literal["nearest", "linear", "cubic", "lanczos"] | None = _option(
        "how an image is brought to the model's size before it is enhanced (default: linear)"
    )
    degrade: Literal["area", "linear", "cubic", "lanczos"] | None = _option(
        "make the low-resolution images from the source's by this filter (enhance; a bare --degrade is cubic)",
        json_schema_extra={"bare": "cubic"},
    )
    cascade: int = _option("Boomerang passes, each from the last one's result (enhance)", 1, ge=1)
    keep_intermediates: bool = _option("write the image of every pass, not of the last alone (enhance)", False)
    noise: Literal["independent", "shared"] = _option("shared gives every image the same noise", "independent")
    seed: int = _option("seed of noise and order (augment, enhance; anonymize uses a secret)", 0, ge=0)
    linkage: Literal["private", "public", "none"] | None = _option(
        "who may link outputs to sources (anonymize: private; else public; none destroys the links at the end)"
    )
    labels: Literal["keep", "drop"] | None = _option(
        "labels in the data set (default: keep, but drop where a label is an identity)"
    )
    fit: Literal["crop", "pad"] | None = _option("how an image is brought to the model's size (preset, else crop)")
    format: Literal["png", "webp", "jpg"] = _option("file format of the images (png and webp are lossless)", "png")
    dtype: Literal["float32", "bfloat16"] | None = _option("precision of the network (default: by device)")
    compile: Literal["yes", "no"] | None = _option("compile the network ahead of time (default: by the job's cost)")
    batch_size: int | None = _option("images per network call", ge=1)
    shard_size: int | None = _option("images per shard", ge=1)

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_text(cls, value: Any) -> Any:
        return ("yes" if value else "no") if isinstance(value, bool) else value  # what YAML makes of yes and no

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str | None) -> str | None:
        if value in ("pndm", "plms"):
            raise ValueError(
                "PNDM assumes that it begins at the first level; begun at t_boom, its state lags a step behind; use "
                "ancestral or dpm++"
            )
        if value not in (None, *SAMPLER_NAMES):
            raise ValueError(f"expected one of {', '.join(SAMPLER_NAMES)}")
        return value

    @field_validator("prompt")
    @classmethod
    def _known_parts(cls, value: str | None) -> str | None:
        if other := set(re.findall(r"\{\w*\}", value or "")) - {"{class}", "{caption}"}:
            raise ValueError(f"{min(other)} stands for nothing; expected {{class}} or {{caption}}")
        return value

    @field_validator("t_boom", mode="before")
    @classmethod
    def _t_boom_text(cls, value: Any) -> str | None:
        if value is None:
            return None
        parse_t_boom(str(value))
        return str(value)


class Launch(_Options):
    """Where and how a job is done."""

    out: str | None = _option("run folder, or s3://BUCKET/PREFIX (default: runs/DATASET-MODE-T_BOOM)")
    private_dir: str | None = _option("run folder of an --out that is a URL: plan, secret, links (default: runs/...)")
    device: Literal["cuda", "cpu"] | None = _option("kind of device (default: cuda where there is one)")
    gpus: int | None = _option("number of GPUs, one worker each (default: all)", ge=1)
    workers: int | None = _option("number of CPU workers (default: one per core)", ge=1)
    engine: Literal["local", "ray"] = _option("who starts the workers: this machine, or Ray", "local")
    ray_address: str | None = _option("a running Ray cluster: auto, or host:port (default: one on this machine)")
    patience: float | None = _option(
        "seconds without a batch after which a worker is taken for hung (default: 20 times the longest, at least 600)",
        gt=0,
    )
    secret_file: str | None = _option(
        "file with the run's secret, 64 hexadecimal digits (anonymize; default: a new one)"
    )
    allow_pickle: bool = _option("load a model whose only weights are pickled", False)
    allow_mixed: bool = _option("accept devices of another class than the plan's; bytes may then differ", False)

    @field_validator("private_dir")
    @classmethod
    def _beside_a_store(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not is_url(info.data.get("out") or ""):
            raise ValueError("is for an --out that is a URL; another --out is private itself")
        if value and is_url(value):
            raise ValueError("expected a folder on a disk that all workers see")
        return value

    @field_validator("ray_address")
    @classmethod
    def _of_ray(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("engine") != "ray":
            raise ValueError("is for Ray alone; add --engine ray")
        if value and not re.fullmatch(r"auto|[^\s/:]+:\d+|\[[\da-fA-F:]+\]:\d+", value):
            raise ValueError("expected auto or host:port")
        return value


T = TypeVar("T", bound=BaseModel)


def build(model: type[T], values: dict[str, Any]) -> T:
    """A checked model of the given values.

    Raises:
        UsageError: naming the first option that does not fit, what was got and what was expected.
    """
    try:
        return model.model_validate(values)
    except ValidationError as err:
        first = min(err.errors(), key=lambda error: error["type"] == "missing")
        name = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
        if first["type"] == "missing":
            raise UsageError(f"{name} is missing; say which one to use, as {name} NAME") from err
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown option {name}; see boomgen --help") from err
        ours = first["type"] == "value_error"
        why = str(first["ctx"]["error"]) if ours else first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{name} {first['input']!r}: {why}") from err


def split_options(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mixed options, as a command line or a YAML file holds them, parted into those of Job and those of Launch."""
    launch = {name: value for name, value in values.items() if name in Launch.model_fields}
    return {name: value for name, value in values.items() if name not in launch}, launch
