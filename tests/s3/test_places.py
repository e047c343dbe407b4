"""Places that outputs cannot go to: each is one line, before anything is made."""

import os
from pathlib import Path
from typing import Any

from ..conftest import Complaint, PlanTiny
from ..finished import command_line
from .conftest import PlanAway
from .server import S3


def test_another_run_s_place_is_refused(s3: S3, plan_away: PlanAway, complaint: Complaint, tmp_path: Path) -> None:
    run = plan_away(f"{s3.url}/run")
    said = complaint("status", run.plan.store)
    assert said.startswith(f"{s3.url}/run is where outputs go; give the run folder, which --private-dir named")
    line = command_line(run.plan.job, tmp_path / "-", verb="anonymize")
    line[line.index("--out") + 1] = run.plan.store
    said = complaint(*line, "--private-dir", tmp_path / "other")
    assert said == f"{s3.url}/run holds another run; use another --out, or the --private-dir of that run"
    line[line.index("--out") + 1] = f"{s3.url}/elsewhere"
    said = complaint(*line, "--private-dir", run.path)
    assert said == (
        f"{run.path} was planned with out {s3.url}/run (now {s3.url}/elsewhere); use another --private-dir, or boomgen "
        f"resume {run.path}"
    )
    line[line.index("--out") + 1] = tmp_path / "disk"
    said = complaint(*line, "--private-dir", tmp_path / "other")
    assert said.endswith(": is for an --out that is a URL; another --out is private itself")


def test_a_place_that_takes_nothing_is_known_before_the_data_set_is_read(
    s3: S3, plan_tiny: PlanTiny, complaint: Complaint, tmp_path: Path
) -> None:
    line = command_line(plan_tiny(tmp_path / "here").plan.job, tmp_path / "-", verb="anonymize")
    (broken := tmp_path / "broken").mkdir()
    line[line.index("--dataset") + 1] = broken
    where = line.index("--out") + 1
    line[where] = "s3://no-such-bucket/run"
    said = "s3://no-such-bucket/run: The specified bucket does not exist; create it, or use another --out"
    assert complaint(*line) == said
    line[where] = f"{s3.url}/run"
    s3.fault("403", 1, "PUT")
    assert complaint(*line, code=1).startswith(f"{s3.url}/run/probe-")
    assert complaint(*line).startswith(f"{broken} is an empty folder; ")
    assert not s3.behind.find(s3.bucket)


def test_places_that_cannot_be(s3: S3, plan_tiny: PlanTiny, complaint: Complaint, boomgen: Any, tmp_path: Path) -> None:
    line = command_line(plan_tiny(tmp_path / "here").plan.job, tmp_path / "-", verb="anonymize")
    where = line.index("--out") + 1
    line[where] = "s3:/bucket/run"
    assert complaint(*line) == "s3:/bucket/run: a URL has two slashes; expected s3://bucket/run"
    line[where] = "s3://No_Bucket!/run"
    said = complaint(*line, code=1)
    assert said == 's3://No_Bucket!/run/plan.sha256: Invalid bucket name "No_Bucket!"; expected s3://BUCKET/FOLDER'
    line[where] = f"{s3.url}/run"
    done = boomgen(*line, check=False, env=os.environ | {"AWS_ENDPOINT_URL": "127.0.0.1:5555"})
    said = f"boomgen: {s3.url}/run/plan.sha256: Invalid endpoint: 127.0.0.1:5555; expected a URL in AWS_ENDPOINT_URL\n"
    assert (done.returncode, done.stderr) == (1, said)
