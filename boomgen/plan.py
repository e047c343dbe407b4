"""The plan: what will be done, frozen. A shard is a pure function of (plan, shard number, environment class)."""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boomgen import catalog, keys, places
from boomgen.errors import BoomgenError, UsageError
from boomgen.index import Index, permuted
from boomgen.job import Job
from boomgen.levels import Levels, parse_t_boom
from boomgen.models import ModelInfo
from boomgen.shard import sealed, unseal
from boomgen.sources import Planned, Reader, open_source
from boomgen.sources.base import NO_LABEL, NO_SPLIT, OTHER_CLASS, Row

SCHEMA_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SourcePlan(_Frozen):
    """Where the images come from. `index_sha256` pins every row's place and size."""

    location: str  # absolute folder or file, URL, 'builtin:NAME', or hub id
    name: str  # how the user named it
    split: str
    revision: str | None
    image_column: str | None
    label_column: str | None
    folders: tuple[str, ...] = ()  # the class folders that it has, in label order; empty: all that are there
    numbers: tuple[int, ...] = ()  # the labels of a table that it has
    rows: int = Field(ge=1)
    passed_over: tuple[tuple[str, int], ...]  # what was met and left out while the rows were listed: kinds and counts
    classes: tuple[str, ...]
    labels: int = Field(ge=0)  # how many labels occur in its rows; 0: it has none
    captions: int | None = None  # how many of its rows have a caption; None: not asked for
    licence: str
    index_sha256: str

    def open(self) -> Reader:
        """The source as it was indexed; its rows' places are read from the index."""
        if places.is_url(self.location):
            return Planned(self.location, self.split)
        return open_source(
            catalog.resolved(self.location),
            self.split,
            image_column=self.image_column,
            label_column=self.label_column,
            revision=self.revision,
            folders=self.folders,
            numbers=self.numbers,
        )


class ChainPlan(_Frozen):
    """The levels, spelled out: a worker computes no schedule."""

    level: int = Field(ge=0)
    a: tuple[float, ...]
    s: tuple[float, ...]
    t: tuple[float, ...]
    of_step: tuple[int, ...]
    sampler: str
    snr: float | None  # of the Langevin corrector; None: the model states none

    @model_validator(mode="after")
    def _whole(self) -> "ChainPlan":
        lengths = {len(self.a), len(self.s), len(self.t)}
        if len(lengths) != 1 or not self.level < len(self.a) or len(self.a) < 2:
            raise ValueError("a chain whose levels are not all there")
        _ = self.levels  # checks itself
        return self

    @property
    def levels(self) -> Levels:
        return Levels(np.array(self.a), np.array(self.s), np.array(self.t), self.of_step)


class NetworkPlan(_Frozen):
    """How the network is called: always this shape, precision and build."""

    batch_size: int = Field(ge=1)
    device: str = Field(pattern="^(cpu|cuda)$")
    dtype: str = Field(pattern="^(float32|bfloat16)$")
    package_sha256: str | None  # the ahead-of-time compiled network beside the plan; None: eager
    flops: int = Field(ge=0)  # of one call
    calls: int = Field(ge=0)  # per batch
    classes: tuple[int, ...] | None  # the model's class of each label; None: run without classes
    prompts: tuple[str, ...]  # none, for images without a label, then for each label; empty: not a model of prompts
    template: str | None = None  # of the prompts, where each image is told its caption
    conditions_sha256: str | None  # the prompts' embeddings beside the plan
    guidance: float  # 1: none


class PlannedRow(NamedTuple):
    """One row of the output before it is made."""

    position: int
    variant: int
    source_row: int
    source: Row
    key: str
    noise_key: bytes


