"""The engine of one machine: a process per device, shard numbers handed out one at a time.

The driver writes shard numbers to a worker's stdin and reads one JSON event a line from its stdout; the worker's own
output goes to a log. A worker that dies is noticed by its closed pipe, its shard is handed out again. Engines move
only shard numbers, so a shard made twice is harmless.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from boomgen import env
from boomgen.engines.crew import Crew
from boomgen.engines.handout import TICK, Event, HandOut, set_aside
from boomgen.errors import BoomgenError
from boomgen.heartbeat import Telling
from boomgen.run import RunDir
from boomgen.untrusted import printable

SECRETS = re.compile("(TOKEN|PASSWORD|_KEY)$|SECRET|^FSSPEC_", re.IGNORECASE)
"""Names of environment variables that reach a worker through its pipe: its environment can be read from outside."""


OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""The plan names commits that are in the cache: of many workers, none may ask the Hub."""


class _Hand:
    """One worker process, as the driver sees it."""

    def __init__(self, run: RunDir, number: int, device: str, allow_mixed: bool, log: Path) -> None:
        self.number, self.device = number, device
        self.started = self.idle = False
        self._rest = b""
        command = [sys.executable, "-m", __name__, str(run.path.resolve()), device, str(int(allow_mixed)), str(number)]
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if not SECRETS.search(name)} | OFFLINE,
            )
        self._write(json.dumps({name: value for name, value in os.environ.items() if SECRETS.search(name)}))

    def give(self, shard: int) -> None:
        self.idle = False
        self._write(str(shard))

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is seen on the other pipe
            os.write(self.process.stdin.fileno(), f"{line}\n".encode())

    def events(self) -> list[Event] | None:
        """What it has said since; None once it has gone."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [Event(**json.loads(line)) for line in lines] if data else None

    def end(self) -> None:
        """Ask it to end. The closed pipe wakes a read that began just after the signal came."""
        assert self.process.stdin is not None
        self.process.terminate()
        self.process.stdin.close()

    def wait(self) -> None:
        """Wait for its end; it was told, or is dead. One that waits for a disk does not even die: it is left."""
        for _ in range(2):
            try:
                self.process.wait(timeout=20)
                return
            except subprocess.TimeoutExpired:
                self.process.kill()

    def close(self) -> None:
        """Wait for its end, and close its pipes."""
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class LocalEngine(Crew[_Hand]):
    """Hands out shards to one worker per device."""

    def __init__(
        self, run: RunDir, devices: Sequence[str], allow_mixed: bool = False, patience: float | None = None
    ) -> None:
        super().__init__(run, patience)
        self.devices, self.allow_mixed = devices, allow_mixed
        self.selector = selectors.DefaultSelector()

    def run(self, shards: Sequence[int]) -> Iterator[Event]:
        """Make the shards in this order of hand-out; every event as it happens.

        Raises:
            BoomgenError: no worker can start; or, when all others are done, shards failed ATTEMPTS times.
        """
        self.handout = HandOut(shards, self.patience)
        self.run_dir.logs.mkdir(exist_ok=True)
        try:
            for number in range(min(len(self.devices), len(shards))):
                self.hire(number)
            while self.handout.open:
                for key, _ in self.selector.select(timeout=1.0):
                    yield from self._step(key.data)
                yield from self.wake()
        finally:
            for hand in self.hands.values():
                hand.end()
            for hand in self.hands.values():
                hand.close()
        set_aside(self.handout.aside, self.run_dir.path)

    def start(self, number: int) -> _Hand:
        hand = _Hand(self.run_dir, number, self.devices[number], self.allow_mixed, self.log(number))
        self.handout.began(number, time.monotonic())
        self.selector.register(hand.process.stdout, selectors.EVENT_READ, hand)  # type: ignore[arg-type]
        return hand

    def dismiss(self, hand: _Hand) -> None:
        self.selector.unregister(hand.process.stdout)  # type: ignore[arg-type]
        hand.process.kill()
        hand.close()

    def _step(self, hand: _Hand) -> list[Event]:
        if (events := hand.events()) is None:
            hand.wait()
            return self.lost(hand, f"died with exit code {hand.process.returncode}")
        for position, event in enumerate(events):
            self.handout.hear(hand.number, event, time.monotonic())
            if event.kind == "fatal":
                return events[:position] + self.fatal(hand, event.text)
            if event.kind in ("ready", "done"):
                hand.started = hand.idle = True
        return events


def serve(path: str, device: str, allow_mixed: bool, number: int) -> int:
    """A worker's life: read shard numbers, make them, say so. Ends with its driver, or on SIGTERM."""
    pipe = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def say(kind: str, shard: int = -1, **more: Any) -> None:
        os.write(pipe, json.dumps({"kind": kind, "shard": shard, **more}).encode() + b"\n")

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # driver and scheduler may both ask; one clean-up is enough
        sys.exit(75)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= json.loads(sys.stdin.readline() or "{}")
    try:
        worker = loaded(RunDir(path), env.claim(device), allow_mixed, number)
    except BoomgenError as err:
        say("fatal", text=str(err))
        return 1
    with contextlib.closing(worker):
        say("ready")
        for line in sys.stdin:
            serve_shard(worker, int(line), say)
    return 0


def loaded(run: RunDir, device: str, allow_mixed: bool, number: int) -> Telling:
    """A worker that tells of itself, from before it loads torch and the model."""

    def load() -> Any:
        from boomgen.worker import Worker

        return Worker(run, device, allow_mixed)

    return Telling(run, device, number, load)


def make_logged(worker: Any, shard: int, tick: Callable[[int], None], log: Callable[[str], None]) -> dict[str, Any]:
    """Make one shard; its done record. What came of it, with the time of its beginning, goes to the log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        record: dict[str, Any] = worker.make_shard(shard, tick)
    except (BrokenPipeError, BoomgenError):
        raise
    except Exception as err:
        log(f"{stamp} shard {shard} failed: {gist(err)}\n{textwrap.indent(traceback.format_exc(), '    ')}")
        raise
    seconds = " ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
    log(f"{stamp} shard {shard} done: {record['ok']} of {record['rows']} rows, s: {seconds}")
    return record


def gist(err: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"


def serve_shard(worker: Any, shard: int, say: Any) -> None:
    """Make one shard and say what came of it. SystemExit where a fresh process is needed for the next."""
    last = time.monotonic()

    def tick(_: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TICK:
            last = time.monotonic()
            say("tick", shard)

    try:
        record = make_logged(worker, shard, tick, write_log)
    except BrokenPipeError:
        sys.exit(75)  # the driver has gone
    except BoomgenError as err:
        say("fatal", shard, text=str(err))
    except Exception as err:
        say("failed", shard, text=gist(err))
        if not isinstance(err, OSError | BoomgenError):
            sys.exit(1)  # a device that failed once may fail for ever in this process; the driver starts a fresh one
        say("ready")
    else:
        say("done", shard, rows=record["rows"], ok=record["ok"])


def write_log(text: str) -> None:
    """Add to the log of a worker, whose stderr it is."""
    with contextlib.suppress(OSError):  # on a full disk the shard counts, not the talk about it
        print(printable(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4])))
