"""What commands print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def status_text(path: Path) -> str:
    """What a run holds, and the command that goes on."""
    from boomgen.plan import source_lines
    from boomgen.run import RunDir, ranges

    run = RunDir(path)
    found, levels, level = run.status(), run.plan.chain.levels, run.plan.chain.level
    counts = [f"{count} failed ({reason})" for reason, count in sorted(found.failed.items())]
    lines = {
        "rows": f"{', '.join([f'{found.ok} ok', *counts])} of {run.plan.rows}"
        + (f"; which: boomgen logs {path} --failed" if counts else ""),
        **source_lines(run.plan),
        "t_boom": f"level {level}/{levels.count}, abar {levels.abar(level):.4f}",
        "shards": f"{found.whole} of {found.planned} whole"
        + (f", missing: number {ranges(found.missing)}" if found.missing else ""),
    }
    if found.finalised:
        lines |= {"data set": str(run.dataset), "manifest": str(run.manifest)}
    lines |= {"next": f"boomgen {_next(found)}".replace("RUN", str(path))}
    if found.finalised and run.plan.job.linkage == "private":
        rest = "" if run.plan.store else " but dataset/"
        lines |= {"private": f"everything in {path}{rest} links outputs to people; share only {run.dataset}"}
    return table(lines)


def _next(found: Any) -> str:
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
