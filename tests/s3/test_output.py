"""Runs whose outputs go to an object store: the bytes of a run on disk, through faults and kills, and loaders."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from webdataset.gopen import gopen_schemes

from boomgen import manifest, places, store
from boomgen.cli import main
from boomgen.engines import ranks
from boomgen.engines.ranks import Rank
from boomgen.errors import BoomgenError, Stopped, UsageError
from boomgen.finalise import dataset_files, dataset_names, finalise
from boomgen.run import RunDir
from boomgen.shard import sealed
from boomgen.store import FAILPOINTS, Bucket
from boomgen.verify import remake, verify
from boomgen.worker import Worker

from ..finished import finish, grey, make_shards, pixel_hash, write_portraits
from ..scanner import leaks
from ..test_bytes import AUGMENT, LONG
from ..test_privacy import needles
from .conftest import PlanAway
from .server import S3

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of tries, without the waiting."""
    monkeypatch.setattr(places, "PAUSES", (0.01,) * len(places.PAUSES))
    monkeypatch.setitem(places.PATIENCE, "read_timeout", 2)


def held(folder: Any) -> dict[str, bytes]:
    """Every file below a folder or URL: name -> content."""
    paths = places.walk(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same(run: RunDir, here: RunDir) -> None:
    """Closed, sound, and byte for byte the run on disk; nothing else is in the store."""
    assert held(run.dataset) == held(here.dataset)
    assert held(run.manifest) == held(here.manifest)
    assert not list(verify(run))
    assert run.plan.store
    others = {name for name in held(run.dataset.parent) if not name.startswith("dataset/")}
    assert others == {"plan.sha256", *(f"shards/{n:05d}/done.json" for n in range(run.plan.shards))}


@pytest.mark.parametrize(
    "job",
    [
        pytest.param({}, id="anonymize"),
        pytest.param({"linkage": "none"}, id="none"),
        pytest.param(AUGMENT, id="augment"),
    ],
)
def test_a_run_in_a_store_is_the_run_on_disk(
    s3: S3, plan_away: PlanAway, tmp_path: Path, job: Any, capsys: Any
) -> None:
    """Data set and manifest, byte for byte; closing it again changes nothing; rows are made again from it."""
    url = f"{'memory://bucket' if job is AUGMENT else s3.url}/a run[1]?"  # means something to patterns
    run = finish(plan_away(url, **job))
    same(run, finish(RunDir(tmp_path / "here")))
    before = held(run.dataset.parent) | held(run.path)
    assert main(["finalise", str(run.path)]) == 0
    assert held(run.dataset.parent) | held(run.path) == before
    assert f"data set  {url}/dataset\n" in capsys.readouterr().out
    if job != {"linkage": "none"}:
        assert not list(remake(run, 3))


def test_nothing_in_the_store_tells_of_a_private_run_s_sources(s3: S3, plan_away: PlanAway, tmp_path: Path) -> None:
    """But for the plan's hash, by which a done record says where it belongs."""
    source = write_portraits(tmp_path / "saint_mary_hospital")
    run = finish(plan_away(f"{s3.url}/away", dataset=str(source)))
    s3.behind.get(s3.bucket, str(tmp_path / "copy"), recursive=True)
    found = leaks(tmp_path / "copy", needles(run))
    assert {needle for _, needle in found} == {bytes.fromhex(run.plan_sha256)}
    assert not [place for place, _ in found if "dataset/" in place]


# Kills, stops, faults ----------------------------------------------------------------------------------------------


KILLED = """
import os, sys
from boomgen.run import RunDir
from boomgen.worker import Worker
for number, moment in enumerate(sys.argv[2:]):
    if os.fork() == 0:
        os.environ["BOOMGEN_FAILPOINT"] = f"{moment}:{number}"
        Worker(RunDir(sys.argv[1])).make_shard(number)
        os._exit(9)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
"""Forks of a process that never had a connection: connections and forks do not go together."""


def test_killed_at_every_moment(s3: S3, plan_away: PlanAway, tmp_path: Path) -> None:
    """The shard is whole only once its record is put; whoever comes next makes the same. So do two that make one shard
    at the same time."""
    run = plan_away(f"{s3.url}/run")
    command = [sys.executable, "-c", KILLED, str(run.path), *FAILPOINTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(FAILPOINTS), done.stderr
    assert run.published() == {FAILPOINTS.index("record-put")}
    one, others = Worker(run), [Worker(RunDir(run.path))]
    one.make_shard(6, lambda rows: others and others.pop().make_shard(6) and None)
    for number in run.missing():
        one.make_shard(number)
    assert main(["finalise", str(run.path)]) == 0
    same(RunDir(run.path), finish(RunDir(tmp_path / "here")))


def test_a_rank_asks_for_no_shard_that_others_made_meanwhile(
    s3: S3, plan_away: PlanAway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But lists all once its own are made: a request for each shard by each rank would be millions."""
    run, make = plan_away(f"{s3.url}/run"), ranks.make_logged

    def while_others_make(worker: Worker, shard: int, *more: Any) -> None:
        if shard == 0:
            other = Worker(RunDir(run.path))
            for number in (1, 3, 5):
                other.make_shard(number)
            s3.asked.clear()
        make(worker, shard, *more)

    monkeypatch.setattr(ranks, "make_logged", while_others_make)
    ranks.work(run, range(7), Rank(0, 2, 0), "cpu")
    assert not run.missing()
    asked = {number: sum(f"/shards/{number:05d}/" in line for line in s3.asked) for number in range(7)}
    assert [number for number, times in asked.items() if times] == [0, 2, 4, 6]
    assert max(asked.values()) < 10


@pytest.mark.parametrize("answer", ["in full", "terse"])
def test_who_was_first_is_decided_by_the_store(
    s3: S3, plan_away: PlanAway, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """A shard's record and a place's claim are put on a condition: a look before would come too early. What the other
    placed here is its part alone, as where links have been destroyed since. Not every server says which condition
    failed."""
    if answer == "terse":
        s3.fault("terse", times=99, method="PUT")
    run = plan_away(f"{s3.url}/run")
    record, claim = (f"{s3.bucket}/run/{name}" for name in ("shards/00000/done.json", "plan.sha256"))
    others = sealed({"files": {name: {"sha256": "0" * 64} for name in ("manifest.parquet", "data.tar")}})

    def overtake(moment: str, shard: int) -> None:
        if moment == "tar-put":
            s3.behind.pipe_file(record, others)

    monkeypatch.setattr(store, "failpoint", overtake)
    Worker(run).make_shard(0)
    assert s3.behind.cat_file(record) == others
    assert list(run.shard(0).iterdir()) == []
    with pytest.raises(UsageError, match="/run holds another run; use another --out"):
        Bucket(f"{s3.url}/run", run.path).claim("0" * 64)
    assert s3.behind.cat_file(claim).decode().split() == [run.plan_sha256]


def test_a_shard_that_is_whole_is_not_put_again(s3: S3, plan_away: PlanAway, tmp_path: Path) -> None:
    """A straggler may end after the run was closed: its tar would stay for ever."""
    run = plan_away(f"{s3.url}/run")
    slow = Worker(RunDir(run.path))
    finish(run)
    s3.asked.clear()
    slow.make_shard(0)
    assert not [line for line in s3.asked if line.startswith("PUT")]
    same(run, finish(RunDir(tmp_path / "here")))


def test_of_two_that_close_a_run_one_is_late(
    s3: S3, plan_away: PlanAway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the other had begun, and finds nothing to copy."""
    run = make_shards(plan_away(f"{s3.url}/run"))
    late, find = RunDir(run.path).store, Bucket._find
    before = {part: find(late, part) for part in ("shards", "dataset")}  # type: ignore[arg-type]
    finalise(run)
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_find", lambda self, part: before[part])
        late.close(dataset_names(dataset_files(run)), {})
    same(run, finish(RunDir(tmp_path / "here")))


def test_resume_ends_a_finalise_that_was_stopped(
    s3: S3, plan_away: PlanAway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set is there; of the shards' own copies all but one still lie beside it."""
    run, removed = make_shards(plan_away(f"{s3.url}/run")), list[str]()
    remove = Bucket._remove

    def stop(store: Bucket, name: str) -> None:
        if removed:
            raise Stopped("SIGTERM")
        removed.append(name)
        remove(store, name)

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_remove", stop)
        with pytest.raises(Stopped):
            finalise(run)
    assert run.store.closed()
    assert main(["resume", str(run.path)]) == 0
    same(run, finish(RunDir(tmp_path / "here")))


FAULTS = [
    ("lost", "PUT", "plan.sha256"),
    ("503", "PUT", "shards/00000/"),  # the tar is the first to be put there
    ("cut", "PUT", "shards/00001/"),
    ("lost", "PUT", "shards/00002/"),
    ("500", "PUT", "00003/done.json"),
    ("cut", "PUT", "00004/done.json"),
    ("lost", "PUT", "00005/done.json"),
    ("hang", "PUT", "00006/done.json"),
    ("503", "GET", "list-type"),
    ("lost", "PUT", "dataset/data"),
    ("500", "PUT", "README.md"),
    ("lost", "DELETE", "shards/"),
]


def test_faults_that_pass_are_not_seen(s3: S3, plan_away: PlanAway, tmp_path: Path, tell: Any) -> None:
    """Each kind, twice in a row, at each kind of request; 'lost' is carried out and its answer is cut."""
    for kind, method, path in FAULTS:
        s3.fault(kind, 2, method, path)
    run = finish(plan_away(f"{s3.url}/run"))
    assert [fault.met for fault in s3.faults] == [2] * len(FAULTS)
    same(run, finish(RunDir(tmp_path / "here")))
    tell(f"object store: {sum(s3.met.values())} faults of {len(s3.met)} kinds injected and outlasted: {dict(s3.met)}")


def test_a_store_that_stays_away_stops_the_run_with_one_line(
    s3: S3, plan_away: PlanAway, tmp_path: Path, boomgen: Any
) -> None:
    """A worker of its own process is refused, one here asks five times; the run goes on when the store is back."""
    run = plan_away(f"{s3.url}/run", limit=32)
    record = f"{s3.url}/run/shards/00000/done.json"
    fault = s3.fault("403", 10**6, "PUT", "done.json")
    done = boomgen("resume", run.path, "--device", "cpu", "--workers", 1, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"boomgen: {record}: Access Denied; expected credentials that may use it, in AWS_PROFILE, AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY or ~/.aws (FSSPEC_S3_ANON=true for a public bucket); then go on with: "
        f"boomgen resume {run.path}"
    )
    assert "Traceback" not in done.stderr
    assert fault.met == 1
    fault.kind, fault.met = "503", 0
    with pytest.raises(BoomgenError) as stopped:
        Worker(run).make_shard(0)
    assert str(stopped.value) == (
        f"{record}: Please reduce your request rate; expected an answer: check network and AWS_ENDPOINT_URL, or wait; "
        f"then go on with: boomgen resume {run.path}"
    )
    assert fault.met == 5
    assert not list(run.staging.iterdir())
    s3.faults.clear()
    same(finish(run), finish(RunDir(tmp_path / "here")))


def test_one_worker_that_a_store_refuses_ends_no_run(s3: S3, plan_away: PlanAway, tmp_path: Path, boomgen: Any) -> None:
    """While another is in order, it is replaced. By the last shard both of two are there."""
    run = plan_away(f"{s3.url}/run", **LONG)
    fault = s3.fault("403", 1, "PUT", "00012/done.json")
    done = boomgen("resume", run.path, "--device", "cpu", "--workers", 2)
    assert fault.met == 1
    assert re.search(r"^shard 12: worker [01] gave up: s3://.*/done.json: Access Denied; expected", done.stderr, re.M)
    same(RunDir(run.path), finish(RunDir(tmp_path / "here")))


def test_damage_in_the_store_is_named(s3: S3, plan_away: PlanAway) -> None:
    """Though its server fails once; a lost record makes its shard missing."""
    run = finish(plan_away(f"{s3.url}/run", limit=32))
    root, tar = f"{s3.bucket}/run", "dataset/data/train-00001-of-00002.tar"
    data = bytearray(s3.behind.cat_file(f"{root}/{tar}"))
    data[700] ^= 1
    s3.behind.pipe_file(f"{root}/{tar}", bytes(data))
    s3.behind.pipe_file(f"{root}/dataset/odd", b"x")
    s3.behind.rm_file(f"{root}/shards/00000/done.json")
    s3.fault("cut", 1, "GET", "train-00001")
    away, resume = f"{s3.url}/run", f"boomgen resume {run.path}"
    assert list(verify(RunDir(run.path))) == [
        f"{away}/shards/00000 is missing; go on with: {resume}",
        f"{away}/{tar} differs from its done record; remove {away}/shards/00001 and go on with: {resume}",
        f"{away}/dataset/odd was not put there by boomgen; remove it",
    ]
    assert s3.met == {"cut": 1}


def test_following_the_words_heals(s3: S3, plan_away: PlanAway, tmp_path: Path) -> None:
    """A damaged or lost tar, text, card and note of a closed run: what `verify` says to do, until it says nothing."""
    run = finish(plan_away(f"{s3.url}/run", limit=32))
    here = finish(RunDir(tmp_path / "here"))
    away, there = f"{s3.url}/run", f"{s3.bucket}/run/dataset"
    shard, card = f"remove {away}/shards/00001 and go on with: boomgen resume {run.path}", f"{away}/dataset/README.md"
    again = f"remove {card} and finalise again"

    def damage(name: str) -> None:
        s3.behind.pipe_file(f"{there}/{name}", b"damaged")

    for harm, advice in (
        (lambda: damage("data/train-00001-of-00002.tar"), shard),
        (lambda: s3.behind.rm_file(f"{there}/data/train-00001-of-00002.tar"), shard),
        (lambda: damage("_info.json"), again),
        (lambda: s3.behind.rm_file(f"{there}/_info.json"), again),
        (lambda: damage("README.md"), again),
        (lambda: run.closing.write_bytes(b"damaged"), again),
    ):
        harm()
        (line,) = verify(RunDir(run.path))
        assert line.endswith(f"; {advice}")
        s3.behind.rm(f"{s3.bucket}/run/shards/00001" if advice == shard else f"{there}/README.md", recursive=True)
        same(finish(RunDir(run.path)), here)


def test_a_large_file_goes_up_in_parts_of_which_each_is_sent_again(s3: S3, tmp_path: Path) -> None:
    """Though two of its parts fail, and its connection hangs with nothing taken, it goes up once."""
    large, there = tmp_path / "large", places.place(f"{s3.url}/large")
    with large.open("wb") as file:
        file.truncate(101 * 2**20)
    for kind, part in (("503", 1), ("cut", 2)):
        s3.fault(kind, 2, "PUT", f"partNumber={part}")
    places.upload(places.bulk(there), large, there)
    assert s3.met == {"503": 2, "cut": 2}
    assert len([line for line in s3.asked if "uploads" in line]) == 1
    assert s3.behind.info(f"{s3.bucket}/large")["size"] == large.stat().st_size


def test_an_upload_of_which_nothing_is_taken_is_given_up(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No client notices: the server has not begun to answer, so nothing is late."""
    large, there = tmp_path / "large", places.place(f"{s3.url}/large")
    large.write_bytes(bytes(2**25))  # more than sockets hold
    monkeypatch.setattr(places, "START", 1.0)
    monkeypatch.setattr(places, "SLOWEST", 2**25)
    fault = s3.fault("stall", 1, "PUT")
    places.upload(places.bulk(there), large, there)
    assert fault.met == 1
    assert s3.behind.info(f"{s3.bucket}/large")["size"] == 2**25
    assert capsys.readouterr().err.endswith("; asking again in 0 s\n")


# What reads it -----------------------------------------------------------------------------------------------------


def test_loaders_read_it(s3: S3, plan_away: PlanAway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the docs' own lines."""
    run = finish(plan_away(f"{s3.url}/run"))
    expected = {row["key"]: row["pixel_sha256"] for row in manifest.read(run.manifest).to_pylist()}
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(gopen_schemes, "s3", None)
    (lines,) = re.findall(r"```python\n(.*?)```", (DOCS / "stores.md").read_text(), re.DOTALL)
    told: dict[str, Any] = {}
    exec(lines.replace("s3://bucket", s3.url).replace("00012", "00006").replace("00013", "00007"), told)
    for rows in (told["rows"], told["stream"].decode("pil")):
        assert {row["__key__"]: pixel_hash(grey(row["png"])[..., None]) for row in rows} == expected
