"""The row index and the keyed order."""

import time
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boomgen import index
from boomgen.errors import UsageError
from boomgen.index import Index, build, permute, permuted
from boomgen.sources.base import NO_LABEL, Row

SECRET, OTHER = b"a" * 32, b"b" * 32


class Listed:
    """A source whose rows are given."""

    kind, split, classes = "listed", "train", ()

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def rows(self) -> Iterator[Row]:
        return iter(self._rows)

    def read(self, row: Row) -> bytes:
        raise NotImplementedError


def rows_of(count: int) -> list[Row]:
    return [Row(f"é/{i}.png", f"part-{i % 3}.tar", i * 2**33, i + 7, i % 5 - 1) for i in range(count)]


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(index, "GROUP_ROWS", 10)


@pytest.fixture
def built(tmp_path, small_groups):
    build(Listed(rows_of(57)), tmp_path / "index.parquet")
    return tmp_path / "index.parquet"


def test_rows_come_back_in_the_order_asked(built):
    rows, asked = rows_of(57), [56, 0, 31, 31, 9, 10, 11]
    opened = Index(built)
    assert len(opened) == 57
    assert opened.take(asked) == [rows[i] for i in asked]
    assert opened.take(range(57)) == rows
    assert opened.take([]) == []
    assert all(type(value) in (str, int) for value in opened.take([3])[0])


def test_take_decodes_only_the_row_groups_needed(built, monkeypatch):
    opened, read = Index(built), []
    real = opened._file.read_row_group
    monkeypatch.setattr(opened, "_file", type("F", (), {"read_row_group": lambda _, g: read.append(g) or real(g)})())
    opened.take([41, 3, 49, 5])
    opened.take([44])
    assert read == [0, 4]


@pytest.mark.parametrize("bad", [[57], [-1], [0, 100]])
def test_a_row_that_is_not_there(built, bad):
    with pytest.raises(IndexError, match="index of 57"):
        Index(built).take(bad)


def test_label_counts_stream_over_groups(built):
    assert Index(built).label_counts() == {-1: 12, 0: 12, 1: 11, 2: 11, 3: 11}


def test_limit_takes_the_first_rows(tmp_path):
    assert build(Listed(rows_of(57)), tmp_path / "i", limit=8) == 8
    assert Index(tmp_path / "i").take(range(8)) == rows_of(8)
    assert build(Listed(rows_of(5)), tmp_path / "i", limit=8) == 5


def test_the_same_rows_give_the_same_bytes_without_pandas_metadata(tmp_path, small_groups):
    for name in ("one", "two"):
        build(Listed(rows_of(57)), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    meta = pq.read_metadata(tmp_path / "one")
    assert meta.metadata is None
    assert meta.row_group(0).column(0).compression == "ZSTD"
    assert [meta.row_group(g).num_rows for g in range(meta.num_row_groups)] == [10] * 5 + [7]


def test_row_groups_hold_65536_rows(tmp_path):
    build(Listed(Row(str(i), "", i, -1) for i in range(65_537)), tmp_path / "i")
    meta = pq.read_metadata(tmp_path / "i")
    assert [meta.row_group(g).num_rows for g in range(meta.num_row_groups)] == [65_536, 1]
    assert Index(tmp_path / "i").take([65_536]) == [Row("65536", "", 65_536, -1, NO_LABEL)]


@pytest.mark.parametrize(
    ("rows", "limit", "message"),
    [
        ([], None, "has no images; expected at least one"),
        (rows_of(3), 0, "a limit of 0 rows, expected at least 1"),
        ([*rows_of(3), rows_of(2)[1]], None, "key 'é/1.png' appears twice"),
        ([Row("a", "", 0, 1, 2**31)], None, "row 'a' has label 2147483648, expected 0 to 2147483647"),
        ([Row("a", "", 0, 1, -2)], None, "row 'a' has label -2"),
        ([Row("a\udcff", "", 0, 1)], None, "is not UTF-8; rename"),
    ],
)
def test_what_cannot_be_indexed_is_one_line_and_leaves_no_file(tmp_path, rows, limit, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(Listed(rows), tmp_path / "i", limit)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_is_missing_or_broken(tmp_path):
    (tmp_path / "broken").write_bytes(b"PAR1")
    for name in ("broken", "missing"):
        with pytest.raises(UsageError, match=r"is not readable.*plan again") as caught:
            Index(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 16, 17, 1000, 65_535, 65_536, 65_537])
def test_the_order_is_a_bijection(n):
    assert np.array_equal(np.sort(permuted(SECRET, n, range(n))), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.binary(min_size=32, max_size=32))
def test_the_order_is_a_bijection_for_any_size_and_secret(n, secret):
    assert sorted(permuted(secret, n, range(n)).tolist()) == list(range(n))


def test_one_position_alone_is_the_same_as_among_others():
    order = permuted(SECRET, 1000, [5, 5, 999, 0])
    assert order.tolist() == [permute(SECRET, 1000, p) for p in (5, 5, 999, 0)]


def test_the_order_is_pinned():
    assert permuted(bytes(32), 1000, range(8)).tolist() == [621, 375, 794, 179, 473, 644, 443, 483]


def test_the_order_looks_random():
    n = 20_000
    order = permuted(SECRET, n, range(n))
    bound = 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < bound
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < bound
    assert abs(np.corrcoef(order, permuted(OTHER, n, range(n)))[0, 1]) < bound
    assert np.sum(order == np.arange(n)) < 10  # fixed points are Poisson(1)
    counts, _ = np.histogram(order[:2000], bins=20, range=(0, n))
    assert np.sum((counts - 100) ** 2 / 100) < 50  # chi-squared, 19 degrees of freedom


def test_the_place_of_a_row_is_uniform_over_secrets():
    n, draws = 7, 2100
    counts = np.bincount([permute(i.to_bytes(32, "big"), n, 3) for i in range(draws)], minlength=n)
    assert np.sum((counts - draws / n) ** 2 / (draws / n)) < 25  # chi-squared, 6 degrees of freedom


def test_ten_thousand_positions_take_well_under_a_second():
    start = time.perf_counter()
    permuted(SECRET, 100_000_000, range(10_000))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("n", "position"), [(1, 1), (10, -1), (0, 0)])
def test_a_position_outside_the_order(n, position):
    with pytest.raises(IndexError, match=f"an order over {n} rows"):
        permute(SECRET, n, position)
