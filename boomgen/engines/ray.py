"""The engine of a Ray cluster: an actor per GPU or CPU core, shard numbers handed out one at a time.

Ray places the actors and tells of their deaths; it retries nothing, since only the hand-out knows what a death costs.
What an actor says are the items of a generator, so that `ray.wait` hears of each. Without an address, a cluster is
started on this machine and ends with the run.
"""

import contextlib
import functools
import importlib
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boomgen.engines.handout import Event, HandOut, set_aside
from boomgen.engines.local import OFFLINE, SECRETS, _serve_shard, write_log
from boomgen.errors import BoomgenError, UsageError
from boomgen.report import Telling, forget
from boomgen.run import RunDir

NOISE = "ray.out"
"""What Ray itself says, in RUN/logs."""
STORE = 80 * 2**20  # bytes of the object store: records are small, and 75 MB is the least
CLIENTS = ("HF_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
"""How variables begin that tell where data lies and who asks for it."""
LOOK = 1.0  # seconds between two looks at who is hung
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
RESOURCES: dict[str, tuple[str, dict[str, int]]] = {"cuda": ("GPU", {"num_gpus": 1}), "cpu": ("CPU", {"num_cpus": 1})}


class Actor:
    """A worker in a process of Ray's. It works in a thread, so that what it says leaves at once."""

    def __init__(self, path: str, number: int, device: str, allow_mixed: bool) -> None:
        self.path, self.number, self.device, self.allow_mixed = path, number, device, allow_mixed
        self.thread = ThreadPoolExecutor(1)

    def start(self, environ: dict[str, str]) -> Iterator[Event]:
        """Load the model: says ready, or fatal."""
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
        self.started = self.idle = False  # started: had a shard, which counts its deaths
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
                _stdout_kept(self.run_dir.logs / NOISE),
                _signals_noted() as answer,
                _cluster(self.address, self.kind, self.workers) as self.ray,
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
            while handout.open:
                hands = {hand.told: hand for hand in self.hands.values() if hand.told is not None}
                for told in self.ray.wait(list(hands), timeout=LOOK)[0]:
                    for event in self._step(hands[told], handout):
                        yield event
                        if event.kind == "fatal":
                            raise BoomgenError(event.text)
                yield from self._wake(handout)
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
        handout.hear(hand.number, event, time.monotonic())
        if event.kind in ("ready", "done"):
            hand.idle = True
        return [event]

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
    lines = str(raised or err).splitlines() or [""]
    gist = f"{type(raised).__name__}: {lines[0]}" if raised else lines[-1].strip().partition(". ")[0].rstrip(".")
    return f"died: {gist}"


@contextlib.contextmanager
def _cluster(address: str | None, kind: str, workers: int | None) -> Iterator[Any]:
    """Ray, connected to the cluster at an address, or to one of our own with so many workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as err:
        raise UsageError("--engine ray needs Ray, which is not installed; pip install 'boomgen[ray]'") from err
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        try:
            if address:
                _reach(address)
                ray.init(address=address, **QUIET)
            else:
                stack.enter_context(_own_cluster(ray, kind, workers or 1))
        except (OSError, RuntimeError, ValueError) as err:
            at = f"no Ray cluster at {address}" if address else "Ray does not start here"
            raise BoomgenError(f"{at}: {' '.join(str(err).split())}") from err
        yield ray


def _reach(address: str) -> None:
    """Raises OSError where nothing listens: Ray itself would try for minutes, deaf to signals."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def _own_cluster(ray: Any, kind: str, workers: int) -> Iterator[None]:
    """A cluster that only this machine reaches, and of its users only this one, by a token in a private file."""
    folder = Path(tempfile.mkdtemp(prefix="boomgen-", dir="/tmp"))  # sockets in it have 107 characters at most
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(_token())
    try:
        with _environ(token):
            ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=workers if kind == "cuda" else 0,
                object_store_memory=STORE,
                include_dashboard=False,
                _node_ip_address="127.0.0.2",  # Ray would replace 127.0.0.1 by the outer address
                _temp_dir=str(folder),
                **QUIET,
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _token() -> str:
    """One for this process, since Ray remembers it."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environ(token: Path) -> Iterator[None]:
    """The environment that Ray's processes inherit: without secrets, and so that Ray asks for a token."""
    before = dict(os.environ)
    try:
        for name in filter(SECRETS.search, before):
            del os.environ[name]
        os.environ.pop("RAY_AUTH_MODE", None)  # where it is unset, Ray sets it, also for a process that has begun
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  not 15: nothing else is to run before the workers
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def _stdout_kept(log: Path) -> Iterator[None]:
    """Ray writes to the stdout of this process, whatever it is told: meanwhile that leads to a log."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with log.open("a", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _signals_noted() -> Iterator[Callable[[], None]]:
    """The first signal is noted, and answered between two calls of Ray, by what is yielded here; a second one at once.

    Ray drops what a signal's handler raises inside its calls, and brings a handler of its own.
    """
    noted: list[tuple[Any, ...]] = []

    def note(number: int, frame: Any) -> None:
        noted.append((number, frame))
        if len(noted) > 1:
            before[number](number, frame)

    def answer() -> None:
        for number in before:
            signal.signal(number, note)
        if noted:
            before[noted[0][0]](*noted[0])

    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    before: dict[int, Any] = {number: handler for number, handler in found.items() if callable(handler)}

    try:
        answer()
        yield answer
    except SystemExit:  # Ray's own handler, while it started
        before[signal.SIGTERM](signal.SIGTERM, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
