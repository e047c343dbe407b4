"""Random SIGKILLs over every kind of process of every engine, until each run is whole: `make soak`.

    python -m tests.engines.soak --kills 100 --engines local,ray,ray-nodes,accelerate,torchrun,slurm --seed 1

After each kill, what a user or a site would do is done: a run that ended is begun again by the same engine, a daemon is
started again, a lost node comes back. At the end of each run its bytes are those of one undisturbed worker, no row is
lost or doubled, and nothing is left of its processes and staging folders. Exit code 1 where that is not so.
"""

import argparse
import contextlib
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from boomgen import manifest
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.shard import PART
from boomgen.tell import columns
from boomgen.verify import verify

from ..conftest import save_model, write_idx
from ..driver import Driver
from ..finished import finish, made
from .engines import Engine, Going, Ranks, Ray, Slurm, _of_process, engine, users_of, wait_for
from .slurm_cluster import NODES

NAMES = ("local", "ray", "ray-nodes", "accelerate", "torchrun", "slurm")
DAEMONS = {"raylet", "gcs_server", "slurmd", "slurmctld", "slurmstepd"}
STUCK = 400.0  # seconds without a new shard: longer than any time limit of Ray's and SLURM's for what is lost
LATEST = 0.9
"""Of the shards: until so many are whole, the kills are spread. Later there may be nobody left to kill."""
PR_SET_CHILD_SUBREAPER = 36
HEAD = ("engine", "shards", "rows", "kills", "launches", "seconds", "lost", "doubled", "bytes equal", "left")


class OwnRay(Engine):
    """`boomgen resume --engine ray` on a cluster of its own."""

    name = "ray"

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        where = ("--device", "cpu", "--workers", str(workers), "--engine", "ray")
        return _of_process(run, Driver(run, "boomgen", "resume", str(run.path), *where, *map(str, more)))


def boomgen(*args: Any, **more: Any) -> Any:
    command = [sys.executable, "-m", "boomgen", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def engine_of(name: str, folder: Path) -> Engine:
    if name == "ray":
        return OwnRay()
    return engine(name.partition("-")[0], folder, boomgen)


def plan(folder: Path, out: Path) -> RunDir:
    """1,300 rows in 325 shards of one batch, each of which takes about a tenth of a second."""
    if not (folder / "model").exists():
        save_model(folder / "model", (8, 16))
        images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)
        write_idx(folder / "source", images, np.repeat(np.arange(10), 10))
    places = {"dataset": str(folder / "source"), "model": str(folder / "model")}
    chain = {"t_boom": "0.4", "steps": 10, "batch_size": 4, "shard_size": 4}
    return prepare(Job(mode="augment", variants=13, **places, **chain), Launch(out=str(out), device="cpu"))


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


# One run -----------------------------------------------------------------------------------------------------------


def victims(going: Going, name: str) -> dict[str, list[int]]:
    """Pids by kind: the driver or launcher, workers in mid-shard, daemons."""
    found = {kind: [pid] for kind, pid in going.others().items() if kind not in NODES}
    if name in ("ray", "slurm"):  # of the cluster that is others' too, the site's one node alone
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() in DAEMONS and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(process.name(), []).append(process.pid)
    known = {pid for pids in found.values() for pid in pids}
    workers = [pid for pid in going.workers() if pid not in known]
    return found | {"worker": workers} if workers else found


def kill(pid: int) -> None:
    """And wait for its end if it is a child: who would start it again must not take it for alive."""
    os.kill(pid, 9)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def mend(site: Engine) -> None:
    """What systemd does, or the people who run a cluster."""
    if isinstance(site, Slurm):
        site.cluster.start()
        for node in site.cluster.run("sinfo", "-hNtdown,drain,fail", "-o%N", check=False).split():
            site.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    elif isinstance(site, Ray):
        site.mend()


def ended(site: Engine, going: Going) -> bool:
    """Whether a user sees that this launch has come to its end; ranks go on alone without their launcher."""
    if not isinstance(site, Slurm):
        return going.over() and not (isinstance(site, Ranks) and users_of(going.run.path))
    with contextlib.suppress(AssertionError):  # no controller
        return not site.cluster.run("squeue", "-h").strip()
    return False


def closed(run: RunDir) -> bool:
    return not run.missing() and (run.dataset / "README.md").exists()


