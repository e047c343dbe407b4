"""From a job to a planned run folder: fill in every default, index the source, freeze the plan."""

import contextlib
import glob
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from boomgen import __version__, catalog, env, hub, index, keys, models
from boomgen.errors import UsageError
from boomgen.job import Job, Launch
from boomgen.levels import respaced, spaced
from boomgen.models import ModelInfo
from boomgen.plan import ChainPlan, NetworkPlan, Plan, SourcePlan, differing, t_boom_of
from boomgen.run import RunDir
from boomgen.shard import sha256_file, write_durable
from boomgen.sources import HUB_ID, open_source
from boomgen.sources.base import NO_LABEL, Columns, Source

NEARLY_CLEAN = 0.999
"""abar above which an image comes out as good as unchanged."""
COMPILE_PAYS_FROM = 60e12
"""FLOP of a whole job above which compiling pays: about half an hour of one CPU core, against a minute of compiling."""


class Resolved(NamedTuple):
    """A job without gaps, and where its source lies."""

    job: Job
    location: str
    preset: catalog.DataSet | None


def resolve(job: Job) -> Resolved:
    """Fill the job's gaps from the data set's preset.

    Raises:
        UsageError: unknown data set (with near matches), or options that exclude each other.
    """
    preset = catalog.dataset(job.dataset)
    if job.mode == "anonymize" and (job.seed or job.variants > 1):
        what = "--seed" if job.seed else "--variants"
        raise UsageError(
            f"{what} with anonymize; its randomness is a secret (--secret-file) and an image has one version"
        )
    if job.mode == "augment" and job.linkage in ("private", "none"):
        raise UsageError(f"--linkage {job.linkage} with augment; its noise follows from a public seed, use anonymize")
    location = _location(job, preset)
    return Resolved(_filled(job, preset), location, preset)


def _filled(job: Job, preset: catalog.DataSet | None) -> Job:
    model = job.model or (preset.model if preset else None)
    t_boom = job.t_boom or (preset.t_boom if preset else None)
    if not model or not t_boom:
        missing = "--model" if not model else "--t-boom"
        raise UsageError(f"{missing} is missing; {job.dataset} is no named data set with a default for it")
    fraction, steps = t_boom_of(job.model_copy(update={"t_boom": t_boom}))
    if fraction == 0 and job.mode == "anonymize":
        raise UsageError("--t-boom 0 with anonymize gives the originals, unchanged; use a greater one, or augment")
    people = preset or catalog.dataset(Path(job.dataset).name.lower())  # also a folder that is called like one
    identity = people is not None and people.label_is_identity and job.mode == "anonymize"
    return job.model_copy(
        update={
            "model": model,
            "t_boom": t_boom,
            "steps": steps,
            "fit": job.fit or (preset.fit if preset else "crop"),
            "linkage": job.linkage or ("private" if job.mode == "anonymize" else "public"),
            "labels": job.labels or ("drop" if identity else "keep"),
            "data_dir": str(Path(job.data_dir).resolve()) if job.data_dir else None,
        }
    )


def _location(job: Job, preset: catalog.DataSet | None) -> str:
    if job.data_dir:
        if not preset and Path(job.dataset).exists():
            raise UsageError(f"--dataset {job.dataset} is a place itself; drop --data-dir {job.data_dir}")
        if not Path(job.data_dir).exists():
            raise UsageError(f"--data-dir {job.data_dir} does not exist; expected the folder of {job.dataset}")
        return str(Path(job.data_dir).resolve())
    if preset and preset.builtin:
        return f"builtin:{preset.builtin}"
    if Path(job.dataset).exists():
        return str(Path(job.dataset).resolve())
    if preset and preset.hub:
        return preset.hub.id
    if HUB_ID.fullmatch(job.dataset):
        return job.dataset
    if preset:
        raise UsageError(f"{preset.name} needs --data-dir DIR: {preset.note or 'no copy on the Hub is known'}")
    raise UsageError(
        f"no data set {job.dataset!r}{catalog.suggest(job.dataset, catalog.datasets())}; expected a name "
        "(boomgen datasets), an existing folder or .tar, or owner/name on the Hugging Face Hub"
    )


def default_out(job: Job) -> Path:
    """runs/DATASET-MODE-T_BOOM, below the working folder."""
    name = Path(job.dataset).name.removesuffix(".tar")
    return Path("runs") / f"{name}-{job.mode}-{str(job.t_boom).replace('/', 'of')}"


