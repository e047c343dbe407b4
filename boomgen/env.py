"""The environment class: everything that decides bits besides the plan. And the devices that there are.

Two machines of one class write the same bytes for the same plan. The class is frozen in the plan; a worker of another
class is refused.
"""

import os
import platform
from importlib import metadata
from pathlib import Path

from boomgen import __version__
from boomgen.errors import UsageError
from boomgen.job import Launch

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_DECIDING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16")


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets of this CPU that numeric libraries choose their kernels by."""
    found = _cpuinfo("flags", "Features").split()
    return tuple(flag for flag in _DECIDING_FLAGS if flag in found)


def _cpuinfo(*names: str) -> str:
    """The first of these entries in the kernel's description of the CPU, '' where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def _cpu_name() -> str:
    return f"{platform.machine()} {_cpuinfo('model name') or platform.processor()} ({' '.join(cpu_flags())})"


def environment(device: str) -> dict[str, str]:
    """The class of a device ('cpu' or 'cuda') on this machine, as names and values that are compared one by one."""
    import torch
    from PIL import features

    codecs = {name: features.version(name) for name in ("zlib", "zlib_ng", "jpg", "libjpeg_turbo", "webp")}
    found = {
        "boomgen": __version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("diffusers", "transformers", "numpy", "pyarrow", "pillow")},
        "codecs": " ".join(f"{name} {version}" for name, version in codecs.items() if version),
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return found | {
            "device": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    return found | {"device": _cpu_name(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def difference(planned: dict[str, str], here: dict[str, str]) -> str:
    """'' where the classes are equal, else what differs: 'numpy 2.4.6 here 2.5.0, ...'."""
    names = sorted(planned.keys() | here.keys())
    return ", ".join(
        f"{name} {planned.get(name, 'unset')} (here {here.get(name, 'unset')})"
        for name in names
        if planned.get(name) != here.get(name)
    )


def cores() -> int:
    """CPU cores that this process may use: a container's share of them may be fewer than it sees."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text(encoding="ascii").split()
        return seen if quota == "max" else max(1, min(seen, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or an old one
        return seen


def choose_device(launch: Launch) -> tuple[str, int]:
    """The kind of device and the number of workers. Of a Ray cluster elsewhere, the kind alone counts.

    Raises:
        UsageError: fewer devices than asked for; imports torch, but never diffusers.
    """
    if launch.device == "cpu" and launch.gpus:
        raise UsageError(f"--device cpu with --gpus {launch.gpus}; use one of them")
    if launch.device == "cpu" or (launch.device is None and launch.workers and not launch.gpus):
        return "cpu", launch.workers or cores()
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = 1 if launch.ray_address else launch.gpus or 1
    if (launch.gpus or launch.device == "cuda") and found < needed:
        instead = f"--gpus {found}" if found else f"--device cpu --workers {cores()}"
        raise UsageError(f"{needed} GPUs asked for, found {found}; use {instead}")
    return ("cuda", launch.gpus or found) if found else ("cpu", cores())


def claim(device: str) -> str:
    """Make 'cuda:N' the only GPU that this process sees. Before CUDA is used."""
    if not device.startswith("cuda:"):
        return device
    import torch

    number, visible = int(device.removeprefix("cuda:")), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(name) for name in range(torch.cuda.device_count())]
    if number >= len(names):
        raise UsageError(f"process {number} of this machine finds {len(names)} GPUs; start one process for each GPU")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number]
    return "cuda"


def fix_kernels() -> None:
    """Make torch's choice of kernels follow from the environment class alone. Before CUDA is used."""
    import torch

    torch.set_num_threads(1)  # torch cuts and picks CPU kernels by the number of threads
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def default_dtype(device: str) -> str:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device == "cuda":
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(cpu_flags()) else "float32"
