"""The engine of a Ray cluster: an actor per GPU or CPU core, shard numbers handed out one at a time.

Ray places the actors and tells of their deaths; it retries nothing, since only the hand-out knows what a death costs.
What an actor says are the items of a generator, so that `ray.wait` hears of each. Without an address, a cluster is
started on this machine and ends with the run.
"""

import contextlib
import os
import queue
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boomgen.engines.crew import Crew
from boomgen.engines.handout import Event, HandOut, set_aside
from boomgen.engines.local import OFFLINE, gist, loaded, serve_shard, write_log
from boomgen.engines.ray_cluster import Lost, cluster, signals_noted, stdout_kept
from boomgen.errors import BoomgenError
from boomgen.heartbeat import forget
from boomgen.run import RunDir

NOISE = "ray.out"
"""What Ray itself says, in RUN/logs."""
CLIENTS = ("HF_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
"""How variables begin that tell where data lies and who asks for it."""
LOOK = 1.0  # seconds between two looks at who is hung
WAIT = 10.0  # seconds without a place, after which it is said
RESOURCES = {"cuda": ("GPU", {"num_gpus": 1, "num_cpus": 0}), "cpu": ("CPU", {"num_cpus": 1})}
"""What an actor takes of its node. Ray would add a core to each GPU, which a node may not have to give."""


class Actor:
    """A worker in a process of Ray's. It works in a thread, so that what it says leaves at once."""

    def __init__(self, path: str, number: int, device: str, allow_mixed: bool) -> None:
        self.path, self.number, self.device, self.allow_mixed = path, number, device, allow_mixed
        self.thread = ThreadPoolExecutor(1)

    def start(self, environ: dict[str, str]) -> Iterator[Event]:
        """Load the model: says on which machine it has a place, then ready or fatal."""
        import ray

        yield Event("placed", -1, f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()}")
        os.environ |= environ
        yield from self._told(self._load)

    def make(self, shard: int) -> Iterator[Event]:
        """Make one shard. Says neither ready nor done at the end where a fresh process is needed."""
        yield from self._told(lambda say: serve_shard(self.worker, shard, say))

    def _load(self, say: Callable[..., None]) -> None:
        try:
            run = RunDir(self.path)
            _write_to(run.logs / f"worker-{self.number:03d}.log")
            self.worker = loaded(run, self.device, self.allow_mixed, self.number)
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

    def __init__(self, number: int, device: str, actor: Any, environ: dict[str, str]) -> None:
        self.number, self.device, self.actor = number, device, actor
        self.node, self.since = "", time.monotonic()  # node: Ray's name of it, once there is a place
        self.started = self.ready = False  # started: had a shard, which counts its deaths
        self.told: Any = actor.start.remote(environ)

    @property
    def idle(self) -> bool:
        return self.ready and self.told is None

    def give(self, shard: int) -> None:
        self.started, self.ready, self.told = True, False, self.actor.make.remote(shard)


class RayEngine(Crew[_Hand]):
    """Hands out shards to one actor per device ('cuda' or 'cpu').

    `workers`: None for as many as the cluster at `address` has devices.
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
        super().__init__(run, patience)
        self.kind, self.workers, self.address = kind, workers, address
        self.allow_mixed, self.waiting = allow_mixed, 0
        self.foreign = set[str]()  # nodes that are of no use
        told = {name: value for name, value in os.environ.items() if name.startswith(CLIENTS)}
        self.environ = told | OFFLINE

    def run(self, shards: Sequence[int]) -> Iterator[Event]:
        """Make the shards in this order of hand-out; every event as it happens.

        Raises:
            UsageError: Ray is not installed.
            BoomgenError: there is no such cluster, or no worker can start; or, when all others are done, shards failed
                ATTEMPTS times.
        """
        self.handout = HandOut(shards, self.patience)
        self.run_dir.logs.mkdir(exist_ok=True)
        try:
            with (
                stdout_kept(self.run_dir.logs / NOISE),
                signals_noted() as answer,
                cluster(self.address, self.kind, self.workers) as (self.ray, lost),
            ):
                yield from self._hand_out(answer, lost)
        finally:
            for number in self.hands:  # they were killed where they stood
                forget(self.run_dir, number)
                if (shard := self.handout.held(number)) is not None:
                    for folder in self.run_dir.staging.glob(f"{shard:05d}-*"):
                        shutil.rmtree(folder, ignore_errors=True)
        set_aside(self.handout.aside, self.run_dir.path)

    def _hand_out(self, answer: Callable[[], None], lost: Lost) -> Iterator[Event]:
        answer()
        resource, asked = RESOURCES[self.kind]
        found = int(self.ray.cluster_resources().get(resource, 0))
        if not (self.workers or found):
            raise BoomgenError(f"the Ray cluster has no {resource}; add a node that has one, or say how many will come")
        self.actors = self.ray.remote(max_restarts=0, max_task_retries=0, **asked)(Actor)
        try:
            for number in range(min(self.workers or found, len(self.handout.open))):
                self.hire(number)
            while self.handout.open:
                if what := lost():
                    raise BoomgenError(
                        f"{what}, and all workers with it; what is whole stays, go on with: boomgen resume "
                        f"{self.run_dir.path}"
                    )
                for hand in self._heard():
                    yield from self._step(hand)
                yield from self.wake()
                yield from self._waiting(resource)
                answer()
        finally:
            for hand in self.hands.values():
                self.dismiss(hand)

    def start(self, number: int) -> _Hand:
        avoid = {"label_selector": {"ray.io/node-id": f"!in({','.join(self.foreign)})"}} if self.foreign else {}
        actor = self.actors.options(**avoid).remote(
            str(self.run_dir.path.resolve()), number, self.kind, self.allow_mixed
        )
        return _Hand(number, self.kind, actor, self.environ)

    def refuse(self, hand: _Hand) -> None:
        """Its node is given no worker any more; the other nodes are, as many as they have devices for."""
        self.leave(hand)
        self.foreign.add(hand.node)
        nodes = [node for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self.foreign]
        if sum(node["Resources"].get(RESOURCES[self.kind][0], 0) for node in nodes) > len(self.hands):
            self.hire(hand.number)

    def dismiss(self, hand: _Hand) -> None:
        self.ray.kill(hand.actor)

    def _heard(self) -> list[_Hand]:
        """All that have said something, as soon as one has; none after LOOK seconds."""
        hands = {hand.told: hand for hand in self.hands.values() if hand.told is not None}
        asked = list(hands)
        if not self.ray.wait(asked, timeout=LOOK)[0]:
            return []
        return [hands[told] for told in self.ray.wait(asked, num_returns=len(asked), timeout=0)[0]]

    def _step(self, hand: _Hand) -> list[Event]:
        try:
            event: Event = self.ray.get(next(hand.told))
        except StopIteration:
            hand.told = None
            return [] if hand.ready else self.lost(hand, "left")
        except self.ray.exceptions.RayError as err:
            return self.lost(hand, _cause(err))
        if event.kind == "placed":
            host, _, hand.node = event.text.rpartition(" ")
            hand.device = f"{self.kind} of {host}"
            self.handout.began(hand.number, time.monotonic())
            return []
        self.handout.hear(hand.number, event, time.monotonic())
        if event.kind == "fatal":
            return self.fatal(hand, event.text)
        if event.kind in ("ready", "done"):
            hand.ready = True
        return [event]

    def _waiting(self, resource: str) -> list[Event]:
        """Told whenever more workers wait than before, since nodes also go. A cluster of our own has room for all."""
        now, before = time.monotonic(), self.waiting
        self.waiting = sum(not hand.node and now - hand.since > WAIT for hand in self.hands.values())
        text = f"{self.waiting} of {len(self.hands)} workers wait until Ray has a free {resource} for them"
        return [Event("waiting", -1, text)] if self.address and self.waiting > before else []


def _cause(err: Exception) -> str:
    """The gist of one of Ray's many lines: what a call raised, or the first sentence on how an actor died."""
    raised = getattr(err, "cause", None)
    lines = str(err).splitlines() or [""]
    return f"died: {gist(raised) if raised else lines[-1].strip().partition('. ')[0].rstrip('.')}"
