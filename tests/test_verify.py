"""`verify` names every damaged file, `--remake` every row that the plan does not make; a damaged plan is one line."""

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boomgen.cli import main
from boomgen.finalise import finalise
from boomgen.run import RunDir
from boomgen.shard import DONE, PART, TAR, sealed, sha256_file, unseal
from boomgen.verify import remake, verify

from .conftest import PlanTiny, Tell
from .finished import finish, make_shards, nan_model

FLIPS = 20
Check = Callable[..., list[str]]


@pytest.fixture(scope="module")
def closed(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed run of three shards."""
    return finish(plan_tiny(tmp_path_factory.mktemp("verify") / "run", limit=40)).path


@pytest.fixture
def run(closed: Path, tmp_path: Path) -> RunDir:
    """A copy of it to damage, its hard links copied as hard links."""
    copy = tmp_path / "run"
    shutil.copytree(closed, copy)
    for path in closed.rglob("*"):
        twin = next(
            (other for other in (closed / "shards").rglob("*") if path.is_file() and other.samefile(path)), path
        )
        if twin != path:
            (copy / path.relative_to(closed)).unlink()
            (copy / path.relative_to(closed)).hardlink_to(copy / twin.relative_to(closed))
    return RunDir(copy)


@pytest.fixture
def faults(capsys: pytest.CaptureFixture[str]) -> Check:
    """The lines that `boomgen verify` prints, after checking its exit code."""

    def check(run: Path, *more: str) -> list[str]:
        code = main(["verify", str(run), *more])
        captured = capsys.readouterr()
        lines = captured.out.splitlines() or captured.err.splitlines()  # torch may warn beside a result
        assert not any("Traceback" in line or "a fault of boomgen" in line for line in lines)
        sound = len(lines) == 1 and " is sound: " in lines[0]
        assert code == (0 if sound else 1), lines
        return [] if sound else lines

    return check


def flips(data: bytes, count: int = FLIPS) -> list[bytes]:
    """The data with one byte changed: the first, the last, and random ones between."""
    chance = random.Random(len(data))
    places = {0, len(data) - 1} | set(chance.sample(range(1, len(data) - 1), count - 2))
    return [data[:i] + bytes([data[i] ^ chance.randrange(1, 256)]) + data[i + 1 :] for i in sorted(places)]


@pytest.mark.parametrize("linked", [True, False])
def test_every_flip_is_named(run: RunDir, faults: Check, linked: bool, tell: Tell) -> None:
    """One byte changed anywhere in any file of a closed run: exit code 1 and a line with that file's path. Of files
    that are one on the disk, the shard's is named; where they are copies, the very one."""
    assert faults(run.path) == []
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    if not linked:
        files = [path for path in files if path.stat().st_nlink > 1 and run.shards not in path.parents]
        for path in files:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        assert len(files) == 2 * run.plan.shards
        assert faults(run.path) == []
    kinds = [re.sub(r"[\d-]+(of-\d+)?", "N", path.relative_to(run.path).as_posix()) for path in files]
    count = 0
    for path, kind in zip(files, kinds, strict=True):
        names = [str(other) for other in run.path.rglob("*") if other.is_file() and other.samefile(path)]
        sound = path.read_bytes()
        for damaged in flips(sound, 2 + FLIPS // kinds.count(kind)):
            path.write_bytes(damaged)
            lines = faults(run.path)
            assert any(name in line for name in names for line in lines), (path, lines)
            count += 1
        path.write_bytes(sound)
    assert faults(run.path) == []
    if linked:
        assert set(kinds) == {
            *("plan.json", "index.parquet", "secret", "dataset/README.md", "dataset/_info.json"),
            "dataset.json",
            *("shards/N/data.tar", "shards/N/manifest.parquet", "shards/N/done.json"),
            *("dataset/data/trainN.tar", "manifest/partN.parquet"),
        }
    tell(f"{count} flips in {len(files)} files of {len(set(kinds))} kinds, each named")


def test_missing_files_are_named(run: RunDir, faults: Check) -> None:
    """Any one file removed: exit code 1 and a line with its path; a run folder without a plan is no run folder."""
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.unlink()
        if path.name == "plan.json":
            assert main(["verify", str(run.path)]) == 2
        else:
            assert any(str(path) in line for line in faults(run.path)), path
        path.write_bytes(data)
    assert faults(run.path) == []


def test_extra_files_are_named(run: RunDir, faults: Check) -> None:
    """A file that boomgen did not put into a shard, the data set or the manifest is named: loaders would read it."""
    for place in (
        "shards/00001/x",
        "dataset/data/train-00009-of-00009.tar",
        "manifest/part-00009.parquet",
        "dataset/.x",
    ):
        (run.path / place).write_bytes(b"x")
        assert [str(run.path / place) in line for line in faults(run.path)] == [True]
        (run.path / place).unlink()
    assert faults(run.path) == []


def test_swapped_shards_are_named(run: RunDir, faults: Check, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """A shard in another's place, or from a run of another secret, is sound in itself and named all the same."""
    kept = tmp_path / "kept"
    run.shard(2).rename(kept)
    shutil.copytree(run.shard(1), run.shard(2))
    (line, *_) = faults(run.path)
    again = f"remove {run.shard(2)} and go on with: boomgen resume {run.path}"
    assert line == f"{run.shard(2) / DONE} is of shard 1, or of another plan; {again}"
    shutil.rmtree(run.shard(2))
    other = make_shards(plan_tiny(tmp_path / "other", limit=40, eta=0.5))
    shutil.copytree(other.shard(2), run.shard(2))
    (line, *_) = faults(run.path)
    assert line == f"{run.shard(2) / DONE} is of shard 2, or of another plan; {again}"
    shutil.rmtree(run.shard(2))
    (line, *_) = faults(run.path)
    assert line == f"{run.shard(2)} is missing; go on with: boomgen resume {run.path}"
    kept.rename(run.shard(2))
    assert faults(run.path) == []


def test_following_the_words_heals(run: RunDir, faults: Check) -> None:
    """Doing what the lines say (remove the shard, make it again, remove the data set, finalise) ends in a sound run."""
    before = sha256_file(run.shard(2) / TAR)
    (run.shard(2) / TAR).write_bytes(b"damaged")
    (line,) = faults(run.path)
    assert line.endswith(f"; remove {run.shard(2)} and go on with: boomgen resume {run.path}")
    shutil.rmtree(run.shard(2))
    finalise(make_missing(run))
    (line,) = faults(run.path)
    assert line.endswith(f"; remove {run.dataset} and finalise again")
    shutil.rmtree(run.dataset)
    finalise(RunDir(run.path))
    assert faults(run.path) == []
    assert sha256_file(run.shard(2) / TAR) == before


def make_missing(run: RunDir) -> RunDir:
    from boomgen.worker import Worker

    worker = Worker(RunDir(run.path))
    for number in run.missing():
        worker.make_shard(number)
    worker.pool.shutdown()
    return RunDir(run.path)


def test_remake_finds_nothing_in_a_sound_run(
    run: RunDir, faults: Check, plan_tiny: PlanTiny, tiny_model: Path, tmp_path: Path
) -> None:
    """All rows made again are as recorded, failed rows too; also some rows, and in a run that is not closed yet."""
    assert faults(run.path, "--remake", "5") == []
    assert faults(run.path, "--remake", "1000") == []
    model = nan_model(tiny_model, tmp_path / "nan", slice(5))
    broken = make_shards(plan_tiny(tmp_path / "broken", model=str(model)))
    assert sum(broken.status().failed.values()) == 50
    assert faults(broken.path, "--remake", "100") == []
    shutil.rmtree(run.dataset)
    shutil.rmtree(run.manifest)
    assert faults(run.path, "--remake", "50") == []


def tamper(run: RunDir, number: int, change: Callable[[list[dict[str, Any]], dict[str, bytes]], None]) -> None:
    """Change rows and tar members of a shard, and every hash with them, in place: what a careful forger would do."""
    tar_path, part, done = (run.shard(number) / name for name in (TAR, PART, DONE))
    table = pq.ParquetFile(part).read()
    rows = table.to_pylist()
    with tarfile.open(tar_path) as tar:
        members = {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in tar}
    change(rows, members)
    for row in rows:
        row["output_sha256"] = hashlib.sha256(members[f"{row['key']}.png"]).hexdigest()
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part, compression="zstd")
    files = {name: {"sha256": sha256_file(p), "bytes": p.stat().st_size} for name, p in ((TAR, tar_path), (PART, part))}
    done.write_bytes(sealed({**unseal(done.read_bytes()), "files": files}))


def other_image(rows: list[dict[str, Any]], members: dict[str, bytes]) -> None:
    one, other = rows[3]["key"], rows[4]["key"]
    members[f"{one}.png"] = members[f"{other}.png"]


def other_source(rows: list[dict[str, Any]], members: dict[str, bytes]) -> None:
    rows[3]["source_key"] = rows[4]["source_key"]


def other_about(rows: list[dict[str, Any]], members: dict[str, bytes]) -> None:
    about = json.loads(members[f"{rows[3]['key']}.json"])
    members[f"{rows[3]['key']}.json"] = json.dumps(about | {"abar": 0.5}, sort_keys=True).encode()


@pytest.mark.parametrize("change", [other_image, other_source, other_about])
def test_only_remake_finds_a_careful_forger(run: RunDir, faults: Check, change: Any) -> None:
    """One row forged with every hash and record made to fit: all hashes agree, but the row made again differs."""
    tamper(run, 1, change)
    assert faults(run.path) == []
    (line,) = faults(run.path, "--remake", "50")
    assert line.startswith("row 19 (")
    assert line.endswith(f"made again differs from {run.shard(1)}")


def drop_member(rows: list[dict[str, Any]], members: dict[str, bytes]) -> None:
    del members[f"{rows[3]['key']}.png"]
    rows.remove(rows[3])


def fail_row(rows: list[dict[str, Any]], members: dict[str, bytes]) -> None:
    rows[3]["status"] = "failed"


@pytest.mark.parametrize(("change", "wrong"), [(drop_member, PART), (fail_row, TAR)])
def test_rows_and_images_must_fit(run: RunDir, faults: Check, change: Any, wrong: str) -> None:
    """Rows that are not the planned ones, and images that are not those of ok rows, are named though hashes agree."""
    tamper(run, 1, change)
    assert str(run.shard(1) / wrong) in faults(run.path)[0]


def test_without_links(plan_tiny: PlanTiny, tmp_path: Path, faults: Check) -> None:
    """A closed run of `--linkage none` is sound without secret and index, and says that nothing can be made again."""
    run = finish(plan_tiny(tmp_path / "run", limit=40, linkage="none"))
    assert faults(run.path) == []
    (line,) = faults(run.path, "--remake", "5")
    assert "is gone (destroyed with --linkage none" in line
    path = run.shard(1) / PART
    path.write_bytes(path.read_bytes()[:-1])
    assert [str(path) in line for line in faults(run.path)] == [True]


def test_network_package(plan_tiny: PlanTiny, tmp_path: Path, faults: Check) -> None:
    """A compiled network beside the plan is hashed like the rest, and a missing one is named."""
    run = plan_tiny(tmp_path / "run", limit=40)
    run.package.write_bytes(random.Random(0).randbytes(5000))
    network = run.plan.network.model_copy(update={"package_sha256": sha256_file(run.package)})
    (run.path / "plan.json").write_bytes(run.plan.model_copy(update={"network": network}).to_bytes())
    sound = run.package.read_bytes()
    missing = faults(run.path)
    assert [line for line in missing if " is missing; " not in line] == []
    for damaged in flips(sound):
        run.package.write_bytes(damaged)
        assert faults(run.path) == [f"{run.package} is not the planned one", *missing]
    run.package.unlink()
    assert faults(run.path) == [f"{run.package} is not the planned one", *missing]


@pytest.mark.slow
def test_compiled_run(plan_tiny: PlanTiny, tmp_path: Path, faults: Check) -> None:
    """A run with a really compiled network: sound, remade, and damage to the package named."""
    run = finish(plan_tiny(tmp_path / "run", limit=40, compile="yes"))
    assert faults(run.path, "--remake", "50") == []
    data = run.package.read_bytes()
    for damaged in flips(data):
        run.package.write_bytes(damaged)
        assert faults(run.path) == [f"{run.package} is not the planned one"]


def damaged_plans(data: bytes) -> dict[str, bytes]:
    record = unseal(data)
    without = {name: value for name, value in record.items() if name != "chain"}
    cases = {f"flip {i}": damaged for i, damaged in enumerate(flips(data))}
    return cases | {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "not text": b"\xff\xfe" * 50,
        "other JSON": b"[]",
        "deep JSON": b"[" * 100_000,
        "newer": sealed({**record, "schema_version": 99}),
        "no chain": sealed(without),
        "another's": sealed({"schema_version": 1}),
    }


def test_damaged_plan_is_one_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is in plan.json, every command that needs it says so in one line and exits 1, never with a traceback."""
    path, count = run.path / "plan.json", 0
    commands = (["status"], ["status", "--json"], ["resume"], ["verify"], ["verify", "--remake", "5"], ["finalise"])
    for case, damaged in damaged_plans(path.read_bytes()).items():
        path.write_bytes(damaged)
        for command in commands:
            assert main([command[0], str(run.path), *command[1:]]) == 1, (case, command)
            captured = capsys.readouterr()
            (line,) = (captured.out + captured.err).splitlines()
            assert str(path) in line, (case, command, line)
            assert "a fault of boomgen" not in line
            count += 1
    assert main(["logs", str(run.path)]) == 0
    path.unlink()
    path.mkdir()
    assert main(["status", str(run.path)]) == 1
    assert count == len(commands) * (FLIPS + 8)


def test_damaged_records_are_one_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged done record is one line with its path and what to do, from every command that reads it."""
    path = run.shard(1) / DONE
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        for command in ("status", "resume", "finalise", "verify"):
            assert main([command, str(run.path)]) == 1
            captured = capsys.readouterr()
            (line,) = (captured.out + captured.err).splitlines()
            assert str(path) in line
            assert line.endswith(f"; remove {run.shard(1)} and go on with: boomgen resume {run.path}")


def test_python_form(closed: Path) -> None:
    """The Python form: no lines for a sound run, from verify and from remake."""
    assert list(verify(RunDir(closed))) == []
    assert list(remake(RunDir(closed), 3)) == []
