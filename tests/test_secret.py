"""The run's secret: what a file of it may hold, and that it is in no other place."""

import base64
import contextlib
from pathlib import Path

import pytest

from boomgen import cli, keys, manifest
from boomgen.engines.local import LocalEngine
from boomgen.errors import BoomgenError, UsageError
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.worker import Worker
from tests.conftest import SECRET
from tests.finished import finish
from tests.scanner import forms, leaks


@pytest.fixture(scope="module")
def tiny(plan_tiny, tmp_path_factory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("privacy") / "run"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "holds 0 bytes, expected 32"),
        ("00" * 31, "holds 31 bytes, expected 32"),
        ("00" * 33, "holds 33 bytes, expected 32"),
        ("not hexadecimal", "expected 64 hexadecimal digits"),
        ("0x" + "00" * 32, "expected 64 hexadecimal digits"),
        ("ff\u00e9", "expected 64 hexadecimal digits"),
    ],
)
def test_a_bad_secret_file_is_one_line(tiny_source, tiny_model, tmp_path, capsys, content, said):
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    options = ["--dataset", tiny_source, "--model", tiny_model, "--t-boom", "0.4", "--steps", "10", "--device", "cpu"]
    options += ["--out", tmp_path / "run", "--secret-file", file]
    assert cli.main(["anonymize", *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert str(file) in error
    assert not (tmp_path / "run").exists()


def test_augment_refuses_a_secret_file(tiny_source, tiny_model, secret_file, tmp_path):
    job = Job(mode="augment", dataset=str(tiny_source), model=str(tiny_model), t_boom="0.4", steps=10)
    with pytest.raises(UsageError, match=r"^--secret-file with augment; [^\n]*use --seed$"):
        prepare(job, Launch(out=str(tmp_path / "run"), device="cpu", secret_file=str(secret_file)))


def test_another_secret_is_refused(plan_tiny, tmp_path):
    run = plan_tiny(tmp_path / "run")
    (run.path / "secret").write_text(SECRET[::-1].hex())
    with pytest.raises(BoomgenError, match=r"^\S+ is not the secret of this plan; [^\n]*$"):
        Worker(RunDir(run.path))


def test_the_secret_is_in_its_file_alone(tiny):
    assert tiny.plan.secret_commitment == keys.commitment(SECRET)
    assert {place for place, _ in leaks(tiny.path, [SECRET])} == {"secret"}
    for table in (manifest.read(tiny.manifest).to_pylist(), tiny.plan.model_dump()):
        assert not any(form in repr(table).encode() for form in forms(SECRET))


def test_the_secret_is_in_no_command_line_and_no_environment(plan_tiny, tmp_path):
    """Of the worker, looked up in /proc after each of its events; the driver is given the path of a file."""
    run = plan_tiny(tmp_path / "run_of_the_test")
    seen: dict[int, bytes] = {}
    for _ in LocalEngine(run, ["cpu"]).run(range(run.plan.shards)):
        seen |= processes(str(run.path))
    assert len(seen) == 1
    for told in seen.values():
        assert b"PATH=" in told
        assert not any(form in told for form in forms(SECRET))
    assert run.secret == SECRET
    assert {place for place, _ in leaks(run.path, [SECRET])} == {"secret"}  # nor in the worker's log


def processes(word: str) -> dict[int, bytes]:
    """Command line and environment of every process that names `word` in its command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            told = (entry / "cmdline").read_bytes()
            if word.encode() in told:
                found[int(entry.name)] = told + (entry / "environ").read_bytes()
    return found


def test_forms_of_a_secret_are_those_that_people_write():
    assert {SECRET, SECRET.hex().encode(), base64.b64encode(SECRET)[:-2]} <= forms(SECRET)
