"""From a job to a planned run folder: fill in every default, index the source, freeze the plan."""

import contextlib
import glob
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from boomgen import __version__, catalog, choose, env, hub, index, keys, models, places
from boomgen.errors import UsageError
from boomgen.job import ENHANCE, Job, Launch
from boomgen.plan import Plan, SourcePlan, differing, t_boom_of
from boomgen.run import RunDir
from boomgen.shard import sha256_file, write_durable
from boomgen.sources import HUB_ID, open_source
from boomgen.sources.base import NO_LABEL, Source
from boomgen.store import Bucket

LOOK_AGAIN = 0.5  # seconds


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
    if job.mode != "anonymize" and job.linkage in ("private", "none"):
        raise UsageError(
            f"--linkage {job.linkage} with {job.mode}; its noise follows from a public seed, use anonymize"
        )
    _check_enhance(job)
    location = _location(job, preset)
    return Resolved(_filled(job, preset), location, preset)


def _check_enhance(job: Job) -> None:
    if job.mode != "enhance":
        for name in ENHANCE:
            if getattr(job, name) != Job.model_fields[name].default:
                raise UsageError(f"--{name.replace('_', '-')} with {job.mode}; only enhance has it")
    elif job.scale is None:
        raise UsageError("--scale is missing; say how many times greater the outputs are to be, as --scale 4")
    elif job.keep_intermediates and job.cascade == 1:
        raise UsageError("--keep-intermediates with --cascade 1; one pass has none, use a greater --cascade")


def _filled(job: Job, preset: catalog.DataSet | None) -> Job:
    model = job.model or (preset.model if preset else None)
    t_boom = job.t_boom or (preset.t_boom if preset else None)
    if not model or not t_boom:
        missing = "--model" if not model else "--t-boom"
        raise UsageError(f"{missing} is missing; {job.dataset} is no named data set with a default for it")
    fraction, steps = t_boom_of(job.model_copy(update={"t_boom": t_boom}))
    if fraction == 0 and job.mode == "anonymize":
        raise UsageError("--t-boom 0 with anonymize gives the originals, unchanged; use a greater one, or augment")
    people = preset or catalog.datasets().get(Path(job.dataset).name.lower())  # also a folder that is called like one
    identity = people is not None and people.label_is_identity and job.mode == "anonymize"
    return job.model_copy(
        update={
            "model": model,
            "t_boom": t_boom,
            "steps": steps,
            "interpolation": job.interpolation or ("linear" if job.mode == "enhance" else None),
            "fit": job.fit or (preset.fit if preset else "crop"),
            "linkage": job.linkage or ("private" if job.mode == "anonymize" else "public"),
            "labels": job.labels or ("drop" if identity else "keep"),
            "data_dir": places.settled(job.data_dir) if job.data_dir else None,
        }
    )


def _location(job: Job, preset: catalog.DataSet | None) -> str:
    if job.data_dir:
        if not preset and Path(job.dataset).exists():
            raise UsageError(f"--dataset {job.dataset} is a place itself; drop --data-dir {job.data_dir}")
        if not places.exists(places.place(job.data_dir)):
            raise UsageError(f"--data-dir {job.data_dir} does not exist; expected the folder of {job.dataset}")
        return _inner(job.data_dir, preset)
    if preset and preset.data_dir:
        if not places.exists(places.place(preset.data_dir)):
            raise UsageError(f"data set {job.dataset}: data_dir {preset.data_dir} does not exist; expected its folder")
        return _inner(preset.data_dir, preset)
    if preset and preset.builtin:
        return f"builtin:{preset.builtin}"
    if places.is_url(job.dataset):
        return places.settled(job.dataset)
    if job.dataset.endswith(catalog.YAML) and not preset:
        raise UsageError(f"--dataset {job.dataset} is no file; expected a YAML file that describes a data set")
    if Path(job.dataset).exists() and not job.dataset.endswith(catalog.YAML):
        return str(Path(job.dataset).resolve())
    if preset and preset.hub:
        return preset.hub.id
    if HUB_ID.fullmatch(job.dataset):
        return job.dataset
    if preset:
        raise UsageError(f"{preset.name} needs --data-dir DIR: {preset.note or 'no copy on the Hub is known'}")
    raise UsageError(
        f"no data set {job.dataset!r}{catalog.suggest(job.dataset, catalog.datasets())}; expected a name "
        "(boomgen datasets), an existing folder or .tar, s3://bucket/folder, or owner/name on the Hugging Face Hub"
    )


