"""Check a run against its own records: every byte re-hashed, some rows made again."""

import contextlib
import hashlib
import io
import itertools
import random
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from boomgen import manifest
from boomgen.errors import BoomgenError
from boomgen.finalise import dataset_files, dataset_names, manifest_links
from boomgen.places import Place, exists, forget, names, opened, walk
from boomgen.run import RunDir
from boomgen.shard import DONE, PART, TAR, sha256_file, unseal
from boomgen.store import CARD


def verify(run: RunDir) -> Iterator[str]:
    """One line per fault; none for a sound run. Reads everything, imports no torch."""
    forget()
    try:
        yield from _inputs(run)
        texts = _texts(run) if run.store.closed() else None
    except BoomgenError as err:  # without the plan, or the names of what was placed, nothing can be checked
        yield str(err)
        return
    for number in range(run.plan.shards):
        yield from _shard(run, number)
    if run.manifest.exists() or texts is not None:
        with contextlib.suppress(BoomgenError):  # of a damaged done record, named above
            yield from _folder(run.manifest, manifest_links(run), {}, _anew(run.manifest))
    if texts is not None:
        with contextlib.suppress(BoomgenError):
            tars = {name: run.store.tar(number) for number, name in dataset_names(dataset_files(run)).items()}
            yield from _folder(run.dataset, tars, texts, _anew(run.dataset))


def _inputs(run: RunDir) -> Iterator[str]:
    destroyed = run.plan.job.linkage == "none" and not run.missing()
    for check in () if destroyed else (lambda: run.index, lambda: _secret(run)):
        try:
            check()
        except BoomgenError as err:
            yield str(err)
    network = run.plan.network
    for path, planned in ((run.package, network.package_sha256), (run.conditions, network.conditions_sha256)):
        if planned and (not path.exists() or sha256_file(path) != planned):
            yield f"{path} is not the planned one"


def _secret(run: RunDir) -> None:
    secret, path = run.secret, run.path / "secret"
    if path.read_bytes() != secret.hex().encode() + b"\n":
        raise BoomgenError(f"{path} holds the planned secret, but not as it was written")


def _shard(run: RunDir, number: int) -> Iterator[str]:
    folder = run.store.where(number)
    if not run.store.holds(number):
        yield f"{folder} is missing; go on with: boomgen resume {run.path}"
        return
    try:
        record = run.done(number)
    except BoomgenError as err:
        yield str(err)
        return
    sound = True
    files = {PART: run.store.part(number), TAR: run.store.tar(number)}
    for name, path in files.items():
        if not exists(path) or sha256_file(path) != record["files"][name]["sha256"]:
            yield f"{path} differs from its done record; remove {folder} and go on with: boomgen resume {run.path}"
            sound = False
    with opened(folder / DONE) as file:
        same = file.read() == run.store.record(number)
    if not same:
        yield f"{folder / DONE} is not the record of {run.path}; remove {folder}, then: boomgen resume {run.path}"
    for name in sorted(set(names(folder)) - {DONE, *(path.name for path in files.values())}):
        yield f"{folder / name} is not of this shard; remove it"
    if sound:
        yield from _rows(run, number)


def _rows(run: RunDir, number: int) -> Iterator[str]:
    """Rows in the part = rows in the plan; images in the tar = ok rows of the part, byte for byte."""
    part, path = run.store.part(number), run.store.tar(number)
    table = manifest.read_part(part)
    if table.column("row").to_pylist() != list(run.plan.positions(number)):
        yield f"{part} does not hold the planned rows"
    ok = {row["key"]: row["output_sha256"] for row in table.to_pylist() if row["status"] == manifest.OK}
    held = {
        key: hashlib.sha256(files.get(run.plan.job.format, b"")).hexdigest() for key, files in _samples(path).items()
    }
    if held != ok:
        yield f"{path} does not hold the ok rows of its manifest part"


def _samples(path: Place) -> dict[str, dict[str, bytes]]:
    """The samples of a tar: key -> extension -> content."""
    samples: dict[str, dict[str, bytes]] = {}
    with opened(path) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = (tar.extractfile(member) or io.BytesIO()).read()
    return samples


def _texts(run: RunDir) -> dict[str, str]:
    """The hashes of what `finalise` wrote into the data set."""
    try:
        return dict(unseal(run.closing.read_bytes())["texts"])
    except (OSError, ValueError) as err:
        raise BoomgenError(f"{run.closing} is damaged ({err}); {_anew(run.dataset)}") from err


def _anew(folder: Place) -> str:
    """How to have a folder placed again. In an object store the data set holds the only tars: there, its card goes."""
    return f"remove {folder if isinstance(folder, Path) else folder / CARD} and finalise again"


def _folder(folder: Place, links: Mapping[str, Place], texts: dict[str, str], again: str) -> Iterator[str]:
    """What finalise placed is what the shards hold, and there is nothing else."""
    for name, origin in links.items():
        path = folder / name
        if path != origin and not (exists(path) and exists(origin) and _same(path, origin)):
            yield f"{path} is not that of its shard; {again}"
    for name, known in texts.items():
        path = folder / name
        if not exists(path) or sha256_file(path) != known:
            yield f"{path} is not what was written; {again}"
    ours = {folder / name for name in links.keys() | texts.keys()}
    for path in (path for path in walk(folder) if path not in ours):
        yield f"{path} was not put there by boomgen; remove it"


def _same(one: Place, other: Place) -> bool:
    linked = isinstance(one, Path) and isinstance(other, Path) and one.samefile(other)
    return linked or sha256_file(one) == sha256_file(other)


def remake(run: RunDir, count: int) -> Iterator[str]:
    """Make `count` random rows again, each in its whole batch, and compare all of it. One line per difference."""
    from boomgen.worker import Worker

    worker = Worker(run)
    chosen = sorted(random.sample(range(run.plan.rows), min(count, run.plan.rows)))
    places = [divmod(row, run.plan.shard_size) for row in chosen]
    for shard, group in itertools.groupby(places, key=lambda place: place[0]):
        rows = manifest.read_part(run.store.part(shard)).to_pylist()
        samples = _samples(run.store.tar(shard))
        offsets = [offset for _, offset in group]
        size = run.plan.network.batch_size
        made = {batch: worker.make_batch(shard, batch) for batch in {offset // size for offset in offsets}}
        for offset in offsets:
            again, row = made[offset // size][offset % size], rows[offset]
            if {**again.entry, "shard": shard} != row or again.members != samples.get(row["key"], {}):
                yield f"row {row['row']} ({row['key']}) made again differs from {run.store.where(shard)}"
