"""Peak memory while a source is indexed: made-up rows, of which no file exists, and a folder of real, empty ones.

    python benchmarks/index_memory.py            # 100,000 and 1,000,000 rows; a folder of 100,000 files
    python benchmarks/index_memory.py --whole    # 10,000,000 rows, made up and of a Hugging Face table; 2,000,000 files

Each number is measured in a process of its own.
"""

import multiprocessing
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from boomgen import index
from boomgen.sources import open_source
from boomgen.sources.base import Row, Source
from boomgen.sources.folder import Folder

WHOLE = "--whole" in sys.argv
ROWS = (10_000_000,) if WHOLE else (100_000, 1_000_000)
FILES = 2_000_000 if WHOLE else 100_000
TABLE = 10_000_000 if WHOLE else 1_000_000


class MadeUp:
    """Rows as a folder of a million photos in 1,000 classes gives them."""

    kind, split = "made-up", "train"
    classes: tuple[str, ...] = ()

    def __init__(self, count: int) -> None:
        self.count, self.passed_over = count, Counter[str]()

    def rows(self) -> Iterator[Row]:
        for i in range(self.count):
            name = f"n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG"
            yield Row(name, name, 0, 110_000 + i, i % 1000)

    def read(self, row: Row) -> bytes:
        raise OSError(f"{row.key} does not exist")


def peak() -> int:
    """Bytes of this process at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(source: Source) -> int:
    """Bytes by which the peak grows while a source is indexed."""
    with tempfile.TemporaryDirectory() as folder:
        index.build(MadeUp(70_000), Path(folder) / "warm")  # libraries, and one full group
        before = peak()
        index.build(source, Path(folder) / "index")
        return peak() - before


def in_folder(count: int) -> int:
    """The same for one flat folder of empty image files."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            (Path(folder) / f"{i:08d}.png").touch()
        return growth(Folder(Path(folder), None))


def in_table(count: int) -> int:
    """The same for a Hugging Face data set on disk, with labels, whose images are one byte each."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        images = pa.StructArray.from_arrays(
            [pa.array([b"x"] * 100_000, pa.binary()), pa.nulls(100_000, pa.string())], ["bytes", "path"]
        )
        rows = pa.table({"image": images, "label": pa.array([i % 1000 for i in range(100_000)])})
        about = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=1000))
        parts = [datasets.Dataset(rows.cast(about.arrow_schema)) for _ in range(count // 100_000)]
        datasets.concatenate_datasets(parts).save_to_disk(Path(folder) / "table", max_shard_size="100MB")
        del parts
        return growth(open_source(str(Path(folder) / "table")))


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in ROWS:
            grown = pool.apply(growth, (MadeUp(count),))
            print(f"{count:>10,} made-up rows: {grown / 2**20:6.1f} MiB more, {grown / count:5.1f} bytes a row")
        grown = pool.apply(in_table, (TABLE,))
        print(f"{TABLE:>10,} rows of a table: {grown / 2**20:6.1f} MiB more, {grown / TABLE:5.1f} bytes a row")
        grown = pool.apply(in_folder, (FILES,))
        print(f"{FILES:>10,} files in one folder: {grown / 2**20:6.1f} MiB more, {grown / FILES:5.1f} bytes a file")


if __name__ == "__main__":
    main()
