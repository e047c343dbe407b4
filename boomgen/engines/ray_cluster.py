"""What the engine of Ray stands on: a cluster, running or started here, its noise kept off the terminal, and signals.

A cluster of our own lies in a folder that its driver has locked, so that another driver knows what a dead one left.
"""

import contextlib
import fcntl
import functools
import importlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from boomgen.engines.local import SECRETS
from boomgen.errors import BoomgenError, UsageError

STORE = 80 * 2**20  # bytes of the object store: records are small, and 75 MB is the least
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK, GONE = 5.0, 30.0  # seconds; after 60, Ray ends this process and says nothing that helps
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
PLACE, OURS, TOKEN = "/tmp", "boomgen-ray-", "token"  # sockets in it have 107 characters at most


Lost = Callable[[], str | None]
"""What a cluster cannot live without and has lost, in a few words. Ray would wait for it, for a minute or for ever."""


@contextlib.contextmanager
def cluster(address: str | None, kind: str, workers: int | None) -> Iterator[tuple[Any, Lost]]:
    """Ray, connected to the cluster at an address, or to one of our own with so many workers; and what it has lost."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as err:
        raise UsageError("--engine ray needs Ray, which is not installed; pip install 'boomgen[ray]'") from err
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if address:
            with _said(f"no Ray cluster at {address}"):
                where = _reach(ray, address)
            with _said(f"the Ray cluster at {address} is not joined; give the command on one of its nodes"):
                ray.init(address=where, **QUIET)
            yield ray, _head_of(where, address)
        else:
            with _said("Ray does not start here"):
                stack.enter_context(_own_cluster(ray, kind, workers or 1))
            yield ray, functools.partial(_dead_part, ray)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Raises BoomgenError for what Ray raises where it does not get on."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as err:
        raise BoomgenError(f"{what}: {' '.join(str(err).split())}") from err


def _dead_part(ray: Any) -> str | None:
    dead = (kind for kind, _ in ray._private.worker._global_node.dead_processes())
    return next((f"Ray's {kind} was killed" for kind in dead if kind in ("raylet", "gcs_server")), None)


def _head_of(where: str, address: str) -> Lost:
    """Looks now and then whether a cluster's head still takes connections; it may be started again."""
    heard = looked = time.monotonic()

    def lost() -> str | None:
        nonlocal heard, looked
        if time.monotonic() - looked < LOOK:
            return None
        with contextlib.suppress(OSError):
            _connect(where)
            heard = time.monotonic()
        looked = time.monotonic()
        return f"the head of the Ray cluster at {address} is gone" if looked - heard > GONE else None

    return lost


def _reach(ray: Any, address: str) -> str:
    """The host:port of a cluster's head, of 'auto' that of RAY_ADDRESS or the one here.

    Raises OSError where nothing listens: Ray itself would try for minutes, deaf to signals.
    """
    where = str(ray._private.services.canonicalize_bootstrap_address_or_die(address))
    _connect(where)
    return where


def _connect(where: str) -> None:
    host, _, port = where.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def _own_cluster(ray: Any, kind: str, workers: int) -> Iterator[None]:
    """A cluster that only this machine reaches, and of its users only this one, by a token in a private file."""
    _clear_away()
    folder = Path(tempfile.mkdtemp(prefix=f"{OURS}{os.getpid()}-", dir=PLACE))
    lock, token = _locked(folder), folder / TOKEN
    try:
        token.touch(mode=0o600)
        token.write_text(_token())
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
        _remove(folder)
        os.close(lock)


def _locked(folder: Path) -> int:
    """A lock that ends with this process, however it ends. Raises OSError where another process has it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _clear_away() -> None:
    """Remove the clusters of drivers that were killed."""
    for folder in Path(PLACE).glob(f"{OURS}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and (folder / TOKEN).is_file():  # without one, it is in the making
                lock = _locked(folder)
                _remove(folder)
                os.close(lock)


def _remove(folder: Path) -> None:
    """A cluster's folder, after its processes: Ray's agents outlive a killed driver by a minute, a stopped start leaves
    others."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid() and _belongs(process, f"{folder}/"):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(process: Path, folder: str) -> bool:
    """Whether a process of Ray's names the folder, or has files of it open where it has given itself a name."""
    line = (process / "cmdline").read_bytes()
    if line.startswith(b"ray::"):
        return any(os.path.realpath(file).startswith(folder) for file in (process / "fd").iterdir())
    return b"/ray/" in line and folder.encode() in line


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
def stdout_kept(log: Path) -> Iterator[None]:
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
def signals_noted() -> Iterator[Callable[[], None]]:
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
