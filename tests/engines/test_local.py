"""The engine of one machine: what tests/test_bytes.py and tests/test_reopen.py do not prove of it."""

import os
import signal
from pathlib import Path
from typing import Any

from ..conftest import PlanTiny
from ..finished import made
from ..test_bytes import LONG, Driver


def test_a_hung_worker_is_replaced(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """SIGSTOPped with a shard in hand, it says nothing any more, and does not hear SIGTERM."""
    run = plan_tiny(tmp_path / "run", **LONG)
    where = ("--device", "cpu", "--workers", "1", "--patience", "5")
    driver = Driver(run, "boomgen", "resume", str(run.path), *where)
    driver.wait_for(lambda: bool(run.published()) and any(run.staging.iterdir()))
    os.kill(driver.workers()[0], signal.SIGSTOP)
    code, _, err = driver.end()
    assert code == 0, err
    assert err.count("worker 0 hung and was killed") == 1
    assert made(run) == undisturbed(**LONG)
    assert driver.no_orphan()