def disturb(site: Engine, name: str, run: RunDir, kills: int, chance: random.Random) -> tuple[Counter[str], int]:
    """The kills by kind, and how often the run was begun."""
    done, launches, last, since = Counter[str](), 0, -1, time.monotonic()
    due = sorted(chance.uniform(i, i + 1) * LATEST * run.plan.shards / kills for i in range(kills))
    going: Going | None = None
    while going is None or not ended(site, going):
        if going is None:
            going, launches = site.start(run), launches + 1
        whole = len(run.published())
        if whole != last:
            last, since = whole, time.monotonic()
        assert time.monotonic() - since < STUCK, (
            f"no new shard in {STUCK:.0f} s, {whole} of {run.plan.shards} are whole"
        )
        if due and whole >= due[0]:
            time.sleep(chance.random() * 0.3)
            if found := victims(going, name):
                kind = chance.choice(sorted(found))
                with contextlib.suppress(ProcessLookupError):
                    kill(chance.choice(found[kind]))
                    done[kind] += 1
                    due.pop(0)
                    say(f"{name}: {whole} of {run.plan.shards} shards, kill {done.total()} of {kills}: {kind}")
        mend(site)
        time.sleep(0.1)
        if ended(site, going) and not closed(run):
            said = going.end() if not isinstance(site, Slurm) else None
            say(f"{name}: ended with {said.code}: {said.err[-300:].splitlines()[-1:]}" if said else f"{name}: again")
            going = None
    if not isinstance(site, Slurm):
        going.end()
    assert not due, f"{len(due)} of {kills} kills found nobody"
    return done, launches


class Rows(NamedTuple):
    """What manifest and tars hold, against the plan."""

    lost: int
    doubled: int


def count(run: RunDir) -> Rows:
    """Read with nothing but pyarrow and tar."""
    table = manifest.read_parts([run.shard(number) / PART for number in range(run.plan.shards)], ["row", "key"])
    rows, keys = table["row"].to_pylist(), table["key"].to_pylist()
    tars = [str(path) for path in sorted(run.dataset.glob("data/*.tar"))]
    listed = [line for tar in tars for line in subprocess.check_output(["tar", "-tf", tar], text=True).splitlines()]
    images = [name.removesuffix(".png") for name in listed if name.endswith(".png")]
    lost = (set(range(run.plan.rows)) ^ set(rows)) | (set(keys) ^ set(images))
    doubled = sum(len(found) - len(set(found)) for found in (rows, keys, listed))
    return Rows(len(lost), doubled)


def left(run: RunDir) -> list[str]:
    """Processes of this program's, which inherits all orphans, and folders that are half-made."""

    def processes() -> list[str]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                else:
                    found.append(" ".join(process.cmdline())[:100])
        return found

    with contextlib.suppress(AssertionError):
        wait_for(lambda: not processes(), seconds=120)
    folders = [run.staging, *run.path.parent.glob(".*.planning-*"), *Path("/tmp").glob("boomgen-ray-*")]
    return processes() + [str(folder) for folder in folders if folder.exists()]


def soak(name: str, folder: Path, kills: int, chance: random.Random, expected: dict[str, str]) -> tuple[Any, ...]:
    """A line of the table."""
    run, site, begun = plan(folder, folder / f"run-{name}"), engine_of(name, folder / "slurm"), time.monotonic()
    try:
        done, launches = disturb(site, name, run, kills, chance)
        seconds = time.monotonic() - begun
    finally:
        site.close()
    rows, faults = count(run), [*verify(RunDir(run.path)), *left(run)]
    for fault in faults:
        say(f"{name}: {fault}")
    by_kind = " ".join(f"{kind} {number}" for kind, number in sorted(done.items()))
    equal = made(run) == expected
    shards, doubled, equal_text = run.plan.shards, rows.doubled, "yes" if equal else "NO"
    return (
        name,
        shards,
        run.plan.rows,
        by_kind,
        launches,
        f"{seconds:.0f}",
        rows.lost,
        doubled,
        equal_text,
        len(faults),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="random SIGKILLs over every kind of process of every engine")
    parser.add_argument("--kills", type=int, default=100, help="in all, spread evenly over the engines")
    parser.add_argument("--engines", default=",".join(NAMES))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    args = parser.parse_args()
    names, owed, lines = args.engines.split(","), args.kills, list[tuple[Any, ...]]()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    say(f"{args.kills} kills over {args.engines}, seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="boomgen-soak-") as place:
        folder = Path(place)
        expected = made(finish(plan(folder, folder / "undisturbed")))
        for position, name in enumerate(names):
            share = owed // (len(names) - position)
            owed -= share
            try:
                lines.append(soak(name, folder, share, random.Random(f"{args.seed} {name}"), expected))
            except Exception:
                say(f"{name}: {traceback.format_exc()}")
                lines.append((name, *["-"] * (len(HEAD) - 2), "failed"))
    print(columns([HEAD, *lines]))
    return int(any(line[-4:] != (0, 0, "yes", 0) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
