"""Named data sets and models: what `--dataset NAME` and `--model NAME` mean, read from the shipped YAML files."""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

PACKAGE = Path(__file__).parent
MODELS = "models.yaml"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hub(_Frozen):
    """Where a data set lies on the Hugging Face Hub; a column that is None is the first that fits."""

    id: str
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None


class DataSet(_Frozen):
    """One named data set and the defaults of a run on it."""

    name: str
    title: str
    licence: str
    licence_url: str | None = None
    hub: Hub | None = None
    builtin: str | None = None  # folder below boomgen/assets
    classes: tuple[str, ...] = ()  # used where the source itself names none
    imagenet_classes: tuple[int, ...] = ()  # class of an ImageNet-1k model for each label; empty: not a subset of it
    label_is_identity: bool = False
    fit: Literal["crop", "pad"] = "crop"
    model: str
    t_boom: str
    size: str
    prompt: str | None = None
    note: str | None = None


class ModelPreset(_Frozen):
    """One named model; sizes in pixels, `classes` 0 where it takes no label."""

    id: str
    title: str
    family: str
    size: int
    channels: int
    classes: int
    licence: str
    builtin: str | None = None  # folder below boomgen/assets


def shipped(kind: Literal["jobs", "manifests"]) -> Path:
    """The folder of that kind: inside an installed wheel, or beside the package in a checkout."""
    installed = PACKAGE / "_shipped" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def asset(name: str) -> Path:
    """The folder of embedded data or an embedded model."""
    return PACKAGE / "assets" / name


def resolved(location: str) -> str:
    """A location as a plan writes it, on this machine: 'builtin:NAME' is where the package is."""
    return str(asset(location.removeprefix("builtin:"))) if location.startswith("builtin:") else location


@cache
def datasets() -> dict[str, DataSet]:
    """All named data sets by name, in the order of their names."""
    files = [path for path in shipped("manifests").glob("*.yaml") if path.name != MODELS]
    found = [DataSet.model_validate(_yaml(path)) for path in files]
    return {dataset.name: dataset for dataset in sorted(found, key=lambda dataset: dataset.name)}


def dataset(name: str) -> DataSet | None:
    """The data set of that name, None where there is none."""
    return datasets().get(name)


@cache
def models() -> dict[str, ModelPreset]:
    """All named models by id, in the order of the file."""
    found = [ModelPreset.model_validate(entry) for entry in _yaml(shipped("manifests") / MODELS)]
    return {model.id: model for model in found}


def suggest(name: str, names: Iterable[str]) -> str:
    """', did you mean X or Y?' for a near miss, else ''; to end an error message with."""
    near = get_close_matches(name, names, n=2)
    return f", did you mean {' or '.join(near)}?" if near else ""


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
