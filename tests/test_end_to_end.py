"""Every kind of source, from job to data set; at t_boom = 0 each output is its source, pixels and label."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boomgen import manifest
from boomgen.finalise import finalise
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.worker import Worker

from .conftest import write_idx

COUNT = 21
IMAGES = np.random.default_rng(1).integers(0, 256, (COUNT, 8, 8), np.uint8)
LABELS = np.arange(COUNT) % 3
NAMES = ("ant", "bee", "cat.like")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def idx(folder: Path) -> None:
    write_idx(folder, IMAGES, LABELS)


def class_folders(folder: Path) -> None:
    for i, (pixels, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label] / f"no. {i}.v1.png").write_bytes(png(pixels))


def flat_folder(folder: Path) -> None:
    folder.mkdir()
    for i, pixels in enumerate(IMAGES):
        (folder / f"{i}.png").write_bytes(png(pixels))


def tars(folder: Path) -> None:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"set-{shard}.tar", "w") as tar:
            for i in range(shard, COUNT, 2):
                for name, data in ((f"{i}.cls", str(LABELS[i]).encode()), (f"{i}.png", png(IMAGES[i]))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def saved(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [{"bytes": png(pixels), "path": None} for pixels in IMAGES], "label": LABELS.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)


def make(run: RunDir) -> RunDir:
    worker = Worker(run)
    for shard in range(run.plan.shards):
        worker.make_shard(shard)
    finalise(run)
    return run


def outputs(run: RunDir) -> dict[str, np.ndarray]:
    """Pixels of every sample by key."""
    found = {}
    for path in sorted((run.dataset / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(".png")] = np.asarray(Image.open(io.BytesIO(file.read())))
    return found


@pytest.mark.parametrize("build", [idx, class_folders, flat_folder, tars, saved], ids=lambda build: build.__name__)
def test_the_identity_through_every_source(build: Any, tiny_model: Path, tmp_path: Path) -> None:
    build(tmp_path / "source")
    job = Job(
        mode="augment", dataset=str(tmp_path / "source"), model=str(tiny_model), t_boom="0", batch_size=4, shard_size=8
    )
    run = make(prepare(job, Launch(out=str(tmp_path / "run"), device="cpu")))
    rows = manifest.read(run.manifest).to_pylist()
    made = outputs(run)
    labelled = build is not flat_folder
    assert len(rows) == len(made) == COUNT
    seen = set()
    for row in rows:
        (i,) = np.flatnonzero((made[row["key"]] == IMAGES).all((1, 2)))
        seen.add(int(i))
        assert row["status"] == "ok"
        assert row["label"] == (LABELS[i] if labelled else -1)
        if build in (class_folders, saved):
            assert row["class_name"] == NAMES[LABELS[i]]
        if build in (class_folders, flat_folder):
            assert row["source_key"].rsplit("/")[-1] in (f"no. {i}.v1.png", f"{i}.png")
    assert seen == set(range(COUNT))
    assert [row["source_row"] for row in rows] != list(range(COUNT))  # the order is the seed's


def test_full_noise_does_not_depend_on_the_source(tiny_model: Path, secret_file: Path, tmp_path: Path) -> None:
    found = []
    for name, pixels in (("one", IMAGES), ("other", 255 - IMAGES)):
        write_idx(tmp_path / name, pixels, LABELS)
        job = Job(
            mode="anonymize", dataset=str(tmp_path / name), model=str(tiny_model), t_boom="1", steps=10, batch_size=4
        )
        launch = Launch(out=str(tmp_path / f"run-{name}"), device="cpu", secret_file=str(secret_file))
        found.append(outputs(make(prepare(job, launch))))
    assert found[0].keys() == found[1].keys()
    for key, pixels in found[0].items():
        np.testing.assert_array_equal(pixels, found[1][key])


def test_variants_differ_and_shared_noise_is_one_noise(tiny_model: Path, tmp_path: Path) -> None:
    same = np.repeat(IMAGES[:1], 6, 0)
    write_idx(tmp_path / "source", same, np.zeros(6))
    for noise, distinct in (("independent", 12), ("shared", 1)):
        job = Job(
            mode="augment",
            dataset=str(tmp_path / "source"),
            model=str(tiny_model),
            t_boom="0.5",
            steps=10,
            variants=2,
            batch_size=4,
            noise=noise,
        )
        made = outputs(make(prepare(job, Launch(out=str(tmp_path / noise), device="cpu"))))
        assert len(made) == 12
        assert len({pixels.tobytes() for pixels in made.values()}) == distinct


def test_a_longer_source_or_other_shards_leave_a_row_as_it_is(
    tiny_model: Path, secret_file: Path, tmp_path: Path
) -> None:
    """Noise and name follow the source's key, so a re-cut or longer set repeats no sampling in another way."""
    flat_folder(tmp_path / "source")
    found = []
    for name, changes in (("a", {}), ("b", {"limit": 9, "shard_size": 4})):
        job = Job(
            mode="anonymize",
            dataset=str(tmp_path / "source"),
            model=str(tiny_model),
            t_boom="0.5",
            steps=10,
            batch_size=4,
            **changes,
        )
        launch = Launch(out=str(tmp_path / name), device="cpu", secret_file=str(secret_file))
        found.append(outputs(make(prepare(job, launch))))
    whole, part = found
    assert len(part) == 9
    for key, pixels in part.items():
        np.testing.assert_array_equal(pixels, whole[key])
