"""What the benchmarks share: the machine in one line, the command line with its time, tables."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from boomgen import env

ROOT = Path(__file__).parent.parent


class Took(NamedTuple):
    """Seconds on the clock, and of CPU time in all processes together."""

    wall: float
    cpu: float


def machine() -> str:
    """What the figures depend on."""
    import torch

    halves = "bfloat16 in hardware" if env.default_dtype("cpu") == "bfloat16" else "no bfloat16 in hardware"
    busy = f"load {os.getloadavg()[0]:.1f} before the start"
    return (
        f"{env.cores()} cores, {torch.backends.cpu.get_cpu_capability()}, {halves}, torch {torch.__version__}, {busy}"
    )


def timed(command: Sequence[Any], **more: Any) -> tuple[Took, str]:
    """Run a program to its end: what it took, and its stdout."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, **more)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), done.stdout


def boomgen(*args: Any) -> Took:
    """The command line as a user runs it."""
    return timed([sys.executable, "-m", "boomgen", *args], cwd=ROOT)[0]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [" | ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in cells]
    rule = "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