class Plan(_Frozen):
    """Everything that decides bytes, with every default filled in."""

    schema_version: int = SCHEMA_VERSION
    boomgen: str
    job: Job
    source: SourcePlan
    model: ModelInfo
    chain: ChainPlan
    network: NetworkPlan
    shard_size: int = Field(ge=1)
    store: str | None = None  # URL of the object store that shards and data set go to; None: the run folder
    secret_commitment: str
    environment: dict[str, str]

    @property
    def rows(self) -> int:
        return self.source.rows * self.job.variants

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.shard_size)

    @property
    def batches_per_shard(self) -> int:
        return math.ceil(self.shard_size / self.network.batch_size)

    @property
    def labels_kept(self) -> bool:
        return self.source.labels > 0 and self.job.labels == "keep"

    def positions(self, shard: int) -> range:
        """The output rows of one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    @property
    def calls(self) -> int:
        """Network calls of the whole job."""
        full, rest = divmod(self.rows, self.shard_size)
        batches = full * self.batches_per_shard + math.ceil(rest / self.network.batch_size)
        return batches * self.network.calls

    def to_bytes(self) -> bytes:
        return sealed(self.model_dump(mode="json"))


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        BoomgenError: missing, changed by even one byte, or of another schema version.
    """
    try:
        record = unseal(path.read_bytes())
    except FileNotFoundError as err:
        raise UsageError(f"{path.parent} holds no plan.json; expected a run folder") from err
    except (OSError, ValueError) as err:
        raise BoomgenError(f"{path} is damaged ({err}); restore it, or plan a new run folder") from err
    if record.get("schema_version") != SCHEMA_VERSION:
        raise BoomgenError(
            f"{path} has schema version {record.get('schema_version')}, this boomgen reads {SCHEMA_VERSION}; "
            "use the boomgen that planned it"
        )
    try:
        return Plan.model_validate({name: value for name, value in record.items() if name != "sha256"})
    except ValidationError as err:
        raise BoomgenError(f"{path} is no plan of this boomgen: {err.errors()[0]['msg']}") from err


