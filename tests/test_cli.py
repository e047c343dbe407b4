"""The commands as people type them: results on stdout, one line on stderr when something is wrong, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from boomgen.cli import main
from boomgen.finalise import finalise
from boomgen.worker import Worker

from .conftest import Complaint, PlanTiny


def modules_after(*args: Any, cwd: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in a fresh interpreter; which heavy modules it imported."""
    code = (
        "import sys; from boomgen.cli import main; code = main(sys.argv[1:]);"
        "print('MODULES', *({'torch', 'diffusers', 'datasets', 'transformers'} & sys.modules.keys())); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=cwd)
    return done, set(done.stdout.splitlines()[-1].split()[1:])


def test_the_first_command_without_its_gpus_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    command = ["anonymize", "--dataset", "imagenet", "--t-boom", "0.3", "--gpus", "8"]
    done, modules = modules_after(*command, cwd=tmp_path)
    import torch

    found = torch.cuda.device_count()
    assert found < 8, "this test is for machines with fewer than 8 GPUs"
    instead = f"--gpus {found}" if found else f"--device cpu --workers {len(os.sched_getaffinity(0))}"
    assert done.returncode == 2
    assert done.stderr == f"boomgen: 8 GPUs asked for, found {found}; use {instead}\n"
    assert modules == {"torch"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["datasets"], ["models"]])
def test_light_commands_import_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    done, modules = modules_after(*command, cwd=tmp_path)
    assert done.returncode == 0
    assert "fashion" in done.stdout
    assert modules == set()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    commands = "anonymize augment resume status verify plan run logs finalise sweep models datasets doctor"
    for name in commands.split(" "):
        assert re.search(rf"^    {name}\s", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["anonymize", "--dataset", "imagent"],
            "no data set 'imagent', did you mean imagenet or imagenet-200?; expected a name (boomgen datasets), "
            "an existing folder or .tar, s3://bucket/folder, or owner/name on the Hugging Face Hub",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--model", "fashion-pached-ddpm"],
            "no model 'fashion-pached-ddpm', did you mean fashion-patched-ddpm?; expected a preset (boomgen models), a "
            "diffusers folder, or owner/name on the Hugging Face Hub",
        ),
        (
            ["anonymize", "--dataset", "lfw"],
            "lfw needs --data-dir DIR: No official copy on the Hub; give a local folder with one sub-folder per "
            "person by --data-dir.",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--t-boom", "1.5"],
            "t_boom 1.5 is outside the chain; expected 0 (the source) to 1 (purely synthetic)",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--t-boom", "0"],
            "--t-boom 0 with anonymize gives the originals, unchanged; use a greater one, or augment",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--t-boom", "40/100", "--steps", "50"],
            "--t-boom 40/100 with --steps 50; a level names its own steps, drop --steps",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--seed", "3"],
            "--seed with anonymize; its randomness is a secret (--secret-file) and an image has one version",
        ),
        (
            ["augment", "--dataset", "fashion-sample", "--linkage", "none"],
            "--linkage none with augment; its noise follows from a public seed, use anonymize",
        ),
        (
            ["augment", "--dataset", "fashion-sample", "--eta", "2"],
            "--eta '2': input should be less than or equal to 1",
        ),
        (["anonymize"], "--dataset is missing; say which one to use, as --dataset NAME"),
        (["resume", "x", "--private-dir", "y"], "unrecognized arguments: --private-dir y; see boomgen --help"),
        (["work", "x", "--private-dir", "y"], "unrecognized arguments: --private-dir y; see boomgen --help"),
        (["anonymize", "--datset", "x"], "unrecognized arguments: --datset x; see boomgen --help"),
        (["status", "nowhere"], "nowhere is no run folder; expected one that boomgen planned, with a plan.json"),
        (
            ["anonymize", "--dataset", "fashion-mnist", "--data-dir", "gone"],
            "--data-dir gone does not exist; expected the folder of fashion-mnist",
        ),
        (
            ["run", "no-such-job"],
            "job no-such-job: No such file or directory; expected a YAML file of options, or a shipped job such as "
            "quickstart",
        ),
        (
            ["run", "table1-cifar"],
            "job table1-cifar: No such file or directory; expected a YAML file of options, or a shipped job such as "
            "quickstart, did you mean table1-cifar10 or table1-cifar100?",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--device", "cpu", "--gpus", "2"],
            "--device cpu with --gpus 2; use one of them",
        ),
        (
            ["anonymize", "--dataset", "fashion-sample", "--device", "cpu", "--steps", "2000"],
            "2000 steps of a chain trained with 1000; expected 1 to 1000",
        ),
    ],
)
def test_wrong_use_is_one_exact_line(complaint: Complaint, args: list[str], line: str) -> None:
    assert complaint(*args) == line


def test_hub_out_of_reach_is_cause_and_remedy_in_one_line(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "boomgen", "anonymize", "--dataset", "cifar10", "--device", "cpu"]
    for more, remedy in ((["--model", "fashion-patched-ddpm"], "--data-dir"), ([], "--model")):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert done.stderr.count("\n") == 1
        assert "Hugging Face Hub" in done.stderr
        assert remedy in done.stderr
        assert not (tmp_path / "runs").exists()


