"""Eight made-up GPUs: a Python started with this folder on its path computes on the CPU what is sent to CUDA.

Everything of boomgen is the real thing: devices are counted, planned, claimed by number, and named in records.
"""

import os
import threading
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

COUNT = 8
_to_cpu = {"cuda", "cuda:0"}


class OnCPU(TorchFunctionMode):
    """Replaces the device of every call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple("cpu" if _is_gpu(arg) else arg for arg in args)
        kwargs = {name: "cpu" if _is_gpu(value) else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _is_gpu(value: Any) -> bool:
    return (isinstance(value, str) and value in _to_cpu) or (isinstance(value, torch.device) and value.type == "cuda")


def _count() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else COUNT


torch.cuda.is_available = lambda: True
torch.cuda.device_count = _count
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_name = lambda *_: "made-up GPU"
torch.cuda.is_bf16_supported = lambda **_: False
torch.cuda.synchronize = lambda *_: None
OnCPU().__enter__()
run_thread = threading.Thread.run


def _run(thread: threading.Thread) -> None:
    with OnCPU():  # the mode is of a thread alone
        run_thread(thread)


threading.Thread.run = _run
