"""What commands print."""

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from boomgen.untrusted import printable

if TYPE_CHECKING:
    from boomgen.progress import Look
    from boomgen.run import RunDir, Status

WATCH_EVERY = 2.0  # seconds
AGAIN = "\x1b[H\x1b[J"  # to the upper left, and clear what follows
ROUTINE = re.compile(
    r"$|\s|Traceback |.* done: |part \d+/\d+( on |: )|worker \d+ of \d+: |\d+/\d+ images|boomgen: stopped |[a-z_ ]+  "
    r"|.*; asking again in \d+ s$"
)
"""Lines in a log that tell of no failure, or nothing that another does not tell."""


def status_text(run: "RunDir") -> str:
    """What a run holds, and the command that goes on."""
    from boomgen.progress import look

    return _text(run, look(run))


def part_text(run: "RunDir", part: str | None, shards: str | None, chosen: Sequence[int]) -> str:
    """How far a part is, from one listing: of many workers, none reads what all have made."""
    named = [f"part {part}"] if part else []
    named += [f"shards {shards}"] if shards else []
    return f"{', '.join(named)}: {len(run.published().intersection(chosen))} of {len(chosen)} shards whole"


def show_status(run: "RunDir", as_json: bool, watched: bool) -> "Status":
    """Print how far a run is; watched: again and again, until it is whole or Ctrl-C is pressed. The last that was seen.

    A terminal shows one picture; elsewhere each look is a line.
    """
    from boomgen.progress import line, look

    found: Look | None = None
    try:
        while True:
            found = look(run)
            if as_json:
                print(json.dumps(found.json()), flush=True)
            elif watched and not sys.stdout.isatty():
                print(printable(line(found)), flush=True)
            else:
                print((AGAIN if watched else "") + printable(_text(run, found)), flush=True)
            if not watched or not found.status.missing:
                return found.status
            time.sleep(WATCH_EVERY)
    except KeyboardInterrupt:
        if found is None:
            raise
        return found.status


def _text(run: "RunDir", look: "Look") -> str:
    from boomgen.plan import source_lines
    from boomgen.progress import line
    from boomgen.run import ranges

    path, found, levels, level = run.path, look.status, run.plan.chain.levels, run.plan.chain.level
    counts = [f"{count} failed ({reason})" for reason, count in sorted(found.failed.items())]
    lines = {
        "rows": f"{', '.join([f'{found.ok} ok', *counts])} of {run.plan.rows}"
        + (f"; which: boomgen logs {path} --failed" if counts else ""),
        **source_lines(run.plan),
        "t_boom": f"level {level}/{levels.count}, abar {levels.abar(level):.4f}",
        "shards": f"{found.whole} of {found.planned} whole"
        + (f", missing: number {ranges(found.missing)}" if found.missing else ""),
    }
    if look.workers:
        lines |= {"now": line(look)}
    if found.finalised:
        lines |= {"data set": str(run.dataset), "manifest": str(run.manifest)}
    at_work = found.missing and any(seen.state != "silent" for seen in look.workers)
    following = "status RUN --watch" if at_work else _next(found)
    lines |= {"next": f"boomgen {following}".replace("RUN", shlex.quote(str(path)))}
    if found.finalised and run.plan.job.linkage == "private":
        rest = "" if run.plan.store else " but dataset/"
        lines |= {"private": f"everything in {path}{rest} links outputs to people; share only {run.dataset}"}
    return "\n".join([table(lines), *([columns(list(_workers(look)))] if look.workers else [])])


def _workers(look: "Look") -> Iterator[tuple[str, ...]]:
    from boomgen.progress import does

    yield "worker", "host", "device", "images/s", "read", "infer", "write", "does"
    for seen in look.workers:
        word = seen.word
        seconds = (f"{word.seconds[name] + word.spent[name]:.0f} s" for name in word.seconds)
        yield str(word.worker), word.host, word.device, f"{seen.rate:.1f}", *seconds, does(seen, look)


def log_lines(run: "RunDir", failed: bool) -> Iterator[str]:
    """What the workers said; failed: one line for each row that failed, and for each attempt at a shard."""
    from boomgen.heartbeat import epitaph, words

    for path in sorted(run.logs.glob("*.log")):
        for said in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not failed or not ROUTINE.match(said):
                yield f"{path.stem}: {said}"
    if failed:  # last, for it may have to reach for a store
        yield from run.failures()
        missing = set(run.missing())
        yield from (epitaph(heard) for heard in words(run) if heard.gone and heard.word.shard in missing)


def _next(found: "Status") -> str:
    if found.missing:
        return "resume RUN"
    if found.finalised:
        return "verify RUN --remake 5"
    return "finalise RUN" if found.ok else "logs RUN --failed"


def table(rows: dict[str, Any]) -> str:
    """A line for each name and value."""
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def columns(rows: Sequence[Sequence[Any]]) -> str:
    """A line for each row, its cells below each other."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell!s:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
