"""Devices are what was asked for, or refused; each GPU worker sees its own; classes are compared by name."""

import os

import pytest
import torch

from boomgen import env
from boomgen.errors import UsageError
from boomgen.job import Launch


def test_every_gpu_worker_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, seen in ((None, "2"), ("4,5,6,7", "6"), ("GPU-a,GPU-b,GPU-c", "GPU-c")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert env.claim("cuda:2") == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert env.claim("cpu") == "cpu"
    assert torch.backends.cudnn.deterministic


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
