"""What users train with: a run's Boomerang versions, mixed with their originals through the manifest.

The paper's data augmentation (Luzi et al., TMLR 2024) shows a classifier every image once an epoch, and each time, with
probability p = 0.5, its Boomerang version in place of the original. `BoomerangMix` does so by random access over the
source's rows, `mixed_stream` by streaming over the run's tars. What is shown follows from (seed, epoch, image) alone:
not from the order of access, the number of DataLoader workers or any global generator.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from boomgen import images, manifest
from boomgen.errors import UsageError
from boomgen.index import Index
from boomgen.plan import Plan, SourcePlan
from boomgen.run import RunDir, ranges
from boomgen.shard import PART, TAR
from boomgen.sources.base import Reader, Row

ORIGINAL = -1
"""In place of a version's number: the original."""

_NO_ORIGINAL = ("undecodable", "too-large")  # why a row failed that has no original to show either


class BoomerangMix(Dataset[tuple[Any, int]]):
    """Each source image as it is or, with probability `p`, as one of its Boomerang versions; decided anew per epoch.

    Item i is (transform(image), label). The image is a PIL picture, grey or RGB as the model is; an original is brought
    to the model's size and back just as its versions were, so both have one size. The label is the data set's, -1 for
    none. Among several versions each is as likely. A row without an ok version always gives its original; a row whose
    original cannot be decoded is left out, `rows[i]` is the source row of item i. Works in any DataLoader worker.

    Raises:
        UsageError: p is no probability, shards are missing, or the run destroyed its links (--linkage none).
    """

    def __init__(
        self,
        run: RunDir | Path | str,
        p: float = 0.5,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self._run = run = _linked(run, p)
        self.p, self.seed, self.transform = p, seed, transform
        self._index = pq.ParquetFile(run.path / "index.parquet").read()
        self.rows, self.labels = _labelled_rows(run)
        self._versions = _versions(run)
        # Shared memory, so that DataLoader workers which outlive an epoch see the next one too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose anew: call it before each epoch, on every rank with the same number."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        plan, version = self._run.plan, self.version(i)
        if version == ORIGINAL:
            row = Row(*(column[int(self.rows[i])].as_py() for column in self._index.columns))
            image = _original(plan, row)
        else:
            _, shard, offset, size = map(int, self._versions[version])
            tar = _handle(self._run.shard(shard) / TAR)
            image = _picture(plan, os.pread(tar.fileno(), size, offset))
        return (self.transform(image) if self.transform else image), int(self.labels[i])

    def version(self, i: int) -> int:
        """Which version item i shows in this epoch, a number over all ok versions of the run; ORIGINAL for none."""
        row = int(self.rows[i])
        first, end = np.searchsorted(self._versions[:, 0], (row, row + 1)).tolist()
        chance, choice = _draws(self.seed, int(self._epoch), row)
        return first + choice % (end - first) if end > first and chance < self.p * 2**64 else ORIGINAL


def mixed_stream(
    run: RunDir | Path | str, p: float = 0.5, seed: int = 0, epoch: int = 0, shardshuffle: int | bool = False
) -> Any:
    """The run's tars as a WebDataset of dicts: image (PIL), label, key, synthetic.

    Every ok version is visited once; with probability 1 - p its original is shown in its place (`synthetic` False).
    Rows without an ok version are in no tar and so not in the stream. Tars are split over ranks, then over DataLoader
    workers; under DDP, where ranks must have equally many batches, add `.repeat().with_epoch(n)`.

    Raises:
        UsageError: as BoomerangMix does.
    """
    import webdataset

    run = _linked(run, p)
    tars = [str(run.shard(number) / TAR) for number in range(run.plan.shards) if run.done(number)["ok"]]
    stream = webdataset.WebDataset(
        tars,
        nodesplitter=webdataset.split_by_node,
        shardshuffle=shardshuffle,
        seed=_draws(seed, epoch, "shards")[0],
        empty_check=False,  # fewer tars than workers is no error: some have nothing to do
    )
    return stream.map(_Mixer(run, p, seed, epoch))


class _Mixer:
    """A sample of a run's tar to a mixed sample; knows the rows of one shard at a time."""

    def __init__(self, run: RunDir, p: float, seed: int, epoch: int) -> None:
        self.path, self.plan = run.path, run.plan
        self.p, self.seed, self.epoch = p, seed, epoch
        self._shard, self._rows = "", dict[str, tuple[int, Row]]()

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if sample["__url__"] != self._shard:
            self._shard, self._rows = sample["__url__"], self._read(Path(sample["__url__"]).with_name(PART))
        key = sample["__key__"]
        label, row = self._rows[key]
        synthetic = _draws(self.seed, self.epoch, key)[0] < self.p * 2**64
        image = _picture(self.plan, sample[self.plan.job.format]) if synthetic else _original(self.plan, row)
        return {"image": image, "label": label, "key": key, "synthetic": synthetic}

    def _read(self, part: Path) -> dict[str, tuple[int, Row]]:
        keys, labels, numbers = manifest.read_parts([part], ["key", "label", "source_row"]).to_pydict().values()
        sources = Index(self.path / "index.parquet").take(numbers)
        return dict(zip(keys, zip(labels, sources, strict=True), strict=True))


def _linked(run: RunDir | Path | str, p: float) -> RunDir:
    """The run, if its outputs can be paired with their sources."""
    run = run if isinstance(run, RunDir) else RunDir(run)
    if not 0 <= p <= 1:
        raise UsageError(f"p = {p}, expected a probability from 0 to 1")
    if run.plan.job.linkage == "none":
        raise UsageError(f"{run.path} was made with --linkage none, nothing pairs its images with their originals")
    if run.plan.store:
        raise UsageError(f"the tars of {run.path} are in {run.plan.store}; train from a run whose tars are on disk")
    if missing := run.missing():
        raise UsageError(f"{run.path} misses shards {ranges(missing)}; go on with: boomgen resume {run.path}")
    len(run.index)  # checks that it is the planned one
    return RunDir(run.path)  # without an open index, so that it can be pickled


def _labelled_rows(run: RunDir) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source rows that have an original to show, ascending, and their labels; both (N,)."""
    parts = [run.shard(number) / PART for number in range(run.plan.shards)]
    table = manifest.read_parts(parts, ["source_row", "label", "reason"])
    shown = ~np.isin(table["reason"].to_numpy(), _NO_ORIGINAL)
    rows, first = np.unique(table["source_row"].to_numpy()[shown], return_index=True)
    return rows, table["label"].to_numpy()[shown][first].astype(np.int64)


def _versions(run: RunDir) -> NDArray[np.int64]:
    """Where every ok version lies: (N, 4) of source row, shard, offset in its tar and size in bytes, by source row."""
    found: list[tuple[int, int, int, int]] = []
    for number in range(run.plan.shards):
        part = manifest.read_parts([run.shard(number) / PART], ["key", "status", "source_row"])
        with tarfile.open(run.shard(number) / TAR) as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
        for key, status, source_row in zip(*part.to_pydict().values(), strict=True):
            if status == manifest.OK:
                found.append((source_row, number, *places[f"{key}.{run.plan.job.format}"]))
    return np.array(sorted(found), np.int64).reshape(-1, 4)


def _draws(seed: int, epoch: int, what: int | str) -> tuple[int, int]:
    """Two uniform 64-bit numbers that belong to one image in one epoch."""
    digest = hashlib.blake2b(f"{seed} {epoch} {what}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def _original(plan: Plan, row: Row) -> Image.Image:
    """A source image at the size of its outputs."""
    pixels = images.decode(_source(os.getpid(), plan.source).read(row), plan.model.channels)
    square, box = images.fitted(pixels, plan.model.size, plan.job)
    return images.to_image(np.ascontiguousarray(images.unfit(square, box)))


def _picture(plan: Plan, file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("L" if plan.model.channels == 1 else "RGB")  # webp knows no grey


@lru_cache(maxsize=4)
def _source(process: int, source: SourcePlan) -> Reader:
    """The source, opened once by each process: forked workers must not share a file position."""
    return source.open()


@lru_cache(maxsize=128)
def _handle(path: Path) -> IO[bytes]:
    """An open tar. It is read by `pread` only, which has no file position to share."""
    return path.open("rb")