def prepare(job: Job, launch: Launch) -> RunDir:
    """The run folder of this job: planned anew, or the existing one if it was planned for the same job.

    Raises:
        UsageError: the folder holds another job's plan (the differing settings are named), the source is empty, ...
    """
    resolved = resolve(job)
    out = Path(launch.out) if launch.out else default_out(resolved.job)
    if (out / "plan.json").exists():
        return reopen(out, resolved, launch)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no run folder; use another --out")
    if Path(resolved.location).is_dir() and out.resolve().is_relative_to(resolved.location):
        raise UsageError(f"--out {out} lies inside the data set, which would grow by it; use a place outside")
    device, _ = env.choose_device(launch)
    made = _missing_parents(out)
    _clear_away(out)
    staging = out.parent / f"{_planning(out, str(os.getpid()))}{uuid.uuid4().hex[:8]}"
    try:
        with _writing(out):
            staging.mkdir(parents=True, mode=0o700)
        _write_plan(staging, resolved, launch, device)
        with _writing(out):
            try:
                staging.rename(out)
            except OSError:
                if (out / "plan.json").exists():  # another boomgen was first
                    return reopen(out, resolved, launch)
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:  # a failed plan leaves nothing behind
            with contextlib.suppress(OSError):
                folder.rmdir()
    return RunDir(out)


def _planning(out: Path, process: str) -> str:
    """How this machine names its unfinished plans for a run folder."""
    return f".{out.name}.{process}@{platform.node()}.planning-"


def _clear_away(out: Path) -> None:
    """Remove what killed processes of this machine left of their plans: it may name people."""
    before, _, after = _planning(out, "*").partition("*")
    for folder in out.parent.glob(f"{glob.escape(before)}*{glob.escape(after)}*"):
        process = folder.name.removeprefix(before).partition("@")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or no number of a process: left alone
        pass
    return True


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise UsageError(f"cannot write {out}: {err.strerror or err}; use another --out") from err


def _missing_parents(out: Path) -> list[Path]:
    return [folder for folder in out.absolute().parents if not folder.exists()]


def reopen(out: Path, resolved: Resolved, launch: Launch) -> RunDir:
    """An existing run folder, if it was planned for this job."""
    run = RunDir(out)
    planned, job = run.plan.job, resolved.job
    differences = list(differing(planned, job.model_copy(update={"split": job.split or planned.split})))
    if run.plan.source.location != resolved.location:
        differences.append(f"source {run.plan.source.location} (now {resolved.location})")
    if launch.secret_file and keys.commitment(_secret(job, launch)) != run.plan.secret_commitment:
        differences.append(f"another secret than {launch.secret_file}")
    if differences:
        raise UsageError(f"{out} was planned with {', '.join(differences)}; use another --out, or boomgen resume {out}")
    return run


def _write_plan(folder: Path, resolved: Resolved, launch: Launch, device: str) -> None:
    job = resolved.job
    secret = _secret(job, launch)
    model = models.inspect(str(job.model), launch.allow_pickle)
    source, labels = _index_source(folder, resolved)
    rows, chain = source.rows * job.variants, _chain(job, model)
    classes = _classes(model, source, labels)
    network = _network(folder, job, model, device, rows, chain.level, classes)
    plan = Plan(
        boomgen=__version__,
        job=job.model_copy(update={"split": source.split}),
        source=source,
        model=model,
        chain=chain,
        network=network,
        shard_size=job.shard_size or default_shard_size(rows, network.batch_size),
        secret_commitment=keys.commitment(secret),
        environment=env.environment(device),
    )
    write_durable(folder / "secret", secret.hex().encode() + b"\n")
    (folder / "secret").chmod(0o600)
    if job.linkage == "public":
        folder.chmod(0o755)
    write_durable(folder / "plan.json", plan.to_bytes())


def _index_source(folder: Path, resolved: Resolved) -> tuple[SourcePlan, dict[int, int]]:
    """Open the source, write its index, and pin both; also the rows per label."""
    job, preset = resolved.job, resolved.preset
    source, columns = _open(resolved)
    path = folder / "index.parquet"
    rows = index.build(source, path, job.limit)
    labels = index.Index(path).label_counts()
    planned = SourcePlan(
        location=resolved.location,
        name=job.dataset,
        split=source.split,
        revision=getattr(source, "revision", None),
        image_column=columns.image,
        label_column=columns.label,
        rows=rows,
        passed_over=tuple(sorted(source.passed_over.items())),
        classes=_class_names(resolved, source.classes, labels),
        labels=len(labels.keys() - {NO_LABEL}),
        licence=preset.licence if preset else "not stated",
        index_sha256=sha256_file(path),
    )
    return planned, labels


