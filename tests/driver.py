"""A command of boomgen as a process of its own, and who works on a run."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from boomgen.run import RunDir


def users_of(folder: Path) -> list[int]:
    """Pids of all processes that have a file below a folder open, the longest running first."""
    found, below = [], f"{folder.resolve()}/"
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(file).startswith(below) for file in (place / "fd").iterdir()):
                found.append((int((place / "stat").read_text().rpartition(")")[2].split()[19]), int(place.name)))
    return [pid for _, pid in sorted(found)]


class Driver:
    """`boomgen resume`, or another command, as a process of its own or of a launcher, and its workers."""

    def __init__(
        self, run: RunDir, *command: str, workers: int = 2, launcher: tuple[str, ...] = (sys.executable, "-m")
    ) -> None:
        self.run = run
        line = command or ("boomgen", "resume", str(run.path), "--device", "cpu", "--workers", str(workers))
        assert line[0] == "boomgen"
        self.process = subprocess.Popen(
            [*launcher, *line],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[int]:
        """Pids of all processes but the driver that name the run's folder, the longest running first."""
        found = []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if place.name.isdecimal() and str(self.run.path).encode() in (place / "cmdline").read_bytes():
                    found.append((int((place / "stat").read_text().rpartition(")")[2].split()[19]), int(place.name)))
        return [pid for _, pid in sorted(found) if pid != self.process.pid]

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Until something has come true on the disk."""
        end = time.monotonic() + 240
        while not done():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < end, "no progress"
            time.sleep(0.005)

    def wait_published(self, count: int) -> None:
        self.wait_for(lambda: len(self.run.published()) >= count)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out, err

    def no_orphan(self) -> bool:
        """Whether all workers are gone, after a while at most."""
        end = time.monotonic() + 30
        while self.workers() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.workers()
