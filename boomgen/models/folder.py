"""A model's folder as diffusers saves it: its configs, read as data, and the files that are loaded, hashed."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from boomgen import catalog, hub
from boomgen.errors import UsageError
from boomgen.untrusted import read_json, read_yaml

OWN = "boomgen.yaml"
INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
STEMS = ("diffusion_pytorch_model", "model")
BLOB = re.compile("[0-9a-f]{64}")


class Config(BaseModel):
    """What matters of a config file; the rest is left unread."""

    model_config = ConfigDict(frozen=True, extra="ignore")


C = TypeVar("C", bound=Config)


class Own(Config):
    """A boomgen.yaml: what diffusers' configs cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    patch: int = Field(default=1, ge=1, le=64)
    patch_order: Literal["c p1 p2", "p1 p2 c"] = "c p1 p2"
    variance: Literal["adm", "patched"] = "adm"
    null_class: int | None = Field(default=None, ge=0)
    classes: tuple[str, ...] = ()
    known: tuple[int, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Folder:
    """A model's folder, and the name under which the user knows it. Every fault is a UsageError with that name."""

    name: str
    root: Path
    path: str  # how the plan names the folder
    allow_pickle: bool = False

    def part(self, part: str) -> Path:
        """A component's folder; components of a folder without sub-folders lie in the folder itself."""
        return self.root / part if (self.root / part).is_dir() else self.root

    def read(self, file: Path) -> dict[str, Any]:
        """A config file's mapping."""
        try:
            text = file.read_text(encoding="utf-8")
            found = read_json(text) if file.suffix == ".json" else read_yaml(text)
            if not isinstance(found, dict):
                raise ValueError("not a mapping")
        except (OSError, ValueError) as err:
            why = getattr(err, "strerror", None) or " ".join(str(err).split())
            raise UsageError(f"model {self.name}: {file.name}: {why}; expected a folder saved by diffusers") from err
        return found

    def checked(self, kind: type[C], file: Path) -> C:
        """A config file as far as it matters here."""
        try:
            return kind.model_validate(self.read(file))
        except ValidationError as err:
            first = err.errors()[0]
            what = ".".join(map(str, first["loc"]))
            raise UsageError(f"model {self.name}: {file.name}: {what}: {first['msg']}; see boomgen models") from err

    @property
    def own(self) -> Own:
        """What the folder's boomgen.yaml says, or the preset of that name."""
        preset = catalog.models().get(self.name)
        found = self.checked(Own, self.root / OWN) if (self.root / OWN).exists() else Own()
        licence = found.licence or (preset.licence if preset else hub.licence(self.root)) or "not stated"
        known = found.known or (preset.known if preset else ())
        return found.model_copy(update={"licence": licence, "known": known})

    def refuse(self, what: str) -> UsageError:
        return UsageError(f"model {self.name} {what}")

    def weights(self, part: str) -> tuple[Path, ...]:
        """The files of a component's weights: safetensors, whole or in pieces, of half precision if there is no other.

        Pickled ones only with the user's word; torch then reads them as data only.
        """
        place = self.part(part)
        for stem in STEMS:
            for variant in ("", ".fp16"):
                whole, pieces = place / f"{stem}{variant}.safetensors", f"{stem}{variant}-*-of-*.safetensors"
                if found := [whole] if whole.exists() else sorted(place.glob(pieces)):
                    return tuple(found)
            if self.allow_pickle and (place / f"{stem}.bin").exists():
                return (place / f"{stem}.bin",)
        raise UsageError(
            f"model {self.name} has no {STEMS[0]}.safetensors in {part}; pickled weights are programs: save it again "
            "with safetensors, or trust its author with --allow-pickle"
        )

    def variant(self, part: str) -> str | None:
        """'fp16' where a component has no other weights; diffusers must be told."""
        return "fp16" if ".fp16" in self.weights(part)[0].name else None

    def fingerprint(self, files: Iterable[Path]) -> str:
        """One sha256 over the names and contents of the files."""
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.relative_to(self.root)} {sha256_of(file)}\n".encode())
        return total.hexdigest()


def sha256_of(file: Path) -> str:
    """Of a file's contents. The Hub's cache names a large file by its sha256, and checked that when it came."""
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and BLOB.fullmatch(blob.name):
        return blob.name
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
