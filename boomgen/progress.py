"""One bar on the driver, fed by batches and corrected by whole shards; plain lines where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from boomgen.engines.handout import Event
from boomgen.plan import Plan, terms
from boomgen.untrusted import printable

LINE_EVERY = 10.0  # seconds


class _Count:
    """Rows made since the first worker was ready. Rates and ETA are of this launch only."""

    def __init__(self, todo: int) -> None:
        self.todo, self.failed = todo, 0
        self.start: float | None = None
        self.made_of: dict[int, int] = {}

    @property
    def made(self) -> int:
        return sum(self.made_of.values())

    def add(self, event: Event) -> None:
        self.start = self.start or time.monotonic()
        if event.kind == "tick":
            self.made_of[event.shard] = self.made_of.get(event.shard, 0) + event.rows
        elif event.kind == "done":
            self.made_of[event.shard] = event.rows
            self.failed += event.rows - event.ok
        elif event.kind in ("failed", "lost"):
            self.made_of.pop(event.shard, None)

    def line(self) -> str:
        elapsed = time.monotonic() - self.start if self.start else 0.0
        rate = self.made / elapsed if elapsed else 0.0
        left = f"{(self.todo - self.made) / rate:.0f} s left" if rate else "starting"
        return f"{self.made}/{self.todo} images, {rate:.1f} images/s, {left}, {self.failed} failed"


def say_terms(plan: Plan) -> None:
    """Tell what the licences forbid, before anything is made."""
    for line in terms(plan):
        print(printable(f"licence of {line}"), file=sys.stderr, flush=True)


def show(plan: Plan, missing: Sequence[int], events: Iterable[Event]) -> None:
    """Tell of the events until there are no more."""
    count = _Count(sum(len(plan.positions(shard)) for shard in missing))
    live, last = sys.stderr.isatty(), time.monotonic()
    with tqdm(total=count.todo, unit="img", disable=not live, dynamic_ncols=True) as bar:
        for event in events:
            before = count.made
            count.add(event)
            bar.update(count.made - before)
            if event.kind in ("failed", "lost"):
                tqdm.write(printable(f"shard {event.shard}: {event.text}"), file=sys.stderr)
            if event.kind == "gone":
                tqdm.write(printable(f"{event.text}; the others go on"), file=sys.stderr)
            if event.kind == "waiting":
                tqdm.write(event.text, file=sys.stderr)
            if count.failed:
                bar.set_postfix(failed=count.failed, refresh=False)
            if not live and time.monotonic() - last > LINE_EVERY:
                last = time.monotonic()
                print(count.line(), file=sys.stderr, flush=True)
    if not live and count.made:
        print(count.line(), file=sys.stderr, flush=True)
