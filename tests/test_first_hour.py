"""Everything that a newcomer can copy, from the help and from the docs, is run as it stands there."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3fs import S3FileSystem

from boomgen import cli, env
from boomgen.models import chain

from .conftest import FASHION
from .s3.server import serving
from .test_docs import PAGES

FIRST = ["doctor", "sweep", "anonymize", "status", "verify"]
IN_THE_DOCS = {"augment", "enhance", "plan", "run"}
"""Their examples take minutes; much the same commands are run below, of the docs, and outside the checkout."""
HERE = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def parsers() -> dict[str, cli.Parser]:
    (commands,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    return dict(commands.choices)


def examples() -> Iterator[tuple[str, str]]:
    for name, parser in parsers().items():
        for line in str(parser.epilog).splitlines()[1:]:
            yield name, line.strip()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker for each run, since most of the time of these small ones goes into starting workers; and a chain of
    20 levels where a command names none."""
    monkeypatch.setattr(env, "cores", lambda: 1)
    monkeypatch.setattr(chain, "STEPS", 20)


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env=os.environ | HERE, capture_output=True, text=True, check=False
    )


def run(line: str) -> int:
    """The exit code of a command; in this process where no shell is needed, for torch is here already."""
    if set(line) & set("|&"):
        done = shell(line)
        print(done.stdout + done.stderr)
        return done.returncode
    return cli.main(shlex.split(line, comments=True)[1:])


def test_the_help_shows_the_first_hour_first() -> None:
    text = cli._parser().format_help()
    shown = re.findall(r"^    boomgen (\w+)", text, re.MULTILINE)
    assert shown == FIRST
    assert text.index("the first hour") < text.index("all commands")
    assert list(parsers())[:5] == FIRST


@pytest.mark.parametrize("left_out", [IN_THE_DOCS, pytest.param(set(), marks=pytest.mark.slow)], ids=["most", "all"])
def test_every_example_runs_in_the_order_of_the_help(
    left_out: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = dict.fromkeys(parsers().keys() - left_out, 0)
    for name, line in examples():
        if name in left_out:
            continue
        code = run(line)
        assert code == 0, f"{line}: {code}: {capsys.readouterr()}"
        assert capsys.readouterr().out.strip() or line.endswith("--failed"), line
        counts[name] += 1
    assert set(counts.values()) == {2}


def blocks() -> dict[str, list[str]]:
    """The commands in the docs' code blocks, in their order."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
        found[page.name] = [line for line in lines if line.startswith("boomgen ")]
    return {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("page", blocks())
def test_every_command_of_the_docs_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fashion_mnist: Path
) -> None:
    """As written, in their order, but for `--limit`; what needs eight GPUs or the Hub says so."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("cat/1.jpg", "cat/2.png", "dog/3.webp"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (50, 40, 3), np.uint8)).save(Path("photos", name))
    assert str(fashion_mnist) == str(FASHION)
    with serving() if page == "stores.md" else contextlib.nullcontext() as s3:
        if s3:
            s3.behind.mkdir("bucket")
            S3FileSystem.clear_instance_cache()  # of an earlier test's server
            for name, value in s3.environ.items():
                monkeypatch.setenv(name, value)
        _run_commands(blocks()[page], capsys)


def _run_commands(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for line in lines:
        line = line.partition("#")[0].strip()
        making = re.match(r"boomgen (anonymize|augment|enhance|sweep|run)\b", line)
        line = line.removesuffix(" --watch")  # which ends when others have made the run
        code = run(f"{re.sub(r' --limit [0-9]+', '', line)} --limit 12" if making else line)
        told = capsys.readouterr()
        if "--gpus 8" in line:
            assert (code, told.err[:34]) == (2, "boomgen: 8 GPUs asked for, found 0")
        elif "owner/" in line:
            assert (code, told.err[:54]) == (2, "boomgen: model owner/model is not whole in the cache /")
        else:
            assert code == 0, f"{line}: {told}"


def test_completion_completes(tmp_path: Path) -> None:
    """In a real bash."""
    for words, found in (("an", "anonymize"), ("anonymize --t-b", "--t-boom"), ("verify --re", "--remake")):
        asked = f"COMP_WORDS=(boomgen {words}); COMP_CWORD={len(words.split())}; _shtab_boomgen"
        done = shell(f"source <(boomgen completion bash); {asked}; echo ${{COMPREPLY[@]}}")
        assert done.stdout.split() == [found], done.stderr
    assert shell("boomgen completion zsh").stdout.startswith("#compdef boomgen")
