"""Every reader on damaged input: it reads or refuses in one line, ends, and writes nothing outside.

`make test` tries some thousands for each reader, `make slow` ten times as many.
"""

import gzip
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from boomgen import images, manifest
from boomgen.errors import BoomgenError, RowError
from boomgen.index import Index
from boomgen.options import job_and_launch, read_job_file
from boomgen.plan import describe, read_plan
from boomgen.run import RunDir
from boomgen.shard import DONE, PART, sealed
from boomgen.sources import open_source

from .conftest import PlanTiny, Tell, write_idx
from .finished import finish
from .source_checks import picture
from .test_sources_cifar import batch

Reader = Callable[[bytes], Any]
SECONDS = 30  # an input that takes longer hangs
SOME = pytest.param(1000, id="some")
MANY = pytest.param(26_000, id="many", marks=pytest.mark.slow)
often = pytest.mark.parametrize("count", [SOME, MANY])


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good file, changed in one to four places; now and then bytes from nowhere."""
    data = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 49)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["byte", "number", "cut", "drop", "repeat", "insert", "splice"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":  # sizes, counts and offsets that lie
                number = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63]))
                width = draw(st.sampled_from([1, 2, 4, 8]))
                data[at : at + width] = (number % 256**width).to_bytes(width, draw(st.sampled_from(["big", "little"])))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 8))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[at:] = other[draw(st.integers(0, len(other) - 1)) :]
    return bytes(data)


written: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.system", "os.exec"):
        written.append(str(args[0]))
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        written.append(event)


sys.addaudithook(_watch)


@contextmanager
def ends() -> Iterator[None]:
    def hangs(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, inputs: Any, read: Reader, home: Path, count: int, tell: Tell) -> None:
    """Feed `count` inputs to a reader of a file's content: damaged ones of these seeds, or of that strategy."""
    if isinstance(inputs, list):
        for seed in inputs:
            read(seed)
        inputs = damaged(inputs)
    found = Counter[str]()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count == SOME.values[0],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def each(data: bytes) -> None:
        written.clear()
        try:
            with ends():
                read(data)
            said = ""
        except (BoomgenError, RowError) as err:
            said = str(err)
        assert "\n" not in said
        found["refused" if said else "read"] += 1
        outside = [path for path in written if not Path(path).is_relative_to(home)]
        assert outside == []

    each()
    tell(f"{name}: {found.total()} inputs, {found['read']} read, {found['refused']} refused")
    assert found.total() >= count * 0.9
    assert found["read"]
    assert found["refused"]


def listing(home: Path, name: str, split: str | None = None) -> Reader:
    """Opens a source whose file `name` has this content, lists and reads it."""

    def read(data: bytes) -> None:
        (home / name).write_bytes(data)
        source = open_source(str(home), split)
        for row in itertools.islice(source.rows(), 20):
            source.read(row)

    return read


