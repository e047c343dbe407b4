"""RunDir: the folder on disk, which is all the state that a run has."""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from boomgen import keys, manifest
from boomgen.errors import BoomgenError, UsageError
from boomgen.index import Index
from boomgen.places import Place, exists, is_url
from boomgen.plan import Plan, read_plan
from boomgen.shard import DONE, sha256_file, unseal
from boomgen.store import CARD, CLOSING, Store, open_store

KINDS = ("read", "infer", "write", "total")


class _File(BaseModel):
    sha256: str
    bytes: int = Field(ge=0)


class _Done(BaseModel):
    """What a done record holds besides its own hash."""

    model_config = ConfigDict(extra="forbid", strict=True)

    boomgen: str
    shard: int
    plan_sha256: str
    rows: int = Field(ge=1)
    ok: int = Field(ge=0)
    failed: dict[str, int]
    rejected: dict[str, int]
    seconds: dict[Literal["read", "infer", "write", "total"], float] = Field(min_length=4)
    environment: dict[str, str]
    files: dict[Literal["data.tar", "manifest.parquet"], _File] = Field(min_length=2)
    sha256: str


class Status(NamedTuple):
    """What a run folder holds. Rows are counted over whole shards."""

    planned: int
    whole: int
    missing: list[int]
    ok: int
    failed: dict[str, int]  # by reason
    finalised: bool
    seconds: dict[str, float]  # of worker time by kind (read, infer, write, total), all whole shards together
    usual: float | None  # seconds that a whole shard took, the median; None: there is none


class RunDir:
    """Paths of a run, and what is on them. Reads only; imports no torch."""

    def __init__(self, path: Path | str) -> None:
        if is_url(str(path)):
            raise UsageError(
                f"{path} is where outputs go; give the run folder, which --private-dir named (default: runs/...)"
            )
        self.path = Path(path)
        if not (self.path / "plan.json").exists():
            raise UsageError(f"{self.path} is no run folder; expected one that boomgen planned, with a plan.json")

    @cached_property
    def plan(self) -> Plan:
        return read_plan(self.path / "plan.json")

    @cached_property
    def plan_sha256(self) -> str:
        """What a done record says that it belongs to."""
        return sha256_file(self.path / "plan.json")

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def staging(self) -> Path:
        return self.path / "staging"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest"

    @cached_property
    def store(self) -> Store:
        """Where whole shards and the data set are."""
        return open_store(self.plan.store, self.path)

    @property
    def dataset(self) -> Place:
        return self.store.dataset

    @property
    def closing(self) -> Path:
        """What `finalise` says of the tars and texts that it put into the data set."""
        return self.path / CLOSING

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def workers(self) -> Path:
        """What each worker says of itself, as long as it lives."""
        return self.path / "workers"

    @property
    def package(self) -> Path:
        return self.path / "network.pt2"

    @property
    def conditions(self) -> Path:
        return self.path / "conditions.safetensors"

    def shard(self, number: int) -> Path:
        return self.shards / f"{number:05d}"

    @property
    def secret(self) -> bytes:
        """The run's secret, checked against the plan's commitment."""
        path = self.path / "secret"
        if not path.exists():
            raise BoomgenError(f"{path} is gone (destroyed with --linkage none, or moved); nothing can be made again")
        secret = keys.read_secret(path)
        if keys.commitment(secret) != self.plan.secret_commitment:
            raise BoomgenError(f"{path} is not the secret of this plan; restore the one it was planned with")
        return secret

    @cached_property
    def index(self) -> Index:
        """The row index, after checking that it is the planned one."""
        path = self.path / "index.parquet"
        if not path.exists():
            raise BoomgenError(f"{path} is gone (destroyed with --linkage none, or moved); nothing can be made again")
        if sha256_file(path) != self.plan.source.index_sha256:
            raise BoomgenError(f"{path} is not the planned index (sha256 differs); restore it, or plan a new run")
        return Index(path)

    def published(self) -> set[int]:
        """Numbers of the shards that are whole."""
        return self.store.whole() & set(range(self.plan.shards))

    def missing(self) -> list[int]:
        return sorted(set(range(self.plan.shards)) - self.published())

    def done(self, number: int) -> dict[str, Any]:
        """The done record of a published shard.

        Raises:
            BoomgenError: missing, changed since it was written, or of another shard or plan.
        """
        path = self.store.where(number) / DONE
        again = f"remove {path.parent} and go on with: boomgen resume {self.path}"
        try:
            record = unseal(self.store.record(number))
            _Done.model_validate(record)
        except (OSError, ValueError) as err:
            why = err.errors()[0]["msg"] if isinstance(err, ValidationError) else err
            raise BoomgenError(f"{path} is damaged ({why}); {again}") from err
        if (record.get("shard"), record.get("plan_sha256")) != (number, self.plan_sha256):
            raise BoomgenError(f"{path} is of shard {record.get('shard')}, or of another plan; {again}")
        return record

    def failures(self) -> Iterator[str]:
        """One line for each row that failed, over whole shards: which one, and why."""
        for number in sorted(self.published()):
            part = self.store.part(number)
            rows = manifest.read_part(part).to_pylist() if self.done(number)["failed"] else []
            for row in (row for row in rows if row["status"] == manifest.FAILED):
                source = row.get("source_key", "its source is no longer known")
                yield f"row {row['row']} ({source}): {row['reason']}: {row.get('detail', '')}"

    @cached_property
    def _counted(self) -> dict[int, tuple[int, dict[str, int], dict[str, float]]]:
        """Of shards seen whole: rows ok, failed by reason, seconds. Whoever looks again need not read them again."""
        return {}

    def _count(self, number: int) -> tuple[int, dict[str, int], dict[str, float]]:
        if number not in self._counted:
            record = self.done(number)
            self._counted[number] = record["ok"], record["failed"], record["seconds"]
        return self._counted[number]

    def status(self) -> Status:
        """Counted anew, but a done record is read once in the life of this object."""
        whole = self.published()
        counts = [self._count(number) for number in sorted(whole)]
        failed = Counter[str]()
        for _, reasons, _ in counts:
            failed.update(reasons)
        return Status(
            planned=self.plan.shards,
            whole=len(whole),
            missing=sorted(set(range(self.plan.shards)) - whole),
            ok=sum(ok for ok, *_ in counts),
            failed=dict(failed),
            finalised=exists(self.dataset / CARD),
            seconds={name: round(sum(spent[name] for *_, spent in counts), 3) for name in KINDS},
            usual=median(spent["total"] for *_, spent in counts) if counts else None,
        )


def numbers(text: str, count: int) -> list[int]:
    """What `ranges` wrote: 0-3,7 of `count` shards.

    Raises:
        UsageError: not of this form, or there is no such shard.
    """
    found: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < count):
            raise UsageError(f"--shards {text}; expected shards of 0 to {count - 1}, as 0-3,7")
        found += range(int(first), int(last) + 1)
    return sorted(set(found))


def ranges(numbers: list[int]) -> str:
    """Ascending shard numbers as people and schedulers write them: 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)
