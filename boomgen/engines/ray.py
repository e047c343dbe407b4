"""The engine of a Ray cluster: an actor per GPU or CPU core, shard numbers handed out one at a time.

Ray places the actors and tells of their deaths; it retries nothing, since only the hand-out knows what a death costs.
What an actor says are the items of a generator, so that `ray.wait` hears of each. Without an address, a cluster is
started on this machine and ends with the run.
"""

import contextlib
import math
import os
import queue
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boomgen.engines.handout import Event, HandOut, set_aside
from boomgen.engines.local import OFFLINE, SECRETS, _serve_shard, gist, write_log
from boomgen.engines.ray_cluster import cluster, ended, signals_noted, stdout_kept
from boomgen.errors import BoomgenError
from boomgen.heartbeat import Telling, forget
from boomgen.run import RunDir

NOISE = "ray.out"
"""What Ray itself says, in RUN/logs."""
CLIENTS = ("HF_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
"""How variables begin that tell where data lies and who asks for it."""
LOOK = 1.0  # seconds between two looks at who is hung
WAIT = 10.0  # seconds without a place, after which it is said
RESOURCES: dict[str, tuple[str, dict[str, int]]] = {"cuda": ("GPU", {"num_gpus": 1}), "cpu": ("CPU", {"num_cpus": 1})}


class Actor:
    """A worker in a process of Ray's. It works in a thread, so that what it says leaves at once."""

    def __init__(self, path: str, number: int, device: str, allow_mixed: bool) -> None:
        self.path, self.number, self.device, self.allow_mixed = path, number, device, allow_mixed
        self.thread = ThreadPoolExecutor(1)

    def start(self, environ: dict[str, str]) -> Iterator[Event]:
        """Load the model: says that it has a place, then ready or fatal."""
        yield Event("placed", -1)
        os.environ |= environ
        yield from self._told(self._load)

    def make(self, shard: int) -> Iterator[Event]:
        """Make one shard. Says neither ready nor done at the end where a fresh process is needed."""
        yield from self._told(lambda say: _serve_shard(self.worker, shard, say))

    def _load(self, say: Callable[..., None]) -> None:
        try:
            run = RunDir(self.path)
            _write_to(run.logs / f"worker-{self.number:03d}.log")
            from boomgen.worker import Worker

            self.worker = Telling(Worker(run, self.device, self.allow_mixed), self.number)
        except BoomgenError as err:
            say("fatal", text=str(err))
        except Exception:
            write_log(traceback.format_exc())
            raise
        else:
            say("ready")

    def _told(self, work: Callable[[Callable[..., None]], None]) -> Iterator[Event]:
        said = queue.SimpleQueue[Event | None]()

        def told() -> None:
            try:
                work(lambda kind, shard=-1, **more: said.put(Event(kind, shard, **more)))
            finally:
                said.put(None)

        end = self.thread.submit(told)
        while (event := said.get()) is not None:
            yield event
        with contextlib.suppress(SystemExit):  # the driver sees that it is not ready
            end.result()


def _write_to(log: Path) -> None:
    """Have everything that this process writes go to a log."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)


class _Hand:
    """One actor, as the driver sees it. `told` is None between two calls."""

    def __init__(self, number: int, actor: Any, environ: dict[str, str]) -> None:
        self.number, self.actor = number, actor
        self.placed = self.started = self.idle = False  # started: had a shard, which counts its deaths
        self.told: Any = actor.start.remote(environ)

    def give(self, shard: int) -> None:
        self.started, self.idle, self.told = True, False, self.actor.make.remote(shard)


class RayEngine:
    """Hands out shards to one actor per device ('cuda' or 'cpu').

    `workers`: None for as many as the cluster at `address` has devices. `patience`: as HandOut has it.
    """

    def __init__(
        self,
        run: RunDir,
        kind: str,
        workers: int | None,
        address: str | None = None,
        allow_mixed: bool = False,
        patience: float | None = None,
    ) -> None:
        self.run_dir, self.kind, self.workers, self.address = run, kind, workers, address
        self.allow_mixed, self.patience = allow_mixed, patience
        self.hands: dict[int, _Hand] = {}
        told = {name: value for name, value in os.environ.items() if name.startswith(CLIENTS) or SECRETS.search(name)}
        self.environ = told | OFFLINE

    def run(self, shards: Sequence[int]) -> Iterator[Event]:
        """Make the shards in this order of hand-out; every event as it happens.

        Raises:
            UsageError: Ray is not installed.
            BoomgenError: there is no such cluster, or no worker can start; or, when all others are done, shards failed
                ATTEMPTS times.
        """
        handout = HandOut(shards, self.patience)
        self.run_dir.logs.mkdir(exist_ok=True)
        try:
            with (
                stdout_kept(self.run_dir.logs / NOISE),
                signals_noted() as answer,
                cluster(self.address, self.kind, self.workers) as self.ray,
            ):
                yield from self._hand_out(handout, answer)
        finally:
            for number in self.hands:  # they were killed where they stood
                forget(self.run_dir, number)
                if (shard := handout.held(number)) is not None:
                    for folder in self.run_dir.staging.glob(f"{shard:05d}-*"):
                        shutil.rmtree(folder, ignore_errors=True)
        set_aside(handout.aside, self.run_dir.path)

    def _hand_out(self, handout: HandOut, answer: Callable[[], None]) -> Iterator[Event]:
        answer()
        resource, asked = RESOURCES[self.kind]
        found = int(self.ray.cluster_resources().get(resource, 0))
        if not (self.workers or found):
            raise BoomgenError(f"the Ray cluster has no {resource}; add a node that has one, or say how many will come")
        self.actors = self.ray.remote(max_restarts=0, max_task_retries=0, **asked)(Actor)
        try:
            for number in range(min(self.workers or found, len(handout.open))):
                self._start(number)
            wait_told = time.monotonic() + WAIT if self.address else math.inf  # a cluster of our own has room for all
            while handout.open:
                if part := ended(self.ray):
                    raise BoomgenError(
                        f"Ray's {part} was killed, and all workers with it; what is whole stays, go on "
                        f"with: boomgen resume {self.run_dir.path}"
                    )
                hands = {hand.told: hand for hand in self.hands.values() if hand.told is not None}
                for told in self.ray.wait(list(hands), timeout=LOOK)[0]:
                    for event in self._step(hands[told], handout):
                        yield event
                        if event.kind == "fatal":
                            raise BoomgenError(event.text)
                yield from self._wake(handout)
                if time.monotonic() > wait_told:
                    yield from self._waiting(resource)
                    wait_told = math.inf
                answer()
        finally:
            for hand in self.hands.values():
                self.ray.kill(hand.actor)

    def _start(self, number: int) -> None:
        actor = self.actors.remote(str(self.run_dir.path.resolve()), number, self.kind, self.allow_mixed)
        self.hands[number] = _Hand(number, actor, self.environ)

    def _step(self, hand: _Hand, handout: HandOut) -> list[Event]:
        try:
            event: Event = self.ray.get(next(hand.told))
        except StopIteration:
            hand.told = None
            return [] if hand.idle else self._lost(hand, handout, "left")
        except self.ray.exceptions.RayError as err:
            return self._lost(hand, handout, _cause(err))
        if event.kind == "placed":
            hand.placed = True
            return []
        handout.hear(hand.number, event, time.monotonic())
        if event.kind in ("ready", "done"):
            hand.idle = True
        return [event]

    def _waiting(self, resource: str) -> list[Event]:
        count = sum(not hand.placed for hand in self.hands.values())
        text = f"{count} of {len(self.hands)} workers wait until Ray has a free {resource} for them"
        return [Event("waiting", -1, text)] if count else []

    def _wake(self, handout: HandOut) -> list[Event]:
        """Whoever is idle takes the next shard, also one that came back; whoever is hung is killed."""
        now = time.monotonic()
        for hand in self.hands.values():
            if hand.idle and hand.told is None and (shard := handout.take(hand.number, now)) is not None:
                hand.give(shard)
        late = [self.hands[number] for number in handout.overdue(now)]
        return [event for hand in late for event in self._lost(hand, handout, "hung and was killed")]

    def _lost(self, hand: _Hand, handout: HandOut, what: str) -> list[Event]:
        self.ray.kill(hand.actor)
        del self.hands[hand.number]
        forget(self.run_dir, hand.number)
        log = self.run_dir.logs / f"worker-{hand.number:03d}.log"
        if not handout.again(hand.number, hand.started):
            if handout.open and not self.hands:
                raise BoomgenError(f"workers die while starting ({what}); see {log}")
            return [Event("gone", -1, f"worker {hand.number} ({self.kind}) dies while starting; see {log}")]
        cause = f"worker {hand.number} {what}"
        lost = handout.failed(hand.number, cause)
        if handout.open:
            self._start(hand.number)
        return [] if lost is None else [Event("lost", lost, cause)]


def _cause(err: Exception) -> str:
    """The gist of one of Ray's many lines: what a call raised, or the first sentence on how an actor died."""
    raised = getattr(err, "cause", None)
    lines = str(err).splitlines() or [""]
    return f"died: {gist(raised) if raised else lines[-1].strip().partition('. ')[0].rstrip('.')}"
