"""Data sets at URLs give what their copies on a disk give, whatever the server does meanwhile."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from fsspec import filesystem
from s3fs import S3FileSystem

from boomgen import places
from boomgen.cli import main
from boomgen.engines.ray import RayEngine
from boomgen.errors import UsageError
from boomgen.job import Job
from boomgen.prepare import resolve
from boomgen.run import RunDir
from boomgen.sources import Planned, open_source
from boomgen.worker import Worker

from ..conftest import Complaint, PlanTiny
from ..finished import finish, in_ranks, made
from ..source_checks import member, picture, refused, write_tar
from .server import S3

CARD = {"dataset_info": {"features": [{"name": "cls", "dtype": {"class_label": {"names": ["cat", "dog"]}}}]}}
HASTE = json.dumps({"config_kwargs": {"read_timeout": 1}})


def sample(key: str, label: int) -> list:
    texts = {"cls": str(label).encode(), "txt": f"image {key}".encode()}
    return [member(f"{key}.png", picture(label + 3)), *(member(f"{key}.{name}", text) for name, text in texts.items())]


def tars(root: Path) -> Path:
    for number in range(5):
        write_tar(root / f"set-train-{number}.tar", *sample(f"{number}/a", 0), *sample(f"{number}/b", number % 2))
    write_tar(root / "set-test-0.tar", *sample("t", 1))
    return root


def own_layout(root: Path) -> Path:
    (root / "data").mkdir()
    (root / "README.md").write_text(f"---\n{json.dumps(CARD)}\n---\n")
    write_tar(root / "data" / "train-00000.tar", *sample("a", 1), *sample("b", 0))
    return root


def one_tar(root: Path) -> Path:
    return write_tar(root / "one.tar", *sample("a", 1), *sample("ü b", 0))


def write(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value) if not name.endswith(".txt") else f"text {value}".encode())
    return root


def classes(root: Path) -> Path:
    names = ("a-b/1.png", "a/z.png", "a/x/2.PNG", "a/x.png", "ö#?/1 %20.png", "a/z.txt", ".hid/a.png", "none/b.txt")
    return write(root, *names)


def splits(root: Path) -> Path:
    return write(root, "train/cat/1.png", "train/dog/2.png", "val/cat/1.png", "docs/readme.txt")


def flat(root: Path) -> Path:
    return write(root, "b.png", "B.png", "c.png", "c.txt", "notes.md")


def thousands(root: Path) -> Path:
    return write(root, "01000/01000.png", "02000/02999.png")


LAYOUTS = (tars, own_layout, one_tar, classes, splits, flat, thousands)
Upload = Callable[[Path], str]


def copied(local: Path, fs: Any, base: str) -> str:
    """The URL of a copy of a folder, or of one file of it."""
    folder = local if local.is_dir() else local.parent
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fs.pipe_file(f"{base}/set/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{base}/set" if local.is_dir() else f"{base}/set/{local.name}"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Upload]:
    yield lambda local: copied(local, filesystem("memory"), f"memory://{tmp_path.name}")
    filesystem("memory").store.clear()


@pytest.fixture
def upload(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Upload:
    monkeypatch.setattr(places, "PAUSES", (0.01,) * 4)
    return lambda local: copied(local, s3.behind, s3.url)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_url_gives_what_its_copy_on_disk_gives(tmp_path: Path, memory: Upload, layout: Callable) -> None:
    local = layout(tmp_path)
    check_same(local, memory(local))


@pytest.mark.parametrize("layout", [tars, classes])
def test_s3_gives_what_its_copy_on_disk_gives(tmp_path: Path, upload: Upload, layout: Callable) -> None:
    local = layout(tmp_path)
    check_same(local, upload(local))


def check_same(local: Path, url: str) -> None:
    for split in (None, "val") if (local / "val").exists() else (None,):
        here, there = (open_source(str(place), split, captions=True) for place in (local, url))
        rows = list(here.rows())
        assert list(there.rows()) == rows
        for name in ("kind", "split", "classes", "passed_over"):
            assert getattr(there, name) == getattr(here, name)
        planned = Planned(url, there.split)
        assert [planned.read(row) for row in rows] == [there.read(row) for row in rows] == [*map(here.read, rows)]


def test_a_run_is_the_same_whatever_the_server_does_meanwhile(
    tmp_path: Path, s3: S3, upload: Upload, plan_tiny: PlanTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned here, made by a worker process; requests of both fail in every way that passes."""
    monkeypatch.setenv("FSSPEC_S3", HASTE)
    monkeypatch.setenv("GITHUB_TOKEN", "of another trade")
    (tmp_path / "set").mkdir()
    url = upload(tars(tmp_path / "set"))
    s3.fault("503", times=2, path="list-type")
    s3.fault("cut", method="GET", path="set-train-1.tar")
    run = plan_tiny(tmp_path / "run", dataset=url)
    assert (run.plan.source.location, s3.met) == (url, {"503": 2, "cut": 1})
    told = RayEngine(run, "cpu", 1).environ
    assert told.items() >= (s3.environ | {"FSSPEC_S3": HASTE}).items()
    assert "GITHUB_TOKEN" not in told
    kinds = ("500", "503", "cut", "hang", "lost")
    faults = [s3.fault(kind, path=f"train-{number}") for number, kind in enumerate(kinds)]
    s3.asked.clear()
    assert main(["resume", str(run.path), "--workers", "1"]) == 0
    assert [fault.met for fault in faults] == [1] * 5
    assert len([line for line in s3.asked if line.startswith("GET")]) == len(s3.asked) == 10 + 5
    local = finish(plan_tiny(tmp_path / "local", dataset=str(tmp_path / "set")))
    assert made(RunDir(run.path)) == made(local)