def test_flags_win_over_the_job_file(tmp_path: Path, tiny_model: Path, tiny_source: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"mode: augment\ndataset: {tiny_source}\nmodel: {tiny_model}\nt-boom: 0.4\nsteps: 10\nlimit: 8\nvariants: 2\n"
    )
    args = ["run", str(job), "--variants", "1", "--device", "cpu", "--workers", "1", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["job"]["variants"], plan["job"]["t_boom"], plan["job"]["mode"]) == (1, "0.4", "augment")


def test_job_files_that_are_none(complaint: Complaint, tmp_path: Path) -> None:
    for text, words in (("- a\n", "is no mapping"), ("mode: [", "expected a YAML file"), ("colour: red\n", "--colour")):
        (tmp_path / "job.yaml").write_text(text)
        assert words in complaint("run", "job.yaml")


def test_plan_says_what_it_will_cost(
    tmp_path: Path, tiny_model: Path, tiny_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    args = f"plan --dataset {tiny_source} --model {tiny_model} --t-boom 0.4 --steps 10 --batch-size 8 --shard-size 16"
    assert main([*args.split(), "--calibrate", "--device", "cpu", "--out", str(out)]) == 0
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    said = {name: value.strip() for name, value in said.items()}
    assert said["images"] == "100 (100 sources x 1)"
    assert said["shards"] == "7, of up to 16 images"
    assert said["labels"] == "10 of 10 classes"
    assert said["makes"] == "8x8 grey, the model is told the classes"
    assert said["calls"].startswith("52 (")  # 13 batches of 8, 4 levels each
    assert said["t_boom"].startswith("level 4/10, abar ")
    assert "device-hours" in said
    assert said["run with"] == f"boomgen resume {out}"
    assert sorted(path.name for path in out.iterdir()) == ["index.parquet", "plan.json", "secret"]


def test_status_tells_what_is_missing_and_how_to_go_on(
    plan_tiny: PlanTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan_tiny(tmp_path / "run")
    worker = Worker(run)
    for shard in (0, 1, 4):
        worker.make_shard(shard)
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert "rows    48 ok of 100\n" in text
    assert "shards  3 of 7 whole, missing: number 2-3,5-6\n" in text
    assert f"next    boomgen resume {run.path}\n" in text
    assert main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == "2-3,5-6"
    for shard in (2, 3, 5, 6):
        worker.make_shard(shard)
    assert main(["finalise", str(run.path)]) == 0
    assert f"data set  {run.dataset}\n" in capsys.readouterr().out
    assert main(["verify", str(run.path), "--remake", "5"]) == 0
    assert capsys.readouterr().out == f"{run.path} is sound: 7 shards, 100 rows, 5 of them made again\n"


def test_logs_tell_of_shards_and_of_failures(
    plan_tiny: PlanTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan_tiny(tmp_path / "run")
    assert main(["resume", str(run.path), "--device", "cpu", "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out.count(" done: ") == 7
    assert main(["logs", str(run.path), "--failed"]) == 0
    assert capsys.readouterr().out == ""


def test_doctor_names_a_folder_that_cannot_hold_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    assert "embedded model" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--out", str(tmp_path / "file")]) == 1
    assert "BAD  " in capsys.readouterr().out


def test_sweep_draws_one_row_per_t_boom(
    tmp_path: Path, tiny_model: Path, tiny_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    out = tmp_path / "sweep.png"
    args = f"sweep --dataset {tiny_source} --model {tiny_model} --steps 10 --levels 0,0.5,1 --limit 4 --device cpu"
    assert main([*args.split(), "--out", str(out)]) == 0
    assert "t_boom 0    abar 1.0000, rms to source 0.000\n" in capsys.readouterr().out
    width, height = Image.open(out).size
    assert (width - 92, height) == (4 * 96, 4 * 96)


def test_a_finished_run_is_closed_and_quiet(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = plan_tiny(tmp_path / "run")
    worker = Worker(run)
    for shard in range(run.plan.shards):
        worker.make_shard(shard)
    finalise(run)
    done, modules = modules_after("resume", run.path, cwd=tmp_path)
    assert (done.returncode, done.stderr, modules) == (0, "", set())


def test_verify_counts_upwards(complaint: Complaint, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = plan_tiny(tmp_path / "run")
    said = "--remake -1; expected a number of rows, 0 or more"
    assert complaint("verify", run.path, "--remake", "-1") == said


def test_sweep_needs_a_picture_to_draw(complaint: Complaint, tmp_path: Path) -> None:
    line = ["sweep", "--dataset", "fashion-sample", "--out"]
    assert complaint(*line, "x.txt") == "a picture named x.txt; expected a name that ends in .png, .jpg or .webp"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    line = ["sweep", "--dataset", "photos", "--model", "fashion-patched-ddpm", "--levels", "0.1", "--limit", "3"]
    said = "not one of the first 3 images of photos can be decoded; try a greater --limit"
    assert complaint(*line) == said