@often
def test_tars(count: int, tmp_path: Path, tell: Tell) -> None:
    def tar(kind: int) -> bytes:
        out = io.BytesIO()
        members = {"a" * 120 + ".png": picture(1), "b.png": picture(2), "b.cls": b"7", "c.jpg": b"x", "c.json": b"{}"}
        with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"mtime": "1.5", "size": str(len(data))}
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()

    seeds = [tar(kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    fuzz("tar", seeds, listing(tmp_path, "set.tar"), tmp_path, count, tell)


@often
def test_images(count: int, tmp_path: Path, tell: Tell) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for kind, mode, more in [
        ("png", "RGB", {"exif": exif}),
        ("png", "P", {}),
        ("png", "I;16", {}),
        ("jpeg", "RGB", {"exif": exif}),
        ("jpeg", "CMYK", {}),
        ("webp", "RGBA", {"exif": exif}),
        ("gif", "P", {"save_all": True, "append_images": [image.convert("P")]}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("bmp", "RGB", {}),
        ("ppm", "RGB", {}),
        ("jpeg2000", "RGB", {}),
        ("ico", "RGB", {}),
    ]:
        out = io.BytesIO()
        source = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
        source.save(out, kind, **more)
        seeds.append(out.getvalue())
    fuzz("image", seeds, lambda data: images.fit(images.decode(data, 3), 8, "crop"), tmp_path, count, tell)


@often
def test_idx_files(count: int, tmp_path: Path, tell: Tell) -> None:
    write_idx(tmp_path, np.zeros((3, 4, 5), np.uint8), np.arange(3))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    path.unlink()
    plain = gzip.decompress(packed)

    def read(data: bytes) -> None:
        name = path.name if data[:1] == b"\x1f" else path.stem
        try:
            listing(tmp_path, name)(data)
        finally:
            (tmp_path / name).unlink()

    fuzz("IDX", [plain, packed], read, tmp_path, count, tell)


@often
def test_cifar_files(count: int, tmp_path: Path, tell: Tell) -> None:
    resaved = pickle.dumps({"labels": [0, 1], "data": np.zeros((2, 3072), np.uint8)})
    fuzz("CIFAR", [batch(), resaved], listing(tmp_path, "test_batch", "test"), tmp_path, count, tell)


@often
def test_jobs(count: int, tmp_path: Path, tell: Tell) -> None:
    seeds = [
        b"mode: augment\ndataset: fashion-sample\nt_boom: 0.4\nsteps: 10\nvariants: 2\neta: 0.5\ncompile: yes\n",
        b"{mode: anonymize, dataset: 'a/b', t-boom: 40/100, linkage: none, limit: 3, workers: 2, allow_mixed: true}",
    ]
    path = tmp_path / "job.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        job_and_launch(read_job_file(path))

    fuzz("YAML job", seeds, read, tmp_path, count, tell)


@pytest.fixture(scope="module")
def closed(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("closed") / "run", shard_size=64))


@pytest.fixture
def run(closed: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(closed.path, tmp_path / "run"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["..", "/", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def altered(record: Any) -> st.SearchStrategy[bytes]:
    """The record with one value replaced, and sealed again by whoever did it."""
    places = list(_places(record))

    def with_value(place: tuple[Any, ...], value: Any) -> bytes:
        changed = json.loads(json.dumps(record))
        inner = changed
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        return sealed(changed)

    return st.builds(with_value, st.sampled_from(places), VALUES)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*place, name)
        yield from _places(inner, (*place, name))


@often
def test_plans(run: RunDir, count: int, tell: Tell) -> None:
    path = run.path / "plan.json"
    good = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        plan = read_plan(path)
        describe(plan)
        assert plan.positions(0)

    fuzz("plan", [good], read, run.path, count // 2, tell)
    fuzz("plan, sealed again", altered(json.loads(good)), read, run.path, count // 2, tell)


@often
def test_done_records(run: RunDir, count: int, tell: Tell) -> None:
    path = run.shard(0) / DONE
    good = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        RunDir(run.path).status()

    fuzz("done record", [good], read, run.path, count // 2, tell)
    fuzz("done record, sealed again", altered(json.loads(good)), read, run.path, count // 2, tell)


@often
def test_indexes(run: RunDir, count: int, tell: Tell) -> None:
    path = run.path / "index.parquet"
    good = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        index = Index(path)
        index.take(range(min(len(index), 20)))
        index.label_counts()

    fuzz("index", [good], read, run.path, count, tell)


@often
def test_manifests(run: RunDir, count: int, tell: Tell) -> None:
    path = run.manifest / "part-00000.parquet"
    good = path.read_bytes()
    path.unlink()  # it is the shard's own file

    def read(data: bytes) -> None:
        path.write_bytes(data)
        manifest.read(run.manifest)

    fuzz("manifest", [good, (run.shard(1) / PART).read_bytes()], read, run.path, count, tell)
