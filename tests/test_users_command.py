"""`boomgen anonymize --dataset imagenet --t-boom 0.3 --gpus 8`, as people start it: a miniature ImageNet in its own
layout, a tiny DiT of 1,000 classes, and eight made-up GPUs."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boomgen import catalog, manifest
from boomgen.run import RunDir

from .families.folders import dit_of

IMAGENET = catalog.datasets()["imagenet"]
PLACES = (0, 1, 134, 207, 517, 639, 999)  # tench, goldfish, both cranes, golden retriever, a maillot, toilet tissue
EACH = 3


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for place in PLACES:
        folder = root / "train" / IMAGENET.folders[place]
        folder.mkdir(parents=True)
        for number in range(EACH):
            pixels = rng.integers(0, 256, (40 + number, 30, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{folder.name}_{number}.JPEG")
    (root / "val").mkdir()
    return root


def test_the_command_ends_with_a_verified_data_set(imagenet: Path, tmp_path: Path, boomgen: Callable[..., Any]) -> None:
    model, out = tmp_path / "dit", tmp_path / "run"
    dit_of(model, [f"{name}, and the like" for name in IMAGENET.classes])
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent / "madeup"))
    env.pop("CUDA_VISIBLE_DEVICES", None)  # which may hide the real ones where the tests run
    command = "anonymize --dataset imagenet --t-boom 0.3 --gpus 8"
    more = ["--data-dir", imagenet, "--model", model, "--shard-size", 2, "--batch-size", 2, "--out", out]
    done = boomgen(*command.split(), *more, env=env)
    rows = len(PLACES) * EACH
    assert f"rows      {rows} ok of {rows}" in done.stdout
    assert f"is sound: 11 shards, {rows} rows" in boomgen("verify", out, env=env).stdout
    run = RunDir(out)
    assert {json.loads((run.shard(s) / "done.json").read_text())["environment"]["device"] for s in range(11)} == {
        "made-up GPU (sm_90)"
    }
    assert sorted(path.name for path in run.logs.glob("worker-*.log")) == [f"worker-{n:03d}.log" for n in range(8)]
    assert run.plan.network.classes == tuple(range(1000))
    for row in manifest.read(run.manifest).to_pylist():
        wnid = row["source_key"].split("/")[0]
        assert (row["label"], row["class_name"]) == (IMAGENET.folders.index(wnid), IMAGENET.classes[row["label"]])
    told = {}
    for tar in run.dataset.glob("data/*.tar"):
        with tarfile.open(tar) as archive:
            for member in archive:
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                told.setdefault(member.name.partition(".")[0], {})[member.name.rpartition(".")[2]] = content
    labels = sorted(int(row["cls"]) for row in told.values())
    assert labels == sorted(PLACES * EACH)
    names = (run.dataset / "README.md").read_text()
    assert all(str(IMAGENET.classes[place]) in names for place in PLACES)
