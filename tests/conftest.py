"""Small real things that many tests share: a model folder that diffusers saved, IDX files, planned runs."""

import fcntl
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on shared cores, spinning threads are 100x slower

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir

from .engines.table import table
from .finished import Bytes, finish, made

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_ROWS = 100
SECRET = bytes(range(32))


def save_model(folder: Path, widths: tuple[int, ...], **more: Any) -> None:
    """A random UNet for 8x8 grey images, as diffusers saves it."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=4,
        **more,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(variance_type="fixed_small").save_pretrained(folder / "scheduler")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional one."""
    folder = tmp_path_factory.mktemp("tiny-model")
    save_model(folder, (8, 16), num_class_embeds=11)
    (folder / "boomgen.yaml").write_text("null_class: 10\nlicence: Apache-2.0\n")
    return folder


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "train") -> Path:
    """Images (N, H, W) uint8 and labels (N,) as IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    head = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes(), mtime=0))
    head = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(head + labels.astype(np.uint8).tobytes(), mtime=0)
    )
    return folder


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 random 8x8 grey images of 10 classes, sorted by class."""
    images = np.random.default_rng(0).integers(0, 256, (TINY_ROWS, 8, 8), np.uint8)
    return write_idx(tmp_path_factory.mktemp("tiny-source"), images, np.repeat(np.arange(10), TINY_ROWS // 10))


@pytest.fixture(scope="session")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text(SECRET.hex() + "\n")
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch as a worker has it; a test that sets another number leaves it to no other."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


PlanTiny = Callable[..., RunDir]
Tell = Callable[[str], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Have a line of numbers shown when all tests are done."""
    return lambda line: record_property("told", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests told, also those that ran in other processes."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = (entry for report in reports for entry in getattr(report, "user_properties", ()))
    for line in dict.fromkeys(line for name, line in properties if name == "told"):
        terminalreporter.write_line(line)
    for line in table(reports):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def plan_tiny(tiny_model: Path, tiny_source: Path, secret_file: Path) -> PlanTiny:
    """Plan a run of the tiny model on the tiny images; keywords change the job. 7 shards of 16, batches of 8."""

    def plan(out: Path, **changes: Any) -> RunDir:
        options: dict[str, Any] = {
            "mode": "anonymize",
            "dataset": str(tiny_source),
            "model": str(tiny_model),
            "t_boom": "0.4",
            "steps": 10,
            "batch_size": 8,
            "shard_size": 16,
        }
        job = Job(**(options | changes))
        secret = str(secret_file) if job.mode == "anonymize" else None
        return prepare(job, Launch(out=str(out), device="cpu", secret_file=secret))

    return plan


@pytest.fixture(scope="session")
def undisturbed(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bytes]:
    """The bytes of a job's run by one worker in this process, shard after shard, made once per job."""
    known: dict[str, Bytes] = {}

    def bytes_of(**job: Any) -> Bytes:
        name = json.dumps(job, sort_keys=True)
        if name not in known:
            known[name] = made(finish(plan_tiny(tmp_path_factory.mktemp("undisturbed") / "run", **job)))
        return known[name]

    return bytes_of


@pytest.fixture(scope="session")
def boomgen() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a user does."""

    def run(*args: Any, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "boomgen", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **more)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


Complaint = Callable[..., str]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Complaint:
    """The one line that a failing command prints; it must leave nothing in the folder it was called in."""
    from boomgen.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*args: Any, code: int = 2) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert main([str(arg) for arg in args]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("boomgen: ")
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err.removeprefix("boomgen: ").rstrip("\n")

    return run


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of the whole real data set; a machine without it fails, since a skipped proof proves nothing."""
    if not (FASHION / "train-images-idx3-ubyte.gz").exists():
        pytest.fail(f"{FASHION} is missing: apt-get install dataset-fashion-mnist (Debian, Ubuntu)", pytrace=False)
    return FASHION


@pytest.fixture(scope="session")
def real_run(fashion_mnist: Path, secret_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """1,000 real test images through the embedded model at t_boom 0.4, made by the command line, once for all workers
    of pytest-xdist. To be read only: copy it before changing anything."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "real-run"
    source = ["--dataset", "fashion-mnist", "--data-dir", fashion_mnist, "--split", "test", "--limit", 1000]
    where = ["--device", "cpu", "--workers", 2, "--secret-file", secret_file, "--out", out]
    chain = ["--t-boom", 0.4, "--steps", 25]  # a quarter of the calls of the default, at the same noise
    command = [sys.executable, "-m", "boomgen", "anonymize", *source, *chain, *where]
    with (shared / "real-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return RunDir(out)