def _open(resolved: Resolved) -> tuple[Source, Columns]:
    job, preset = resolved.job, resolved.preset
    known = preset.hub if preset and preset.hub and preset.hub.id == resolved.location else None
    columns = Columns(
        job.image_column or (known.image_column if known else None),
        job.label_column or (known.label_column if known else None),
    )
    source = open_source(
        catalog.resolved(resolved.location),
        job.split,
        image_column=columns.image,
        label_column=columns.label,
        revision=known.revision if known else None,
    )
    return source, columns


def fetch(job: Job, launch: Launch) -> dict[str, str]:
    """Bring the job's model and data set here, if they lie on the Hub: what each is, and where. Writes no run.

    Raises:
        UsageError, BoomgenError: as `prepare` does for the same job.
    """
    resolved = resolve(job)
    model = models.inspect(str(resolved.job.model), launch.allow_pickle)
    source, _ = _open(resolved)
    commit = getattr(source, "revision", None)
    place = hub.dataset(resolved.location, commit) if commit else Path(catalog.resolved(resolved.location))
    return {
        "model": f"{model.name}, {hub.whereabouts(model.root)}",
        "data set": f"{job.dataset}, {hub.whereabouts(place)}",
    }


def _secret(job: Job, launch: Launch) -> bytes:
    if job.mode == "augment":
        if launch.secret_file:
            raise UsageError("--secret-file with augment; its link is public, use --seed")
        return keys.secret_of_seed(job.seed)
    return keys.read_secret(Path(launch.secret_file)) if launch.secret_file else keys.new_secret()


def _class_names(resolved: Resolved, found: tuple[str, ...], labels: dict[int, int]) -> tuple[str, ...]:
    """Names of all labels. Labels below -1, or beyond the names that are known, are refused."""
    names = found or tuple(resolved.preset.classes if resolved.preset else ())
    low, high = min(labels), max(labels)
    if low < NO_LABEL or (names and high >= len(names)):
        wrong = low if low < NO_LABEL else high
        raise UsageError(f"label {wrong} in {resolved.job.dataset}; expected 0 to {len(names) - 1 if names else 'N'}")
    return names or tuple(str(label) for label in range(high + 1))


def _chain(job: Job, model: ModelInfo) -> ChainPlan:
    from boomgen.models.pixel_unet import trained_abar

    t_boom, steps = t_boom_of(job)
    levels = respaced(trained_abar(model), spaced(model.trained_steps, steps, job.spacing))
    abar = levels.abar(levels.level(t_boom))
    if job.mode == "anonymize" and abar > NEARLY_CLEAN:
        raise UsageError(
            f"--t-boom {job.t_boom} is level {levels.level(t_boom)} of {levels.count}, abar {abar:.4f}: nearly the "
            "originals; use a greater --t-boom, more --steps, or augment"
        )
    return ChainPlan(
        level=levels.level(t_boom),
        a=tuple(levels.a.tolist()),
        s=tuple(levels.s.tolist()),
        t=tuple(levels.t.tolist()),
        of_step=levels.of_step,
    )


def _classes(model: ModelInfo, source: SourcePlan, labels: dict[int, int]) -> tuple[int, ...] | None:
    """The model's class of each label; refused where it needs one and there is none."""
    classes = models.class_map(model, source.classes)
    if model.class_count and model.null_class is None and (classes is None or NO_LABEL in labels):
        without = "has images without a label" if classes is not None else "names others"
        raise UsageError(f"model {model.name} needs a class of its own for every image; {source.name} {without}")
    return classes


def _network(
    folder: Path,
    job: Job,
    model: ModelInfo,
    device: str,
    rows: int,
    level: int,
    classes: tuple[int, ...] | None,
) -> NetworkPlan:
    import torch

    from boomgen.models.pixel_unet import compile_network, flops

    batch = job.batch_size or max(1, min(64, 64 * 64**2 // model.size**2, rows))
    dtype = job.dtype or env.default_dtype(device)
    cost = flops(model, batch)
    pays = device == "cpu" and cost / batch * rows * level > COMPILE_PAYS_FROM and shutil.which("g++") is not None
    package = folder / "network.pt2"
    if job.compile == "yes" or (job.compile is None and pays):
        torch.set_num_threads(1)
        compile_network(model, getattr(torch, dtype), batch, device, package)
    return NetworkPlan(
        batch_size=batch,
        device=device,
        dtype=dtype,
        package_sha256=sha256_file(package) if package.exists() else None,
        flops=cost,
        classes=classes,
    )


def default_shard_size(rows: int, batch: int) -> int:
    """About 64 shards of whole batches, at most 10,000 rows each: small enough to redo, few enough to list."""
    whole = -(-rows // (64 * batch)) * batch
    return max(batch, min(whole, 10_000 // batch * batch))
