"""The table of scenarios and engines that is shown when tests are done."""

import re
from collections.abc import Iterable, Iterator

import pytest

CELL = re.compile(r"engines/test_conformance\.py::test_(\w+)\[(\w+)\]")


def table(reports: Iterable[object]) -> Iterator[str]:
    """A line for each scenario, with what became of it on each engine and its seconds; - is a cell that was not run.

    What several scenarios look at is made by the first of them, which then takes the time.
    """
    found: dict[tuple[str, str], tuple[str, float]] = {}
    for report in reports:
        if isinstance(report, pytest.TestReport) and (cell := CELL.search(report.nodeid)):
            result, seconds = found.get((cell[1], cell[2]), ("ok", 0.0))
            found[cell[1], cell[2]] = ("FAILED" if report.failed else result, seconds + report.duration)
    scenarios, engines = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    if found:
        yield f"{'scenario':22}" + "".join(f"{engine:>15}" for engine in engines)
    for scenario in scenarios:
        cells = (found.get((scenario, engine)) for engine in engines)
        told = ("-" if cell is None else f"{cell[0]} {cell[1]:4.0f} s" for cell in cells)
        yield f"{scenario.replace('_', ' '):22}" + "".join(f"{each:>15}" for each in told)
