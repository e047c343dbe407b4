"""The third promise: whatever operation of the disk fails, the failure is said and a resume gives the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import SECRET, Tell, save_model

SHIM = Path(__file__).parent / "disk" / "faults.c"
PRIVATE, NONE = [], ["--linkage", "none"]


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose processes have the fault layer under their files."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, four images and a secret, all as small as can be."""
    root, random = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    save_model(root / "model", (8,))
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(root / "source" / f"{name}.png")
    (root / "secret").write_text(SECRET.hex())
    return root


def command(root: Path, *more: str) -> list[str]:
    job = ["--dataset", root / "source", "--model", root / "model", "--t-boom", "0.5", "--steps", "4"]
    shape = ["--batch-size", "2", "--shard-size", "2", "--secret-file", root / "secret"]
    where = ["--device", "cpu", "--workers", "1", "--out", root / "runs" / "run"]
    return [*map(str, ["anonymize", *job, *shape, *more, *where])]


def trial(preloaded: dict[str, str], root: Path, every: int, linkage: list[str]) -> dict[str, Any]:
    """Each `every`-th fault, and what was found."""
    arguments = [str(root), str(every), *command(root, *linkage)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.disk.faults", *arguments],
        env=preloaded,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("linkage", [PRIVATE, NONE], ids=["private", "none"])
@pytest.mark.parametrize("every", [pytest.param(60, id="some"), pytest.param(1, id="each", marks=pytest.mark.slow)])
def test_any_operation_on_files_may_fail(
    preloaded: dict[str, str],
    place: Path,
    every: int,
    linkage: list[str],
    tell: Tell,
) -> None:
    """ENOSPC, EIO, EROFS, EDQUOT, once or from then on; a short write; killed before and after, of driver or worker."""
    found = trial(preloaded, place, every, linkage)
    tell(
        f"{' '.join(linkage)}: {found['operations']} operations of {len(found['kinds'])} kinds, "
        f"{found['tried']} of {found['points']} faults tried, {len(found['wrong'])} borne wrongly"
    )
    assert found["wrong"] == []
    assert found["points"] > 1000
    assert found["tried"] >= found["points"] // every
    for kind in ("rename staging/", "fsync staging/", "write index.parquet", "link staging/", "mkdir staging/"):
        verb, _, where = kind.partition(" ")
        assert any(name.startswith(verb) and where in name for name in found["kinds"]), kind
