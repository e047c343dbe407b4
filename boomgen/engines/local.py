"""The engine of one machine: a process per device, shard numbers handed out one at a time.

The driver writes shard numbers to a worker's stdin and reads one JSON event a line from its stdout; the worker's own
output goes to a log. A worker that dies is noticed by its closed pipe, its shard is handed out again. Engines move
only shard numbers, so a shard made twice is harmless.
"""

import collections
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from boomgen import env
from boomgen.errors import BoomgenError
from boomgen.run import RunDir
from boomgen.untrusted import printable

ATTEMPTS = 3
"""A shard that failed so often is set aside, and the rest goes on."""


SECRETS = re.compile("(TOKEN|PASSWORD|_KEY)$|SECRET", re.IGNORECASE)
"""Names of environment variables that reach a worker through its pipe: its environment can be read from outside."""


OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""The plan names commits that are in the cache: of many workers, none may ask the Hub."""


class Event(NamedTuple):
    """What a worker said. kind: ready, tick, done, failed, fatal; or lost (it died), gone (it never starts)."""

    kind: str
    shard: int
    text: str = ""
    rows: int = 0
    ok: int = 0


class _Hand:
    """One worker process, as the driver sees it."""

    def __init__(self, run: RunDir, number: int, device: str, allow_mixed: bool) -> None:
        run.logs.mkdir(exist_ok=True)
        self.number, self.device = number, device
        self.log = run.logs / f"worker-{number:03d}.log"
        self.shard: int | None = None
        self.started, self.idle = False, False
        self._rest = b""
        command = [sys.executable, "-m", __name__, str(run.path.resolve()), device, str(int(allow_mixed))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if not SECRETS.search(name)} | OFFLINE,
            )
        self._write(json.dumps({name: value for name, value in os.environ.items() if SECRETS.search(name)}))

    def give(self, shard: int) -> None:
        self.shard, self.idle = shard, False
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

    def close(self) -> None:
        """Wait for its end; it was told, or is dead."""
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class LocalEngine:
    """Hands out shards to one worker per device."""

    def __init__(self, run: RunDir, devices: Sequence[str], allow_mixed: bool = False) -> None:
        self.run_dir, self.devices, self.allow_mixed = run, devices, allow_mixed
        self.hands: dict[int, _Hand] = {}
        self.selector = selectors.DefaultSelector()
        self.failures: collections.Counter[int] = collections.Counter()
        self.stillborn: collections.Counter[int] = collections.Counter()

    def run(self, shards: Sequence[int]) -> Iterator[Event]:
        """Make the shards in this order of hand-out; every event as it happens.

        Raises:
            BoomgenError: no worker can start; or, when all others are done, shards failed ATTEMPTS times.
        """
        queue = collections.deque(shards)
        aside: dict[int, str] = {}
        try:
            for number, device in enumerate(self.devices[: len(queue)]):
                self._start(number, device)
            while queue or any(hand.shard is not None for hand in self.hands.values()):
                for key, _ in self.selector.select(timeout=1.0):
                    for event in self._step(key.data, queue):
                        yield event
                        if event.kind == "fatal":
                            raise BoomgenError(event.text)
                        if event.kind in ("failed", "lost") and self.failures[event.shard] >= ATTEMPTS:
                            aside[event.shard] = event.text
        finally:
            for hand in self.hands.values():
                hand.end()
            for hand in self.hands.values():
                hand.close()
        if aside:
            shard, text = next(iter(aside.items()))
            raise BoomgenError(
                f"{len(aside)} shards failed {ATTEMPTS} times and were set aside; shard {shard}: {text}; "
                f"see boomgen logs {self.run_dir.path}"
            )

    def _start(self, number: int, device: str) -> None:
        hand = _Hand(self.run_dir, number, device, self.allow_mixed)
        self.hands[number] = hand
        self.selector.register(hand.process.stdout, selectors.EVENT_READ, hand)  # type: ignore[arg-type]

    def _step(self, hand: _Hand, queue: collections.deque[int]) -> list[Event]:
        events = hand.events()
        if events is None:
            return self._lost(hand, queue)
        for event in events:
            if event.kind in ("done", "failed"):
                hand.shard = None
            if event.kind == "failed":
                self._again(event.shard, queue)
            if event.kind in ("ready", "done"):
                hand.started, hand.idle = True, True
        self._wake(queue)
        return events

    def _wake(self, queue: collections.deque[int]) -> None:
        """Whoever is idle takes the next shard, also one that came back."""
        for hand in self.hands.values():
            if queue and hand.idle:
                hand.give(queue.popleft())

    def _lost(self, hand: _Hand, queue: collections.deque[int]) -> list[Event]:
        self.selector.unregister(hand.process.stdout)  # type: ignore[arg-type]
        hand.close()
        self.stillborn[hand.number] = 0 if hand.started else self.stillborn[hand.number] + 1
        del self.hands[hand.number]
        if self.stillborn[hand.number] >= ATTEMPTS:
            if queue and not self.hands:
                raise BoomgenError(f"workers die while starting (exit {hand.process.returncode}); see {hand.log}")
            return [Event("gone", -1, f"worker {hand.number} ({hand.device}) dies while starting; see {hand.log}")]
        events = []
        if hand.shard is not None:
            self._again(hand.shard, queue)
            cause = f"worker {hand.number} died with exit code {hand.process.returncode}"
            events.append(Event("lost", hand.shard, cause))
        if queue:
            self._start(hand.number, hand.device)
        return events

    def _again(self, shard: int, queue: collections.deque[int]) -> None:
        self.failures[shard] += 1
        if self.failures[shard] < ATTEMPTS:
            queue.append(shard)


def serve(path: str, device: str, allow_mixed: bool) -> int:
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
        from boomgen.worker import Worker

        worker = Worker(RunDir(path), env.claim(device), allow_mixed)
    except BoomgenError as err:
        say("fatal", text=str(err))
        return 1
    say("ready")
    for line in sys.stdin:
        _serve_shard(worker, int(line), say)
    return 0


def _serve_shard(worker: Any, shard: int, say: Any) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        record = worker.make_shard(shard, lambda rows: say("tick", shard, rows=rows))
    except BrokenPipeError:
        sys.exit(75)  # the driver has gone
    except BoomgenError as err:
        say("fatal", shard, text=str(err))
    except Exception as err:
        import traceback

        _log(f"{stamp} shard {shard} failed\n{traceback.format_exc()}")
        say("failed", shard, text=f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}")
        if not isinstance(err, OSError | BoomgenError):
            sys.exit(1)  # a device that failed once may fail for ever in this process; the driver starts a fresh one
        say("ready")
    else:
        seconds = " ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
        _log(f"{stamp} shard {shard} done: {record['ok']} of {record['rows']} rows, s: {seconds}")
        say("done", shard, rows=record["rows"], ok=record["ok"])


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # on a full disk the shard counts, not the talk about it
        print(printable(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
