"""How far a run is, seen in its folder alone, whichever engine works on it; one bar of that, or plain lines."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from boomgen.engines.handout import STRAGGLES, WORTH, Event
from boomgen.errors import BoomgenError
from boomgen.heartbeat import NONE, Heard, Word, note, words
from boomgen.plan import Plan, terms
from boomgen.run import RunDir, Status, ranges
from boomgen.untrusted import printable

LINE_EVERY = 10.0  # seconds
BAR_EVERY = 1.0
LAST_LOOK = 2.0
SHARE = 20  # times what a look costs, between two looks: rank 0 makes shards besides
PAUSE = 5.0  # seconds between two shards, in which a worker's speed still counts
AT_WORK = ("busy", "straggling")


class Seen(NamedTuple):
    """One worker. It straggles when its shard has been in hand for twice as long as is usual."""

    word: Word
    state: str  # loading, busy, straggling, idle or silent
    held: float  # seconds that its shard has been in hand, or that it has been idle or loading
    silence: float  # seconds since it said something
    rate: float  # images/s since it was ready


class Look(NamedTuple):
    """A run at one moment. What is made of a shard in hand counts as long as its worker lives."""

    status: Status
    rows: int
    made: int
    seconds: dict[str, float]  # of worker time by kind
    rate: float  # images/s of those that work
    left: float | None  # seconds; None: nobody works
    workers: list[Seen]

    def json(self) -> dict[str, Any]:
        """As `boomgen status RUN --json` prints it."""
        told = {**self.status._asdict(), **self._asdict(), "missing": ranges(self.status.missing)}
        workers = [{**seen.word.model_dump(), **seen._asdict()} for seen in self.workers]
        return _without("status", told) | {"workers": [_without("word", worker) for worker in workers]}


def _without(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def look(run: RunDir) -> Look:
    """How far a run is."""
    said, status = words(run), run.status()  # in this order: a shard that is published meanwhile is not left out
    heard, missing = [] if status.finalised else said, set(status.missing)
    alive = {each.word.shard for each in heard if not each.gone}
    lost = missing - alive  # whatever of a dead worker is whole or in other hands is no news
    workers = [_seen(each, status.usual) for each in heard if not each.gone or each.word.shard in lost]
    at_work = [seen.word for seen in workers if seen.state in AT_WORK and seen.word.shard in missing]
    in_hand = {word.shard: word for word in sorted(at_work, key=lambda word: word.made)}  # of two copies, the further
    made = status.ok + sum(status.failed.values()) + sum(word.made for word in in_hand.values())
    halves = [{str(name): value for name, value in word.spent.items()} for word in in_hand.values()]
    seconds = {name: value + sum(half.get(name, 0.0) for half in halves) for name, value in status.seconds.items()}
    rate = sum(seen.rate for seen in workers if seen.state in AT_WORK or (seen.state == "idle" and seen.held < PAUSE))
    left = round((run.plan.rows - made) / rate, 1) if rate else None
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return Look(status, run.plan.rows, made, rounded, round(rate, 3), left, workers)


def _seen(heard: Heard, usual: float | None) -> Seen:
    word, silence, gone = heard
    held, late = word.held + silence, max(WORTH, STRAGGLES * usual) if usual else None
    state = "idle" if word.shard is None else "straggling" if late and held > late else "busy"
    rate = round(word.rows / word.up, 3) if word.up else 0.0
    return Seen(
        word, "silent" if gone else "loading" if word.loading else state, round(held, 3), round(silence, 3), rate
    )


def line(found: Look) -> str:
    """A run in one line: how far, how fast, what is wrong, by whom, on what the time goes. Terminals may cut it."""
    failed, rates = sum(found.status.failed.values()), [seen.rate for seen in found.workers if seen.state in AT_WORK]
    parts = [f"{found.made}/{found.rows} images"]
    if found.left is not None:
        parts += [f"{found.rate:.1f} images/s", f"{found.left:.0f} s left"]
    parts += [f"{failed} failed"] if failed else []
    ill = [seen for seen in found.workers if seen.state in ("straggling", "silent")]
    parts += [f"worker {seen.word.worker} of {seen.word.host}: {does(seen, found)}" for seen in ill]
    loading = sum(seen.state == "loading" for seen in found.workers)
    if rates:
        parts += [f"{len(rates)} at work" + (f" ({min(rates):.1f} to {max(rates):.1f} images/s)" if max(rates) else "")]
    if loading:
        parts += [f"{loading} loading"]
    if not rates and not loading and found.status.missing:
        parts += ["nobody at work"]
    if any(found.seconds.values()):
        parts += [f"{name} {found.seconds[name]:.0f} s" for name in NONE]
    return ", ".join(parts)


def does(seen: Seen, found: Look) -> str:
    """What a worker does, or did last."""
    if seen.state in ("idle", "loading"):
        return f"{seen.state} for {seen.held:.0f} s"
    if seen.state == "silent":
        return f"silent for {seen.silence:.0f} s, had shard {seen.word.shard}"
    usual = f", straggles (usual: {found.status.usual:.0f} s)" if seen.state == "straggling" else ""
    return f"shard {seen.word.shard} for {seen.held:.0f} s{usual}"


def say_terms(plan: Plan) -> None:
    """Tell what the licences forbid, before anything is made."""
    for each in terms(plan):
        print(printable(f"licence of {each}"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(run: RunDir) -> Iterator[None]:
    """Tell of a run until the block ends, whoever works on it. A store that does not answer holds up no end."""
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(run, len(run.published()), ended), daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join(timeout=LAST_LOOK)


def _tell(run: RunDir, whole: int, ended: threading.Event) -> None:
    live = sys.stderr.isatty()
    wait, form = BAR_EVERY if live else LINE_EVERY, "{percentage:3.0f} %|{bar:10}| {desc}"
    with tqdm(total=run.plan.rows, disable=not live, dynamic_ncols=True, bar_format=form) as shown:
        last = False
        while not last:
            last, start = ended.wait(wait), time.monotonic()
            with contextlib.suppress(OSError, BoomgenError):  # whoever needs what is damaged says so
                found = look(run)
                shown.n = found.made
                shown.set_description_str(printable(line(found)))
                if not live and (not last or found.status.whole > whole):
                    print(printable(line(found)), file=sys.stderr, flush=True)
            wait = max(BAR_EVERY if live else LINE_EVERY, SHARE * (time.monotonic() - start))


def show(run: RunDir, events: Iterable[Event]) -> None:
    """Tell of a run, and of its events until there are no more."""
    with bar(run):
        for event in events:
            if event.kind in ("failed", "lost"):
                tqdm.write(printable(f"shard {event.shard}: {event.text}"), file=sys.stderr)
            if event.kind == "gone":
                tqdm.write(printable(f"{event.text}; the others go on"), file=sys.stderr)
                note(run, event.text)
            if event.kind == "lost":
                note(run, f"shard {event.shard} lost: {event.text}")
            if event.kind == "waiting":
                tqdm.write(event.text, file=sys.stderr)