def _inner(text: str, preset: catalog.DataSet | None) -> str:
    """The part of a folder that a data set is read from."""
    place = places.place(places.settled(text))
    parts = (place / part for part in (preset.inner if preset else ()))
    return str(next(filter(places.exists, parts), place))


def default_out(job: Job) -> Path:
    """runs/DATASET-MODE-T_BOOM, below the working folder."""
    name = Path(job.dataset).name.removesuffix(".tar").removesuffix(".yaml").removesuffix(".yml")
    return Path("runs") / f"{name}-{job.mode}-{str(job.t_boom).replace('/', 'of')}"


def _out(resolved: Resolved, launch: Launch) -> Path:
    there = places.place(launch.out) if launch.out else None
    if isinstance(there, Path):
        return there
    return Path(launch.private_dir) if launch.private_dir else default_out(resolved.job)


def _store(launch: Launch) -> str | None:
    """The object store that the outputs go to."""
    there = places.place(launch.out) if launch.out else None
    return None if there is None or isinstance(there, Path) else str(there)


def prepare(job: Job, launch: Launch) -> RunDir:
    """The run folder of this job: planned anew, or the existing one if it was planned for the same job.

    Raises:
        UsageError: the folder holds another job's plan (the differing settings are named), the source is empty, ...
    """
    resolved = resolve(job)
    out = _out(resolved, launch)
    if (out / "plan.json").exists():
        return reopen(out, resolved, launch)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no run folder; use another --out")
    if Path(resolved.location).is_dir() and out.resolve().is_relative_to(resolved.location):
        raise UsageError(f"--out {out} lies inside the data set, which would grow by it; use a place outside")
    device, _ = env.choose_device(launch)
    store = Bucket(url, out) if (url := _store(launch)) else None
    if store:
        if store.taken():
            raise UsageError(f"{url} holds another run; use another --out, or the --private-dir of that run")
        store.try_out()
    made = _missing_parents(out)
    _clear_away(out)
    staging = out.parent / f"{_planning(out, str(os.getpid()))}{uuid.uuid4().hex[:8]}"
    try:
        with _writing(out):
            staging.mkdir(parents=True, mode=0o700)
        _write_plan(staging, resolved, launch, device)
        if store:
            store.claim(sha256_file(staging / "plan.json"))
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


def await_plan(job: Job, launch: Launch) -> RunDir:
    """The run folder of this job, once another process has planned it."""
    resolved = resolve(job)
    out = _out(resolved, launch)
    waited = 0.0
    while not (out / "plan.json").exists():
        time.sleep(LOOK_AGAIN)
        waited += LOOK_AGAIN
        if waited % 60 < LOOK_AGAIN:
            waiting = f"{platform.node()}: waiting for rank 0 to plan {out.absolute()}; do all nodes see this folder?"
            print(waiting, file=sys.stderr, flush=True)
    return reopen(out, resolved, launch)


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
    if run.plan.store != _store(launch):
        differences.append(f"out {run.plan.store or out} (now {launch.out or out})")
    if launch.secret_file and keys.commitment(_secret(job, launch)) != run.plan.secret_commitment:
        differences.append(f"another secret than {launch.secret_file}")
    if differences:
        folder = "--private-dir" if launch.out and places.is_url(launch.out) else "--out"
        raise UsageError(
            f"{out} was planned with {', '.join(differences)}; use another {folder}, or boomgen resume {out}"
        )
    return run


