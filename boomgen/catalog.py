"""Named data sets and models: what `--dataset NAME` and `--model NAME` mean, read from YAML files.

The shipped ones are in `manifests/`; a user's own data set is a YAML file of the same form.
"""

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boomgen.errors import UsageError
from boomgen.places import is_url
from boomgen.untrusted import MAX_YAML, read_yaml

PACKAGE = Path(__file__).parent
MODELS = "models.yaml"
YAML = (".yaml", ".yml")
WordNet = Literal["imagenet-classes", "imagenet-200", "imagenet-r-200"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hub(_Frozen):
    """Where a data set lies on the Hugging Face Hub; a column that is None is the first that fits."""

    id: str
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None


class DataSet(_Frozen):
    """One named data set and the defaults of a run on it. A user's own needs no more than a name."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # t_boom: 0.4

    name: str = Field(pattern=r"^\w[\w.-]*$")
    title: str = ""
    licence: str = "not stated"
    licence_url: str | None = None
    hub: Hub | None = None
    builtin: str | None = Field(default=None, pattern="^[a-z-]+$")  # folder below boomgen/assets
    data_dir: str | None = None  # where it lies; in a user's YAML relative to the folder of that file
    inner: tuple[str, ...] = ()  # what of a folder is read: the first of these that it holds, else all of it
    layouts: tuple[str, ...] = ()  # how its authors lay it out on disk, for people
    wordnet: WordNet | None = None  # list in manifests/ that fills in folders, classes and imagenet_classes
    folders: tuple[str, ...] = ()  # class folders in label order; others are left out. Empty: all that are there
    classes: tuple[str, ...] = ()  # used where the source itself names none, or the `folders` are known
    imagenet_classes: tuple[int, ...] = ()  # class of an ImageNet-1k model for each label; empty: not a subset of it
    label_is_identity: bool = False
    fit: Literal["crop", "pad"] = "crop"
    model: str | None = None
    t_boom: str | None = None
    size: str = ""
    prompt: str | None = None
    note: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, found: Any) -> Any:
        wordnet = found.get("wordnet") if isinstance(found, dict) else None
        return found | _wordnet(wordnet) if wordnet in get_args(WordNet) else found

    @model_validator(mode="after")
    def _fits(self) -> "DataSet":
        if self.folders and self.classes and len(self.folders) != len(self.classes):
            raise ValueError(f"{len(self.folders)} folders and {len(self.classes)} classes; expected as many")
        return self


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
    known: tuple[int, ...] = ()  # the only trained indices that a distilled network knows
    prediction: str | None = None
    scheduler: dict[str, Any] = {}  # its config's facts, from which a test computes `noise` again
    noise: tuple[float | None, ...] = ()  # noise power 1 - abar at t_boom 0.1, ..., 0.9; None: below its first level

    @property
    def levels(self) -> int:
        """Of the trained chain, or as many as a distilled network knows; 0 where the preset does not say."""
        return len(self.known) or (int(self.scheduler.get("num_train_timesteps", 1000)) if self.scheduler else 0)

    @property
    def noise_line(self) -> str:
        return " ".join("  -" if power is None else f"{power:.2f}".removeprefix("0") for power in self.noise) or "-"


RESTRICTED = re.compile("non-commercial|gated|restriction|research|-NC-", re.IGNORECASE)


def restricted(licence: str) -> bool:
    """Whether a licence forbids something that its user should hear of before the run."""
    return RESTRICTED.search(licence) is not None


def shipped(kind: Literal["jobs", "manifests", "slurm"]) -> Path:
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
    found = [DataSet.model_validate(entry) for path in files for entry in _members(_yaml(path))]
    return {dataset.name: dataset for dataset in sorted(found, key=lambda dataset: dataset.name)}


def dataset(name: str) -> DataSet | None:
    """The data set of that name, or that a user's own YAML file describes; None where there is none.

    Raises:
        UsageError: the file is not readable, or not of the form of those in `manifests/`.
    """
    return datasets().get(name) or (_own(Path(name)) if name.endswith(YAML) and Path(name).is_file() else None)


def described(found: DataSet) -> dict[str, str]:
    """All that is known of a data set, for people."""
    hub = found.hub
    columns = [name for name in (hub.image_column, hub.label_column) if name] if hub else []
    lines = {
        "name": found.name,
        "what": found.title,
        "size": found.size,
        "classes": str(len(found.classes) or ""),
        "list": f"{shipped('manifests') / found.wordnet}.txt" if found.wordnet else "",
        "identity": "a label is a person; anonymize drops labels" if found.label_is_identity else "",
        "licence": " ".join(filter(None, (found.licence, found.licence_url))),
        "model": found.model or "",
        "t_boom": found.t_boom or "",
        "prompt": found.prompt or "",
        "fit": found.fit,
        "Hub": f"{hub.id}, columns {' and '.join(columns) or 'as found'}" if hub else "",
        "--data-dir": "; or ".join(found.layouts),
        "note": found.note or "",
    }
    return {name: text for name, text in lines.items() if text}


def _own(path: Path) -> DataSet:
    expected = "expected the keys of a data set (docs/formats.md)"
    try:
        found = _yaml(path)
        if not isinstance(found, dict) or "builtin" in found or "members" in found:
            raise ValueError("no mapping, or one with 'builtin' or 'members'")
        made = DataSet.model_validate(found)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"data set {path}: {where}{': ' * bool(where)}{first['msg']}; {expected}") from err
    except (OSError, ValueError, UsageError) as err:
        why = getattr(err, "strerror", None) or " ".join(str(err).split())
        raise UsageError(f"data set {path}: {why}; {expected}") from err
    if made.data_dir and not is_url(made.data_dir):
        return made.model_copy(update={"data_dir": str(path.resolve().parent / made.data_dir)})
    return made


def _members(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets of one file: itself, or its `members`, which say only what differs."""
    shared = {key: value for key, value in found.items() if key != "members"}
    made = [shared | entry for entry in found.get("members", [shared])]
    for entry in made:
        lists = {key: entry[key] for key in ("inner", "layouts") if key in entry}
        entry |= {key: [text.replace("{name}", entry["name"]) for text in texts] for key, texts in lists.items()}
    return made


@cache
def _wordnet(name: str) -> dict[str, tuple[Any, ...]]:
    """The WordNet ids of a shipped list, their names, and their places among the 1,000 of ImageNet-1k."""
    thousand = [line.split("\t") for line in _lines("imagenet-classes")]
    doubled = Counter(name for _, name in thousand)
    names = [f"{name} ({wnid})" if doubled[name] > 1 else name for wnid, name in thousand]
    places = range(1000) if name == "imagenet-classes" else [int(line.split("\t")[1]) for line in _lines(name)]
    return {
        "folders": tuple(thousand[place][0] for place in places),
        "classes": tuple(names[place] for place in places),
        "imagenet_classes": tuple(places),
    }


def _lines(name: str) -> list[str]:
    return (shipped("manifests") / f"{name}.txt").read_text(encoding="utf-8").splitlines()


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
    with path.open(encoding="utf-8") as file:
        return read_yaml(file.read(MAX_YAML + 1))