def planned_rows(plan: Plan, index: Index, secret: bytes, positions: range) -> list[PlannedRow]:
    """The rows at these positions of the output, in order. Order, keys and noise follow from the secret."""
    variants = plan.job.variants
    places = permuted(secret, plan.rows, positions).tolist()
    sources = index.take([place // variants for place in places])
    return [
        _planned_row(plan, secret, position, place, source)
        for position, place, source in zip(positions, places, sources, strict=True)
    ]


def _planned_row(plan: Plan, secret: bytes, position: int, place: int, source: Row) -> PlannedRow:
    source_row, variant = divmod(place, plan.job.variants)
    anonymous = plan.job.mode == "anonymize"
    shared = plan.job.noise == "shared"
    return PlannedRow(
        position=position,
        variant=variant,
        source_row=source_row,
        source=source,
        key=keys.output_key(secret, source.key, variant) if anonymous else f"{position:08d}",
        noise_key=keys.shared_noise_key(secret) if shared else keys.noise_key(secret, source.key, variant),
    )


def differing(planned: Job, asked: Job) -> Iterator[str]:
    """The settings in which two jobs differ, as 't_boom 0.4 (now 0.3)'."""
    before, now = planned.model_dump(), asked.model_dump()
    for name in before:
        if before[name] != now[name]:
            yield f"{name} {before[name]} (now {now[name]})"


def t_boom_of(job: Job) -> tuple[Fraction, int | None]:
    """t_boom as a fraction, and the length of the chain if the job says it.

    Raises:
        UsageError: a level such as 40/100 beside another --steps.
    """
    value, fixed = parse_t_boom(str(job.t_boom))
    if fixed is not None and job.steps not in (None, fixed):
        raise UsageError(f"--t-boom {job.t_boom} with --steps {job.steps}; a level names its own steps, drop --steps")
    return value, fixed or job.steps


def pass_fields(job: Job) -> list[str]:
    """What the images of the passes before the last are called in a sample, beside `png` or the like."""
    return [f"pass{number}.{job.format}" for number in range(1, job.cascade)] if job.keep_intermediates else []


def enhancement(job: Job) -> str:
    """What enhance does to an image before and around Boomerang, for people; '' in another mode."""
    if job.scale is None:
        return ""
    shrunk = f"shrunk by {job.degrade}, " if job.degrade else ""
    passes = f"{job.cascade} Boomerang pass{'es' * (job.cascade > 1)}"
    return f"{shrunk}enlarged {job.scale:g} times by {job.interpolation}, {passes}"


def describe(plan: Plan) -> dict[str, Any]:
    """What the plan means, for people."""
    levels = plan.chain.levels
    return {
        "images": f"{plan.rows:,} ({plan.source.rows:,} sources x {plan.job.variants})",
        **source_lines(plan),
        **({"enhanced": enhancement(plan.job)} if plan.job.mode == "enhance" else {}),
        "shards": f"{plan.shards:,}, of up to {plan.shard_size:,} images",
        "t_boom": f"level {plan.chain.level}/{levels.count}, abar {levels.abar(plan.chain.level):.4f}, "
        f"back by {plan.chain.sampler}",
        "model": f"{plan.model.name} ({plan.model.licence})",
        "makes": f"{plan.model.size}x{plan.model.size} {'grey' if plan.model.channels == 1 else 'RGB'}, the model is "
        f"{_told(plan)}",
        "network": f"{plan.network.dtype}, batch {plan.network.batch_size}, "
        f"{'compiled' if plan.network.package_sha256 else 'eager'} on {plan.network.device}",
        "calls": f"{plan.calls:,} ({plan.calls * plan.network.flops / 1e12:,.1f} TFLOP)",
    }


def _told(plan: Plan) -> str:
    """What the model is told of an image, for people."""
    guidance = f", guidance {plan.network.guidance:g}" if plan.network.guidance != 1 else ""
    if plan.network.prompts:
        shown = plan.network.template or plan.network.prompts[-1]
        return f"told {shown!r}{' and the like' * (len(plan.network.prompts) > 3)}{guidance}"
    return f"told the classes{guidance}" if plan.network.classes else "not told the classes"


def source_lines(plan: Plan) -> dict[str, str]:
    """What was found in the source, for people: its split, its labels, and what was left out."""
    source, lines = plan.source, {}
    if source.split != NO_SPLIT:
        lines["split"] = f"{source.split} only"
    if not source.labels:
        lines["labels"] = "none found"
    elif not plan.labels_kept:
        lines["labels"] = "dropped"
    else:
        lines["labels"] = f"{source.labels} of {len(source.classes)} classes"
    if source.captions is not None:
        lines["captions"] = f"{source.captions:,} of {source.rows:,} images"
    met = sorted(source.passed_over, key=lambda kind: -kind[1])
    left = [f"{count:,} {kind}" for kind, count in met if kind == OTHER_CLASS]
    kinds = [f"{count:,} {kind}" for kind, count in met if kind != OTHER_CLASS]
    if kinds:
        shown = kinds[:5] + [f"{len(kinds) - 5} more kinds"] * (len(kinds) > 5)
        left.append(f"{', '.join(shown)} (no images that boomgen reads)")
    if left:
        lines["left out"] = "; ".join(left)
    return lines


def terms(plan: Plan) -> list[str]:
    """What the licences of data set and model forbid, for people to hear before the run."""
    both = {f"data set {plan.source.name}": plan.source.licence, f"model {plan.model.name}": plan.model.licence}
    return [f"{what}: {licence}" for what, licence in both.items() if catalog.restricted(licence)]


def label_of(plan: Plan, label: int) -> tuple[int, str]:
    """The label and class name that the data set shows; (-1, '') where it shows none."""
    if not plan.labels_kept or label == NO_LABEL:
        return NO_LABEL, ""
    return label, plan.source.classes[label] if label < len(plan.source.classes) else str(label)
