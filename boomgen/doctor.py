"""Is this machine ready? Each finding says what it means."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from boomgen import env, models
from boomgen.errors import BoomgenError
from boomgen.shard import write_durable

Finding = tuple[bool, str]


def findings(out: Path) -> Iterator[Finding]:
    """(good?, one line) per check."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = f"{gpus} GPUs ({torch.cuda.get_device_name()})" if gpus else "no GPU: the work runs on the CPU"
    yield True, f"torch {torch.__version__}, {where}"
    device = "cuda" if gpus else "cpu"
    yield True, f"{env.cores()} CPU cores; the network runs in {env.default_dtype(device)} on {device}"
    if shutil.which("g++"):
        yield True, "g++ found: long CPU jobs are compiled ahead of time"
    else:
        yield True, "no g++: CPU jobs run uncompiled, which is slower; install a C++ compiler to change that"
    yield _writable(out)
    free = shutil.disk_usage(out if out.exists() else Path.cwd()).free / 1e9
    yield free > 1, f"{free:.0f} GB free in {out}"
    try:
        yield True, f"embedded model {models.inspect('fashion-patched-ddpm').sha256[:12]} is readable"
    except BoomgenError as err:
        yield False, str(err)
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    yield (
        True,
        "HF_HUB_OFFLINE=1: only cached hub models and data sets" if offline else "hub models are fetched as needed",
    )


def _writable(out: Path) -> Finding:
    """Write, sync and rename, as publishing a shard does."""
    probe = out / f".boomgen-doctor-{uuid.uuid4().hex[:8]}"
    try:
        probe.mkdir(parents=True)
        write_durable(probe / "a", b"x")
        probe.rename(probe.with_suffix(".moved"))
        shutil.rmtree(probe.with_suffix(".moved"))
    except OSError as err:
        return False, f"{out} cannot hold a run: {err.strerror}; choose another --out"
    return True, f"{out} can be written, synced and renamed in"
