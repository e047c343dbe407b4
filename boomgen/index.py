"""The row index of a source as a Parquet file, and a keyed order over its rows.

The plan lists a source once; after that, workers find any row by its number without walking the source again.
"""

import contextlib
import hashlib
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from boomgen.errors import UsageError
from boomgen.keys import derive
from boomgen.sources.base import NO_LABEL, Row, Source

GROUP_ROWS = 65_536
MAX_LABEL = 2**31 - 1
ROUNDS = 10  # even, so that both halves end where they began
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
    ]
)


def build(source: Source, path: Path, limit: int | None = None) -> int:
    """Write the first `limit` rows of a source (None: all) to `path`, and return their number.

    The same rows give the same bytes with one version of pyarrow. The file appears whole or not at all. UsageError
    where there are no rows, two rows share a key, or a row cannot be written down.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} rows, expected at least 1")
    staged = path.with_name(f"{path.name}.part")
    digests = array("Q")
    try:
        count = _write(_checked(islice(source.rows(), limit), digests), staged)
        if count == 0:
            raise UsageError(f"the {source.kind} source, split {source.split!r}, has no images; expected at least one")
        _require_unique(lambda: islice(source.rows(), limit), digests)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return count


def _write(rows: Iterable[Row], path: Path) -> int:
    count = 0
    options = {"compression": "zstd", "compression_level": 3, "use_dictionary": ["path", "label"]}
    # Arrow's own files do not say why they fail.
    with path.open("wb") as file, pq.ParquetWriter(file, SCHEMA, store_schema=False, **options) as writer:
        rows = iter(rows)
        while group := list(islice(rows, GROUP_ROWS)):
            columns = zip(zip(*group, strict=True), SCHEMA.types, strict=True)
            table = pa.Table.from_arrays([pa.array(values, kind) for values, kind in columns], schema=SCHEMA)
            writer.write_table(table, row_group_size=GROUP_ROWS)
            count += len(group)
    return count


def _checked(rows: Iterator[Row], digests: "array[int]") -> Iterator[Row]:
    """Rows that can be written down; the digests of their keys are added to `digests`, 8 bytes a row."""
    for row in rows:
        try:
            digests.append(_digest(row.key))
            row.path.encode()
        except UnicodeEncodeError as err:
            raise UsageError(f"the name {row.key!r} is not UTF-8; rename the file") from err
        if not NO_LABEL <= row.label <= MAX_LABEL:
            raise UsageError(f"row {row.key!r} has label {row.label}, expected 0 to {MAX_LABEL} or {NO_LABEL} for none")
        yield row


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _require_unique(rows: Callable[[], Iterator[Row]], digests: "array[int]") -> None:
    """Refuse a key that appears twice. Equal digests only raise a suspicion: then the keys are read again."""
    ordered = np.frombuffer(digests, np.uint64)
    ordered.sort()
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen = set[str]()
    for row in rows() if suspects else ():
        if row.key in seen:
            where = f", again in {row.path}" if row.path else ""
            raise UsageError(
                f"key {row.key!r} appears twice in the source{where}; expected unique keys: rename or remove one"
            )
        if _digest(row.key) in suspects:
            seen.add(row.key)


class Index:
    """Rows by number. One row group is kept in memory at a time, so one Index belongs to one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._reading():
            self._file = pq.ParquetFile(path)
            same = self._file.schema_arrow.equals(SCHEMA)
        if not same:
            raise UsageError(f"index {path} has other columns than {', '.join(SCHEMA.names)}; plan again")
        meta = self._file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._group = -1
        self._table: pa.Table | None = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, UnicodeDecodeError) as err:
            line = " ".join(str(err).split())[:200]
            raise UsageError(
                f"index {self._path} is not readable ({line}); expected a Parquet file: plan again"
            ) from err

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Sequence[int]) -> list[Row]:
        """The rows with these numbers, in the order asked. IndexError where there is no such row."""
        numbers = np.asarray(rows, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of an index of {len(self)}")
        groups = np.searchsorted(self._starts, numbers, side="right") - 1
        taken: dict[int, Row] = {}
        for group in np.unique(groups):
            chosen = numbers[groups == group]
            table = self._read(int(group)).take(pa.array(chosen - self._starts[group]))
            with self._reading():
                columns = [column.to_pylist() for column in table.columns]
            taken.update(zip(chosen.tolist(), map(Row, *columns), strict=True))
        return [taken[number] for number in numbers.tolist()]

    def _read(self, group: int) -> pa.Table:
        if group != self._group:
            with self._reading():
                self._group, self._table = group, self._file.read_row_group(group)
        return self._table

    def label_counts(self) -> dict[int, int]:
        """Rows per label, ascending; NO_LABEL counts the rows without one."""
        counts = Counter[int]()
        with self._reading():
            for batch in self._file.iter_batches(columns=["label"]):
                counts.update(batch.column(0).to_pylist())
        return dict(sorted(counts.items()))

    def captioned(self) -> int:
        """How many rows have a caption."""
        with self._reading():
            columns = (batch.column(0) for batch in self._file.iter_batches(columns=["caption"]))
            return sum(int(pc.sum(pc.not_equal(column, "")).as_py()) for column in columns)


def permute(secret: bytes, n: int, position: int) -> int:
    """The row at one position of the secret's order over range(n). See `permuted`."""
    return int(permuted(secret, n, [position])[0])


def permuted(secret: bytes, n: int, positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows at these positions of the secret's order over range(n), shape (len(positions),).

    A bijection of range(n), found without a table of n: the generalized Feistel cipher over Z_a x Z_b with
    ab >= n, and cycle walking (encipher again while the value is not in range(n)) to come from ab down to n. Black &
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 3 and 2. IndexError where a position is not
    in range(n).
    """
    values = np.asarray(positions, np.int64).copy()
    if values.size and not 0 <= values.min() <= values.max() < n:
        raise IndexError(f"positions {values.min()} to {values.max()} of an order over {n} rows")
    a = math.isqrt(max(n - 1, 0)) + 1
    b = -(-n // a)
    key = derive(secret, "order")
    walking = np.arange(len(values))
    while walking.size:
        values[walking] = _feistel(key, a, b, values[walking])
        walking = walking[values[walking] >= n]
    return values


def _feistel(key: bytes, a: int, b: int, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """One encipherment of values in range(ab)."""
    left, right = values % a, values // a
    for turn in range(ROUNDS):
        left, right = right, (left + _round(key, turn, right)) % (b if turn % 2 else a)
    return left + a * right


def _round(key: bytes, turn: int, half: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keyed hash of each value, below 2**62; each distinct half is hashed once."""
    distinct, where = np.unique(half, return_inverse=True)
    texts = (bytes([turn]) + value.to_bytes(8, "big") for value in distinct.tolist())
    digests = b"".join(hashlib.blake2b(text, key=key, digest_size=8).digest() for text in texts)
    return (np.frombuffer(digests, ">u8") >> 2).astype(np.int64)[where]
