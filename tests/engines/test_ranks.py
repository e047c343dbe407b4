"""Ranks of accelerate, torchrun and srun, and parts of a job: who makes what; and the real launchers."""

import itertools
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boomgen import env, prepare
from boomgen.cli import main
from boomgen.engines.ranks import Rank, others, own, part, rank_of
from boomgen.errors import BoomgenError, UsageError
from boomgen.job import Launch
from boomgen.run import RunDir, numbers, ranges

from ..conftest import Complaint, PlanTiny
from ..driver import Driver
from ..finished import command_line, made
from ..test_bytes import LONG
from .engines import Ranks, launcher


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            None,
        ),  # a batch script: no step, one process
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Rank(3, 4, 1)),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"},
            Rank(3, 4, 0),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
            Rank(3, 4, 1),
        ),
    ],
)
def test_a_launcher_tells_the_rank(environ: dict[str, str], rank: Rank | None) -> None:
    assert rank_of(environ) == rank


def test_a_world_without_a_rank_is_refused(
    monkeypatch: pytest.MonkeyPatch, complaint: Complaint, plan_tiny: PlanTiny, tmp_path: Path
) -> None:
    """Every process would do all the work, or one would do a part for all of it."""
    run = plan_tiny(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = "; expected RANK, WORLD_SIZE, LOCAL_RANK, the first below the second: without them, every process takes "
    for command in ("work", "resume"):
        assert complaint(command, run.path).startswith(f"WORLD_SIZE=2{expected}")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for size in ("0", "x"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert complaint("work", run.path).startswith(f"RANK=1, WORLD_SIZE={size}, LOCAL_RANK=1{expected}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "2 processes would all make the same shards; drop --part and --shards"
    assert complaint("work", run.path, "--part", "0/2") == complaint("work", run.path, "--shards", "0") == said
    said = "--engine ray beside 2 processes of a launcher; start boomgen by one of both"
    assert complaint("resume", run.path, "--engine", "ray") == said
    line = command_line(run.plan.job, tmp_path / "unplanned", "--engine", "ray", verb="anonymize")
    monkeypatch.setenv("RANK", "0")
    assert complaint(*line) == said
    assert not (tmp_path / "unplanned").exists()


def test_an_image_that_cannot_be_read_fails_no_launch(
    plan_tiny: PlanTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher would end or restart all ranks for it. Who runs alone is told by 3."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "0.png")
    (folder / "1.png").write_bytes(b"no image")
    run = plan_tiny(tmp_path / "run", dataset=str(folder.parent))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["resume", str(run.path)]) == 0
    assert "1 failed (undecodable)" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["resume", str(run.path)]) == 3


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_disjoint_and_whole_and_keep_their_shards(seed: int) -> None:
    rng = random.Random(seed)
    count, size = rng.randrange(1, 60), rng.randrange(1, 9)
    missing = sorted(rng.sample(range(count), rng.randrange(count + 1)))
    parts = [own(missing, Rank(rank, size, 0)) for rank in range(size)]
    assert sorted(itertools.chain.from_iterable(parts)) == missing
    for rank in range(size):
        assert set(parts[rank]) <= set(own(range(count), Rank(rank, size, 0)))
        rest = others(missing, Rank(rank, size, 0))
        assert sorted(parts[rank] + rest) == missing
        assert [shard // size for shard in rest] == sorted((shard // size for shard in rest), reverse=True)
        if rest:
            assert (rest[0] - rank) % size == min((s - rank) % size for s in rest if s // size == rest[0] // size)
    assert numbers(ranges(missing), count) == missing if missing else True


@pytest.mark.parametrize("text", ["", "3", "4/4", "-1/4", "a/4", "1/0", "1/4/2"])
def test_parts_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="expected I/N, as 0/64 to 63/64"):
        part(text)


@pytest.mark.parametrize("text", ["", "7", "0-7", "3-1", "a", "1,,2", "-3"])
def test_shards_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="expected shards of 0 to 6, as 0-3,7"):
        numbers(text, 7)


def test_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(UsageError, match="process 2 of this machine finds 2 GPUs; start one process for each GPU"):
        env.claim("cuda:2")
    assert env.claim("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_parts_together_are_the_run(
    plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As tasks of an array make them, one twice, one of them of chosen shards; each closes nothing, and tells of its
    own shards alone, without a look at what others made."""
    run = plan_tiny(tmp_path / "run")
    assert main(["work", str(run.path), "--part", "2/3"]) == 0
    assert run.published() == {2, 5}
    assert capsys.readouterr().out == "part 2/3: 2 of 2 shards whole\n"
    (run.shard(5) / "done.json").rename(tmp_path / "done.json")
    assert main(["work", str(run.path), "--shards", "0-2,6"]) == 0
    assert run.published() == {0, 1, 2, 5, 6}
    assert capsys.readouterr().out == "shards 0-2,6: 4 of 4 shards whole\n"
    (tmp_path / "done.json").rename(run.shard(5) / "done.json")
    for number in (1, 2, 0):
        assert main(["work", str(run.path), "--part", f"{number}/3"]) == 0
    assert not run.dataset.exists()
    assert main(["finalise", str(run.path)]) == 0
    assert made(run) == undisturbed()
    assert main(["work", str(run.path)]) == 0  # nothing to do
    assert sorted(path.name for path in run.logs.iterdir()) == [f"worker-{n:03d}.log" for n in range(3)]


# The real launchers ------------------------------------------------------------------------------------------------


def closed(run: RunDir) -> dict[str, str]:
    assert main(["finalise", str(run.path)]) == 0
    return made(run)


def test_whoever_waits_for_a_plan_asks_whether_all_nodes_see_its_folder(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk of one node alone, it would wait for ever. Here the plan comes after a minute."""
    run, slept = plan_tiny(tmp_path / "planned"), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) > 60:
            run.path.rename(tmp_path / "run")

    monkeypatch.setattr(prepare.time, "sleep", sleep)
    monkeypatch.chdir(tmp_path)
    assert prepare.await_plan(run.plan.job, Launch(out="run", device="cpu")).missing()
    said = f"{platform.node()}: waiting for rank 0 to plan {tmp_path}/run; do all nodes see this folder?\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_rank_0_plans_and_closes(
    name: str,
    plan_tiny: PlanTiny,
    undisturbed: Any,
    secret_file: Path,
    tmp_path: Path,
) -> None:
    """And the other waits for the plan; one of the two tells of the run."""
    job, out = plan_tiny(tmp_path / "like", **LONG).plan.job, tmp_path / "run"
    command = command_line(job, out, "--secret-file", str(secret_file), "--device", "cpu", verb="anonymize")
    done = subprocess.run([*launcher(name), "boomgen", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows      100 ok of 100") == 1
    assert done.stderr.count("100/100 images, ") == 1
    run = RunDir(out)
    logs = [path.read_text() for path in run.logs.iterdir()]
    assert 13 <= sum(text.count(" done: ") for text in logs) <= 14  # a shard may be made twice at the end
    assert made(run) == undisturbed(**LONG)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flag"), [("torchrun", "--max-restarts"), ("accelerate", "--max_restarts")])
def test_killed_ranks_start_again(name: str, flag: str, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """The launcher's restarts start all ranks anew; they go on."""
    run = plan_tiny(tmp_path / "run", **LONG)
    going = Ranks(name, flag, "2").start(run)
    os.kill(going.busy()[0], signal.SIGKILL)
    ended = going.end()
    assert ended.code == 0, ended.err
    assert made(run) == undisturbed(**LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port} "
        "--node-rank {node}",
        "accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --mixed_precision no "
        "--dynamo_backend no --main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank {node}",
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_machines(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, line: str) -> None:
    """Two launchers with a rank each, that meet at a port."""
    run = plan_tiny(tmp_path / "run", **LONG)
    port = random.SystemRandom().randrange(20000, 30000)
    starts = [(sys.executable, "-m", *line.format(port=port, node=node).split(), "-m") for node in (0, 1)]
    machines = [Driver(run, "boomgen", "work", str(run.path), launcher=start) for start in starts]
    for machine in machines:
        code, _, err = machine.end()
        assert code == 0, err
    assert len(list(run.logs.iterdir())) == 2
    assert closed(run) == undisturbed(**LONG)


def test_a_poison_shard_is_named_and_the_rest_is_made(
    plan_tiny: PlanTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(photos / f"{number}.png")
    run = plan_tiny(tmp_path / "run", dataset=str(photos), shard_size=1, batch_size=1)
    (photos / "3.png").unlink()
    assert main(["work", str(run.path)]) == 1
    (missing,) = run.missing()
    said = f"1 shards failed 3 times and were set aside; shard {missing}: FileNotFoundError: "
    assert said in capsys.readouterr().err
    assert (run.logs / "worker-000.log").read_text().count(f"shard {missing} failed") == 3


def test_what_another_made_meanwhile_is_not_set_aside(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard fails here as often as it may, and the last time another rank has just made it."""
    from boomgen.worker import Worker

    run, tried, real = plan_tiny(tmp_path / "run"), [], Worker.make_shard

    def late(self: Worker, number: int, tick: Any) -> Any:
        tried.append(number)
        if number == 3 and tried.count(3) < 3:
            raise OSError("Input/output error")
        record = real(self, number, tick)
        if number == 3:
            raise OSError("Input/output error")
        return record

    monkeypatch.setattr(Worker, "make_shard", late)
    assert main(["work", str(run.path)]) == 0
    assert tried.count(3) == 3
    assert not run.missing()


def test_a_device_that_fails_always_ends_its_worker(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go through all shards of the run to fail at each."""
    from boomgen.worker import Worker

    run, tried = plan_tiny(tmp_path / "run"), []

    def broken(self: Worker, number: int, tick: Any) -> None:
        tried.append(number)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(Worker, "make_shard", broken)
    from boomgen import drive

    with pytest.raises(BoomgenError, match=r"the last with RuntimeError: CUDA error: [a-z ]* encountered; see"):
        drive.work(run, Launch())
    assert tried == [0, 1, 2]


def test_a_foreign_environment_is_refused(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: Complaint
) -> None:
    run = plan_tiny(tmp_path / "run")
    real = env.environment
    monkeypatch.setattr(env, "environment", lambda device: real(device) | {"torch": "9.9"})
    (run.path / "logs").mkdir()
    (run.path / "logs" / "worker-000.log").touch()
    assert "is not of the planned class: torch" in complaint("work", run.path, code=1)
    assert not run.published()
