"""Progress counts rows once, from the moment that work can begin."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from boomgen import progress
from boomgen.engines.handout import Event

from .conftest import PlanTiny


def test_lines_tell_speed_rest_and_failures(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty seconds of start-up are in no rate; a shard that comes again counts once; the last line tells the end."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)

    def events() -> Iterator[Event]:
        nonlocal now
        for seconds, event in (
            (20, Event("ready", -1)),
            (11, Event("tick", 0, rows=8)),
            (1, Event("failed", 0, "OSError: \x1b[2J")),
            (8, Event("tick", 0, rows=8)),
            (0, Event("tick", 0, rows=8)),
            (2, Event("done", 0, rows=16, ok=13)),
        ):
            now += seconds
            yield event

    progress.show(plan_tiny(tmp_path / "run").plan, [0, 6], events())
    assert capsys.readouterr().err.splitlines() == [
        "0/20 images, 0.0 images/s, starting, 0 failed",
        "8/20 images, 0.7 images/s, 16 s left, 0 failed",
        "shard 0: OSError: \\x1b[2J",
        *["16/20 images, 0.7 images/s, 6 s left, 3 failed"] * 2,  # after ten seconds, and at the end
    ]