def _write_plan(folder: Path, resolved: Resolved, launch: Launch, device: str) -> None:
    job, preset = resolved.job, resolved.preset
    secret = _secret(job, launch)
    model = models.inspect(str(job.model), launch.allow_pickle, job.lora)
    source, labels = _index_source(folder, resolved)
    rows, chain = source.rows * job.variants, choose.chain(job, model)
    network = choose.network(folder, job, model, device, rows, chain, source, labels, preset)
    plan = Plan(
        boomgen=__version__,
        job=job.model_copy(update={"split": source.split}),
        source=source,
        model=model,
        chain=chain,
        network=network,
        shard_size=job.shard_size or choose.shard_size(rows, network.batch_size),
        store=_store(launch),
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
    source, told = _open(resolved)
    path = folder / "index.parquet"
    rows = index.build(source, path, job.limit)
    places.forget()
    labels = index.Index(path).label_counts()
    planned = SourcePlan(
        location=resolved.location,
        name=job.dataset,
        split=source.split,
        revision=getattr(source, "revision", None),
        rows=rows,
        passed_over=tuple(sorted(source.passed_over.items())),
        classes=_class_names(resolved, source.classes, labels),
        labels=len(labels.keys() - {NO_LABEL}),
        captions=index.Index(path).captioned() if _tells_captions(resolved) else None,
        licence=preset.licence if preset else "not stated",
        index_sha256=sha256_file(path),
        **told,
    )
    return planned, labels


def _on_hub(resolved: Resolved) -> catalog.Hub | None:
    """What the preset says of the Hub, where the source lies there."""
    known = resolved.preset.hub if resolved.preset else None
    return known if known and known.id == resolved.location else None


def _open(resolved: Resolved) -> tuple[Source, dict[str, Any]]:
    """The source, and what it was told: columns and classes."""
    job, preset, known = resolved.job, resolved.preset, _on_hub(resolved)
    told: dict[str, Any] = {
        "image_column": job.image_column or (known.image_column if known else None),
        "label_column": job.label_column or (known.label_column if known else None),
        "folders": preset.folders if preset else (),
        "numbers": preset.imagenet_classes if preset and preset.wordnet else (),
    }
    revision = known.revision if known else None
    source = open_source(
        catalog.resolved(resolved.location),
        job.split,
        caption_column=job.caption_column,
        captions=_tells_captions(resolved),
        revision=revision,
        **told,
    )
    return source, told


def _tells_captions(resolved: Resolved) -> bool:
    asked = "{caption}" in (choose.asked_prompt(resolved.job, resolved.preset) or "")
    if resolved.job.caption_column and not asked:
        raise UsageError("--caption-column without {caption} in the prompt; add --prompt '{caption}'")
    return asked


def fetch(job: Job, launch: Launch) -> dict[str, str]:
    """Bring the job's model and data set here, if they lie on the Hub: what each is, and where. Writes no run.

    Raises:
        UsageError, BoomgenError: as `prepare` does for the same job.
    """
    resolved = resolve(job)
    model = models.inspect(str(resolved.job.model), launch.allow_pickle, resolved.job.lora)
    source, _ = _open(resolved)
    commit = getattr(source, "revision", None)
    place = hub.dataset(resolved.location, commit) if commit else places.place(catalog.resolved(resolved.location))
    here = hub.whereabouts(place) if isinstance(place, Path) else "read from there by each run"
    return {"model": f"{model.name}, {hub.whereabouts(model.root)}", "data set": f"{job.dataset}, {here}"}


def _secret(job: Job, launch: Launch) -> bytes:
    if job.mode != "anonymize":
        if launch.secret_file:
            raise UsageError(f"--secret-file with {job.mode}; its link is public, use --seed")
        return keys.secret_of_seed(job.seed)
    return keys.read_secret(Path(launch.secret_file)) if launch.secret_file else keys.new_secret()


def _class_names(resolved: Resolved, found: tuple[str, ...], labels: dict[int, int]) -> tuple[str, ...]:
    """Names of all labels. Labels below -1, or beyond the names that are known, are refused."""
    known, folders = (resolved.preset.classes, resolved.preset.folders) if resolved.preset else ((), ())
    same = found == folders or (_on_hub(resolved) is not None and len(found) == len(known))
    names = known if known and (same or not found) else found
    low, high = min(labels), max(labels)
    if low < NO_LABEL or (names and high >= len(names)):
        wrong = low if low < NO_LABEL else high
        raise UsageError(f"label {wrong} in {resolved.job.dataset}; expected 0 to {len(names) - 1 if names else 'N'}")
    return names or tuple(str(label) for label in range(high + 1))
