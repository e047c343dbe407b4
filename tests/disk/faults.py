"""One command under every fault of the disk in turn: `python -m tests.disk.faults ROOT EVERY COMMAND ...`.

Runs with faults.c preloaded. The command and its workers are forks of this process, so that a run costs a fraction of
a second; everything else is as in life: driver and worker processes, pipes, signals. Prints what was found as JSON.
"""

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from boomgen import cli
from boomgen.engines import local
from boomgen.run import RunDir
from boomgen.shard import DONE
from boomgen.verify import verify

COUNT, FAIL, FAIL_FROM_HERE, SHORT, KILL_BEFORE, KILL_AFTER = range(6)
READS, REMOVES, ROOM, BYTES = range(4)
NONE = 0
NAMES = {
    COUNT: "count",
    FAIL: "fails",
    FAIL_FROM_HERE: "fails for good",
    SHORT: "short write",
    KILL_BEFORE: "killed before",
    KILL_AFTER: "killed after",
}
LOG_BYTES = 1 << 22


class Outcome(NamedTuple):
    code: int
    said: str
    hit: str  # the operation that failed, "" if the command ended before it
    count: int  # of operations


class Forked:
    """Stands in for `subprocess.Popen`: a worker that is a fork of its driver."""

    def __init__(self, command: list[str], stdin: int, stdout: int, stderr: Any, **_: Any) -> None:
        there, self_in = os.pipe()
        self_out, here = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for target, handle in enumerate((there, here, stderr.fileno())):
                os.dup2(handle, target)
            for handle in (self_in, self_out, there, here):
                os.close(handle)
            os.setsid()
            sys.stdin, sys.stderr = open(0, closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            leave(lambda: local.serve(command[3], command[4], command[5] == "1", int(command[6])))
        os.close(there)
        os.close(here)
        self.stdin, self.stdout = os.fdopen(self_in, "wb", 0), os.fdopen(self_out, "rb", 0)
        self.returncode: int | None = None

    def wait(self, timeout: float = 0) -> None:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def leave(work: Callable[[], int]) -> None:
    """End this fork with what `work` returns."""
    code = 70
    try:
        code = work()
    except SystemExit as err:
        code = int(err.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Disk:
    """The preloaded library, and a command run on it."""

    def __init__(self, root: Path, command: list[str]) -> None:
        self.root, self.command = root, command
        self.run = root / "runs" / "run"
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.faults_hit.restype = self.library.faults_log.restype = ctypes.c_char_p
        self.library.faults_seen.restype = ctypes.c_long
        self.library.faults_setup(os.fsencode(root), ctypes.c_long(LOG_BYTES))

    def attempt(self, at: int = 0, mode: int = COUNT, error: int = NONE) -> Outcome:
        """Run the command with a fault at its `at`-th operation on files, and wait for all of its processes."""
        alive, inherited = os.pipe()
        with tempfile.TemporaryFile() as said:
            self.library.faults_arm(ctypes.c_long(at), mode, error)
            child = os.fork()
            if child == 0:
                os.close(alive)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                leave(lambda: cli.main(self.command))
            os.close(inherited)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.read(alive, 1)  # the end: no worker holds the other end any more
            os.close(alive)
            said.seek(0)
            text = said.read().decode()
        hit, count = self.library.faults_hit().decode(), int(self.library.faults_seen())
        if mode != COUNT:
            self.library.faults_arm(ctypes.c_long(0), COUNT, NONE)  # this process touches the files too
        return Outcome(code, text, hit, count)

    def state(self) -> dict[str, bytes]:
        """Every file beside and below the run, but for logs and times."""
        home = self.root / "runs"
        files = (path for path in home.rglob("*") if path.is_file() and "logs" not in path.parts and path.name != DONE)
        return {path.relative_to(home).as_posix(): path.read_bytes() for path in files}

    def operations(self) -> list[tuple[int, str]]:
        """(what it changes, operation) of every operation since they were counted."""
        lines = self.library.faults_log().decode(errors="replace").splitlines()
        return [(int(line[0]), plain(line[2:])) for line in lines]


def faults(changes: int) -> Iterator[tuple[int, int]]:
    """What can befall an operation that changes this on the disk: (mode, errno).

    Before a read, a kill leaves what it leaves after the last change; a read fails for one reason only.
    """
    yield FAIL, errno.EIO
    if changes == READS:
        return
    yield from ((mode, NONE) for mode in (KILL_BEFORE, KILL_AFTER))
    yield FAIL, errno.EROFS
    if changes >= ROOM:
        yield from ((FAIL, code) for code in (errno.ENOSPC, errno.EDQUOT))
        yield from ((FAIL_FROM_HERE, code) for code in (errno.ENOSPC, errno.EROFS))
    if changes == BYTES:
        yield SHORT, NONE


def plain(operation: str) -> str:
    """An operation without what differs between two runs of one command."""
    operation = re.sub(r"\.\d+@\S+?planning-\w+", ".planning", operation)
    return re.sub(r"(?<=[-.])[0-9a-f]{8,12}(?=$|/)", "ID", operation)


def judge(disk: Disk, at: int, mode: int, error: int, undisturbed: dict[str, bytes]) -> Iterator[str]:
    """What is wrong with how the command bears this fault."""
    first = disk.attempt(at, mode, error)
    fault = f"{NAMES[mode]} {os.strerror(error) if error else ''} at {at}: {first.hit}"
    finished = first.code == 0 and disk.state() == undisturbed
    if first.code not in (0, 1, 2, -signal.SIGKILL):
        yield f"{fault}: exit code {first.code}: {first.said}"
    if first.code == 0 and not finished:
        differs = {name for name, data in disk.state().items() if undisturbed.get(name) != data}
        yield f"{fault}: exit code 0 and other files: {differs or 'some are missing'}"
    named = os.strerror(error) in first.said or Path(first.hit).name in first.said
    if first.code in (1, 2) and (error == NONE or not named):
        yield f"{fault}: the cause is not said: {first.said}"
    if first.code in (1, 2) and "Traceback" in first.said:
        yield f"{fault}: a traceback: {first.said}"
    again = disk.attempt()
    if again.code != 0:
        yield f"{fault}: exit code {first.code}: {first.said}; then the same command: {again.code}: {again.said}"
    elif (state := disk.state()) != undisturbed:
        names = {name for name in state.keys() | undisturbed.keys() if state.get(name) != undisturbed.get(name)}
        yield f"{fault}: exit code {first.code}; after a resume these differ: {sorted(names)}"
    elif unsound := list(verify(RunDir(disk.run))):
        yield f"{fault}: not sound after a resume: {unsound}"


def main(root: Path, every: int, command: list[str]) -> dict[str, Any]:
    forking = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    local.subprocess = forking  # type: ignore[attr-defined]
    disk = Disk(root, command)
    warm_up(command, root)
    gc.freeze()
    for _ in range(2):  # the first may still import something
        shutil.rmtree(root / "runs", ignore_errors=True)
        whole = disk.attempt()
    assert whole.code == 0, whole.said
    operations, undisturbed = disk.operations(), disk.state()
    points = [(at, *fault) for at, (changes, _) in enumerate(operations[: whole.count], 1) for fault in faults(changes)]
    chosen = points[::every]
    wrong = []
    for point in chosen:
        shutil.rmtree(root / "runs", ignore_errors=True)
        wrong += judge(disk, *point, undisturbed)
    kinds = sorted({operation for _, operation in operations})
    return {"operations": whole.count, "points": len(points), "tried": len(chosen), "kinds": kinds, "wrong": wrong}


def warm_up(command: list[str], root: Path) -> None:
    """Import here, once, what the forks would each import for themselves."""
    from boomgen.worker import Worker

    shutil.rmtree(root / "warm", ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["plan", *command[1 : command.index("--workers")], "--out", str(root / "warm")]) == 0
        worker = Worker(RunDir(root / "warm"))
        worker.make_shard(0)
    worker.pool.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