@pytest.mark.parametrize("name", ["FSSPEC_S3", "FSSPEC_S3A"])
def test_the_users_own_limits_win(s3: S3, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of a client of either name; what they leave open stays at one try a request."""
    places.place(s3.url)  # before the user's are known, as in a worker
    monkeypatch.setenv(name, HASTE)
    for url in (s3.url, s3.url.replace("s3:", "s3a:")):
        assert places.files(places.place(url)).config_kwargs == places.PATIENCE | json.loads(HASTE)["config_kwargs"]


def test_reading_an_object_is_one_request_also_after_a_fork(tmp_path: Path, s3: S3, upload: Upload) -> None:
    url = upload(own_layout(tmp_path))
    source = open_source(url)
    rows = list(source.rows())
    s3.asked.clear()
    images = [source.read(row) for row in rows]
    assert [line.partition(" ")[0] for line in s3.asked] == ["GET"] * 2
    assert in_ranks(lambda: [source.read(row) for row in rows]) == [images] * 2


def test_objects_that_changed_are_noticed(tmp_path: Path, s3: S3, upload: Upload) -> None:
    url = upload(flat(tmp_path))
    source = open_source(url)
    small, grown, gone = source.rows()
    s3.behind.pipe_file(f"{url}/{small.path}", b"")
    s3.behind.pipe_file(f"{url}/{grown.path}", b"0" * (grown.size + 1))
    s3.behind.rm_file(f"{url}/{gone.path}")
    for row, said in ((small, "has 0 bytes, it had"), (grown, "has more bytes, it had"), (gone, "c.png|not exist")):
        with pytest.raises(OSError, match=said):
            source.read(row)
    tar = upload(one_tar(tmp_path))
    (first, _) = (source := open_source(tar)).rows()
    s3.behind.pipe_file(tar, b"0" * first.offset)
    with pytest.raises(OSError, match=f"ends inside a: 0 of {first.size} bytes"):
        source.read(first)


def test_a_damaged_tar_is_told_from_a_server_that_fails(tmp_path: Path, s3: S3, upload: Upload) -> None:
    url = upload(one_tar(tmp_path))
    fault = s3.fault("500", times=99, method="GET", path="one.tar")
    with pytest.raises(places.StorageError, match=r"one\.tar: We encountered .*again; expec"):
        list(open_source(url).rows())
    assert fault.met == 5
    s3.faults.clear()
    s3.behind.pipe_file(url, (tmp_path / "one.tar").read_bytes()[:700])
    assert refused(url) == f"{url}: unexpected end of data; expected a whole, uncompressed tar: fetch or write it again"


ALL = "expected WebDataset tars or image files, which are all that is read from URLs: copy other kinds here and give"


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("s3://AKIA1:hush/hush@bucket/x", "a URL s3:// with a user, password or key in it"),
        ("s3://bucket/x?X-Amz-Signature=hush", "a URL s3:// with a user, password or key in it"),
        ("s4://bucket/x", "s4://bucket/x: Unsupported filesystem: 's4'; expected a path, or a URL that fsspec knows"),
        ("s3://", "s3:// names no place; expected as much as s3://bucket/folder"),
        ("gs://bucket/x", "gs://bucket/x: Please install gcsfs to access Google Storage; install it beside boomgen"),
        ("memory://none", f"memory://none does not exist; {ALL} the folder"),
        ("s3://no-such-bucket/x", f"s3://no-such-bucket/x does not exist; {ALL} the folder"),
    ],
)
def test_urls_that_lead_nowhere(complaint: Complaint, s3: S3, tiny_model: Path, location: str, said: str) -> None:
    line = complaint("augment", "--dataset", location, "--model", tiny_model, "--t-boom", "0.4", "--out", "run")
    assert line.startswith(said)
    assert "hush" not in line


@pytest.mark.parametrize("name", ["a/train-0.parquet", "x.npz", "ILSVRC/a.png", "state.json", "t10k-images-idx3-ubyte"])
def test_kinds_that_are_read_from_disks_only(tmp_path: Path, memory: Upload, name: str) -> None:
    url = memory(write(tmp_path, name))
    assert refused(url) == f"{url} holds {name.partition('/')[0]}; {ALL} the folder"


def test_named_data_sets_may_lie_at_urls(tmp_path: Path, memory: Upload) -> None:
    url = memory(classes(tmp_path))
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\ninner: [none/here, a]\ndata_dir: {url}\n")
    ask = {"mode": "augment", "model": "m", "t_boom": "0.4"}
    assert resolve(Job(dataset=str(own), **ask)).location == f"{url}/a"
    named = resolve(Job(dataset="celeba-hq", data_dir=f"{url}/", **ask))
    assert (named.location, named.job.data_dir) == (url, url)
    with pytest.raises(UsageError, match=f"--data-dir {url}/no does not exist; expected the folder of celeba-hq"):
        resolve(Job(dataset="celeba-hq", data_dir=f"{url}/no", **ask))


def test_servers_that_refuse_or_are_not_there(
    tmp_path: Path, complaint: Complaint, s3: S3, upload: Upload, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(flat(tmp_path))
    ask = ("augment", "--dataset", url, "--model", tiny_model, "--t-boom", "0.4", "--out", "run")
    own = "expected credentials that may use it, in AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws"
    monkeypatch.setattr(places, "PAUSES", ())
    s3.fault("403", times=99)
    assert complaint(*ask, code=1).startswith(f"{url}: Access Denied; {own}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    assert complaint(*ask, code=1).startswith(f"{url}: Unable to locate credentials; {own}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    said = complaint(*ask, code=1)
    assert said.startswith(f"{url}: Could not connect to the endpoint URL")
    assert said.endswith(
        "expected an answer: check network and AWS_ENDPOINT_URL, or wait; mend that and give the same command again"
    )
    S3FileSystem.clear_instance_cache()


def test_images_are_asked_for_side_by_side(
    tmp_path: Path, memory: Upload, plan_tiny: PlanTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read here waits for another one to begin."""
    (tmp_path / "set").mkdir()
    worker = Worker(plan_tiny(tmp_path / "run", dataset=memory(tars(tmp_path / "set"))))
    meeting, read = Barrier(2, timeout=20), worker.source.read
    monkeypatch.setattr(worker.source, "read", lambda row: (meeting.wait(), read(row))[1])
    rows = worker.batches(0)[0]
    assert [loaded.row for loaded in worker.load(rows)] == rows
    assert not meeting.broken
