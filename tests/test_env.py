"""Devices are what was asked for, or refused; each GPU worker sees its own; classes are compared by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boomgen import env
from boomgen.errors import UsageError
from boomgen.job import Launch

from .conftest import PlanTiny


def test_every_gpu_worker_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, seen in ((None, "2"), ("4,5,6,7", "6"), ("GPU-a,GPU-b,GPU-c", "GPU-c")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert env.claim("cuda:2") == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert env.claim("cpu") == "cpu"


def test_every_worker_fixes_the_choice_of_kernels(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Also one that no engine started, as `verify --remake` has it: it must compute what the shards' workers did."""
    code = (
        "import os, sys, torch; torch.set_num_threads(2); from boomgen.run import RunDir; from boomgen.worker import *;"
        "Worker(RunDir(sys.argv[1])); cudnn = torch.backends.cudnn;"
        "print(torch.get_num_threads(), os.environ['CUBLAS_WORKSPACE_CONFIG'], cudnn.deterministic, cudnn.benchmark)"
    )
    command = [sys.executable, "-c", code, str(plan_tiny(tmp_path / "run").path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1 :4096:8 True False\n"


@pytest.mark.parametrize(
    ("asked", "found", "chosen"),
    [
        ({}, 0, ("cpu", env.cores())),
        ({}, 4, ("cuda", 4)),
        ({"gpus": 2}, 4, ("cuda", 2)),
        ({"device": "cuda"}, 4, ("cuda", 4)),
        ({"device": "cpu"}, 4, ("cpu", env.cores())),
        ({"workers": 3}, 4, ("cpu", 3)),
        ({"device": "cpu", "workers": 5}, 0, ("cpu", 5)),
    ],
)
def test_devices(
    asked: dict[str, object], found: int, chosen: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert env.choose_device(Launch.model_validate(asked)) == chosen


def test_too_few_gpus_say_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"^8 GPUs asked for, found 2; use --gpus 2$"):
        env.choose_device(Launch(gpus=8))


def test_the_class_of_this_machine_is_stable_and_differences_are_named() -> None:
    here = env.environment("cpu")
    assert here == env.environment("cpu")
    assert here["torch"] == torch.__version__
    assert {"boomgen", "diffusers", "numpy", "pyarrow", "pillow", "codecs", "device", "cpu_capability"} < here.keys()
    assert "zlib " in here["codecs"]
    assert env.difference(here, here) == ""
    assert env.difference({**here, "numpy": "1.0"}, here) == f"numpy 1.0 (here {here['numpy']})"
    assert env.difference({"torch": "2"}, {"torch": "2", "cuda": "13"}) == "cuda unset (here 13)"


def test_half_precision_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, dtype in (
        ((), "float32"),
        (("avx512f",), "float32"),
        (("avx512_bf16",), "bfloat16"),
        (("amx_bf16",), "bfloat16"),
    ):
        monkeypatch.setattr(env, "cpu_flags", lambda flags=flags: flags)
        assert env.default_dtype("cpu") == dtype


def test_a_container_s_share_of_the_cores_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker for each core of the machine would be too many, where a container may use two of them."""
    monkeypatch.setattr(env, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert env.cores() == 64
    for text, cores in (
        ("max 100000", 64),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("odd", 64),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert env.cores() == cores
