"""Check a run against its own records: every byte re-hashed, some rows made again."""

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from boomgen import manifest
from boomgen.errors import BoomgenError
from boomgen.finalise import expected_dataset
from boomgen.run import RunDir
from boomgen.shard import PART, TAR, sha256_file


def verify(run: RunDir) -> Iterator[str]:
    """One line per fault; none for a sound run. Reads everything, imports no torch."""
    for check in (lambda: run.plan, lambda: run.index, lambda: run.secret):
        if run.plan.job.linkage == "none" and not (run.path / "secret").exists() and check is not None:
            break
        try:
            check()
        except BoomgenError as err:
            yield str(err)
    package = run.plan.network.package_sha256
    if package and (not run.package.exists() or sha256_file(run.package) != package):
        yield f"{run.package} is not the planned network package"
    for number in range(run.plan.shards):
        yield from _shard(run, number)
    if run.dataset.exists():
        yield from _dataset(run)


def _shard(run: RunDir, number: int) -> Iterator[str]:
    folder = run.shard(number)
    if not folder.exists():
        yield f"{folder} is missing; go on with: boomgen resume {run.path}"
        return
    try:
        record = run.done(number)
    except BoomgenError as err:
        yield str(err)
        return
    sound = True
    for name, known in record["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != known["bytes"] or sha256_file(path) != known["sha256"]:
            yield f"{path} differs from its done record; remove {folder} and resume the run"
            sound = False
    if sound:
        yield from _rows(run, number)


def _rows(run: RunDir, number: int) -> Iterator[str]:
    """Rows in the part = rows in the plan; samples in the tar = ok rows of the part."""
    table = pq.read_table(run.shard(number) / PART)
    if table.column("row").to_pylist() != list(run.plan.positions(number)):
        yield f"{run.shard(number) / PART} does not hold the planned rows"
    ok = {row["key"]: row["output_sha256"] for row in table.to_pylist() if row["status"] == manifest.OK}
    with tarfile.open(run.shard(number) / TAR) as tar:
        image = f".{run.plan.job.format}"
        held = {name.removesuffix(image) for name in tar.getnames() if name.endswith(image)}
    if held != ok.keys():
        yield f"{run.shard(number) / TAR} does not hold the ok rows of its manifest part"


def _dataset(run: RunDir) -> Iterator[str]:
    try:
        links, texts = expected_dataset(run)
    except BoomgenError:
        return  # named already
    for name, origin in links.items():
        path = run.dataset / name
        if not path.exists() or not (path.samefile(origin) or _same(path, origin)):
            yield f"{path} is not the tar of its shard; remove {run.dataset} and finalise again"
    for name, data in texts.items():
        path = run.dataset / name
        if not path.exists() or path.read_bytes() != data:
            yield f"{path} is not what was written; remove {run.dataset} and finalise again"
    for number in range(run.plan.shards):
        path, origin = run.manifest / f"part-{number:05d}.parquet", run.shard(number) / PART
        if not path.exists() or not (path.samefile(origin) or _same(path, origin)):
            yield f"{path} is not the part of its shard; remove {run.manifest} and finalise again"


def _same(one: Path, other: Path) -> bool:
    return sha256_file(one) == sha256_file(other)


def remake(run: RunDir, count: int) -> Iterator[str]:
    """Make `count` random ok rows again, each with its whole batch, and compare bytes. One line per difference."""
    import torch

    from boomgen.worker import Worker

    torch.set_num_threads(1)
    worker = Worker(run)
    table = manifest.read(run.manifest, ["row", "key", "status", "output_sha256"])
    ok = [row for row in table.to_pylist() if row["status"] == manifest.OK]
    for row in random.sample(ok, min(count, len(ok))):
        shard, place = divmod(row["row"], run.plan.shard_size)
        batch, offset = divmod(place, run.plan.network.batch_size)
        made = worker.make_batch(shard, batch)[offset]
        if made.entry["output_sha256"] != row["output_sha256"] or made.members != _members(run, shard, row["key"]):
            yield f"row {row['row']} ({row['key']}) made again differs from shard {shard}"


def _members(run: RunDir, shard: int, key: str) -> dict[str, bytes]:
    with tarfile.open(run.shard(shard) / TAR) as tar:
        mine = [member for member in tar if member.name.partition(".")[0] == key]
        return {member.name.partition(".")[2]: (tar.extractfile(member) or io.BytesIO()).read() for member in mine}
