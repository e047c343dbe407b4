"""Mixing with the originals: every pair is the manifest's, every choice follows from (seed, epoch, image)."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from boomgen import manifest
from boomgen.errors import BoomgenError, UsageError
from boomgen.run import RunDir
from boomgen.training import ORIGINAL, BoomerangMix, mixed_stream
from tests.finished import PEOPLE, finish, in_ranks, make_shards, nan_model, pixel_hash, write_portraits

ROWS, VARIANTS = 100, 3


@pytest.fixture(scope="module")
def run(plan_tiny, tmp_path_factory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("training") / "run", mode="augment", variants=VARIANTS))


@pytest.fixture(scope="module")
def private(plan_tiny, tmp_path_factory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("training") / "private"))


def rows_of(run: RunDir) -> list[dict]:
    return manifest.read(run.manifest).to_pylist()


def shown(dataset: BoomerangMix, epoch: int = 0) -> list[tuple[str, int]]:
    dataset.set_epoch(epoch)
    return [(pixel_hash(image), label) for image, label in dataset]


def synthetic(dataset: BoomerangMix, epoch: int = 0) -> list[bool]:
    dataset.set_epoch(epoch)
    return [dataset.version(i) != ORIGINAL for i in range(len(dataset))]


def test_every_item_is_its_row_or_one_of_its_versions(run):
    """The 8x8 source needs no resizing, so an original's pixel hash is the manifest's source hash."""
    originals = {row["source_row"]: row["source_sha256"] for row in rows_of(run)}
    versions = {(row["source_row"], row["pixel_sha256"]) for row in rows_of(run)}
    labels = {row["source_row"]: row["label"] for row in rows_of(run)}
    dataset = BoomerangMix(run)
    kinds = synthetic(dataset)
    assert len(dataset) == ROWS
    assert dataset.rows.tolist() == sorted(originals)
    assert 0 < sum(kinds) < ROWS
    for i, (pixels, label) in enumerate(shown(dataset)):
        assert label == labels[i]
        assert ((i, pixels) in versions) == kinds[i]
        assert (pixels == originals[i]) == (not kinds[i])


def test_no_and_full_probability(run):
    originals = [row["source_sha256"] for row in sorted(rows_of(run), key=lambda row: row["source_row"])[::VARIANTS]]
    assert [pixels for pixels, _ in shown(BoomerangMix(run, p=0))] == originals
    versions = {row["pixel_sha256"] for row in rows_of(run)}
    assert {pixels for pixels, _ in shown(BoomerangMix(run, p=1))} <= versions


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_share_of_versions_is_binomial_and_changes_with_epoch_and_seed(run, p):
    dataset = BoomerangMix(run, p)
    epochs = np.array([synthetic(dataset, epoch) for epoch in range(40)])
    spread = np.sqrt(p * (1 - p))
    assert abs(epochs.mean(1) - p).max() < 4 * spread / np.sqrt(ROWS)
    assert abs(epochs.mean() - p) < 3 * spread / np.sqrt(epochs.size)
    assert abs(epochs.mean(0) - p).max() < 4.5 * spread / np.sqrt(40)  # no row is favoured
    agreement = (epochs[:-1] == epochs[1:]).mean()  # independent epochs agree in p^2 + (1-p)^2 of the rows
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 0.04
    assert synthetic(BoomerangMix(run, p, seed=1)) != epochs[0].tolist()
    assert synthetic(dataset) == epochs[0].tolist()


def test_every_version_is_used_alike(run):
    dataset, counts = BoomerangMix(run, p=1), np.zeros(ROWS * VARIANTS)
    for epoch in range(60):
        dataset.set_epoch(epoch)
        for i in range(ROWS):
            counts[dataset.version(i)] += 1
    chi_square = float(((counts - 20) ** 2 / 20).sum())  # 20 of each expected; 200 degrees of freedom
    assert abs(chi_square - 200) < 4 * np.sqrt(400)


def test_choices_do_not_depend_on_order_or_global_generators(run):
    import random

    import torch

    dataset = BoomerangMix(run)
    before = shown(dataset)
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(7)
    states = random.getstate(), torch.get_rng_state()
    backwards = [(pixel_hash(image), label) for image, label in (dataset[i] for i in reversed(range(ROWS)))]
    assert backwards[::-1] == before
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_show_the_same_and_follow_the_epoch(run, start):
    """Also workers that outlive an epoch (persistent), and workers that get a pickled copy (spawn)."""
    dataset = BoomerangMix(run, transform=pixel_hash)
    dataset[0]  # the parent has opened files before it forks
    loader = DataLoader(
        dataset, batch_size=16, num_workers=2, persistent_workers=True, multiprocessing_context=start, collate_fn=list
    )
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        assert [item for batch in loader for item in batch] == [dataset[i] for i in range(ROWS)]
    assert synthetic(dataset, 0) != synthetic(dataset, 1)


def test_pickles(run):
    dataset = BoomerangMix(run, transform=pixel_hash)
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[i] for i in range(ROWS)] == [dataset[i] for i in range(ROWS)]


def test_a_failed_row_gives_its_original(plan_tiny, tiny_model, tmp_path):
    """Class 3 gives NaN, so its ten rows have no version."""
    model = nan_model(tiny_model, tmp_path / "model", slice(3, 4))
    run = finish(plan_tiny(tmp_path / "run", mode="augment", model=str(model)))
    failed = {row["source_row"]: row["source_sha256"] for row in rows_of(run) if row["status"] == "failed"}
    assert sorted(failed) == list(range(30, 40))
    dataset = BoomerangMix(run, p=1)
    items = shown(dataset)
    assert len(items) == ROWS
    assert {i for i, is_version in enumerate(synthetic(dataset)) if not is_version} == failed.keys()
    assert {i: items[i] for i in failed} == {i: (pixels, 3) for i, pixels in failed.items()}
    assert len(list(mixed_stream(run, p=0))) == ROWS - len(failed)


def test_a_row_without_an_original_is_left_out(plan_tiny, tmp_path):
    source = write_portraits(tmp_path / "source", per_person=2)
    bad = source / "patients" / f"{PEOPLE[1]}.00.png"
    bad.write_bytes(bad.read_bytes()[:50])
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=None))
    failed = [row["source_row"] for row in rows_of(run) if row["status"] == "failed"]
    assert len(failed) == 1
    for p in (0, 1):
        dataset = BoomerangMix(run, p)
        assert dataset.rows.tolist() == [row for row in range(10) if row not in failed]
        assert [label for _, label in shown(dataset)] == [
            row["label"] for row in sorted(rows_of(run), key=lambda row: row["source_row"]) if row["status"] == "ok"
        ]


@pytest.mark.parametrize("file_format", ["png", "webp", "jpg"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_both_sides_have_one_size_and_mode(plan_tiny, tmp_path, fit, file_format):
    """12x10 pictures through an 8x8 model; webp stores grey as RGB."""
    source = write_portraits(tmp_path / "source", per_person=1)
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=None, fit=fit, format=file_format))
    expected = {"crop": (8, 8), "pad": (7, 8)}[fit]
    for p in (0, 1):
        assert {(image.size, image.mode) for image, _ in BoomerangMix(run, p)} == {(expected, "L")}
        assert {(sample["image"].size, sample["image"].mode) for sample in mixed_stream(run, p)} == {(expected, "L")}
    file = next((source / "patients").iterdir())
    row = next(row for row in rows_of(run) if row["source_key"] == file.relative_to(source).as_posix())
    original = np.asarray(BoomerangMix(run, p=0)[row["source_row"]][0])
    if fit == "pad":
        assert (original == np.asarray(Image.open(file).resize((7, 8), Image.Resampling.LANCZOS))).all()


def test_a_private_run_pairs_for_its_owner(private):
    versions = {row["source_row"]: row["pixel_sha256"] for row in rows_of(private)}
    originals = {row["source_row"]: row["source_sha256"] for row in rows_of(private)}
    assert [pixels for pixels, _ in shown(BoomerangMix(private, p=1))] == [versions[i] for i in range(ROWS)]
    assert [pixels for pixels, _ in shown(BoomerangMix(private, p=0))] == [originals[i] for i in range(ROWS)]


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_stream_pairs_by_the_manifest(run, p):
    rows = {row["key"]: row for row in rows_of(run)}
    samples = list(mixed_stream(run.path, p, epoch=2))
    assert sorted(sample["key"] for sample in samples) == sorted(rows)
    for sample in samples:
        row = rows[sample["key"]]
        assert sample["label"] == row["label"]
        assert pixel_hash(sample["image"]) == row["pixel_sha256" if sample["synthetic"] else "source_sha256"]
    assert abs(sum(sample["synthetic"] for sample in samples) / 300 - p) <= 4 * np.sqrt(p * (1 - p) / 300)


def keys_and_kinds(run: RunDir, epoch: int = 0, workers: int = 0, shuffle: int | bool = False) -> list:
    """(key, synthetic, pixel hash) of each streamed sample, in order."""
    stream = mixed_stream(run, epoch=epoch, shardshuffle=shuffle).map(
        lambda sample: [sample["key"], sample["synthetic"], pixel_hash(sample["image"])]
    )
    return list(DataLoader(stream, batch_size=None, num_workers=workers)) if workers else list(stream)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stream_covers_every_row_once_over_workers(run, private):
    alone = keys_and_kinds(run)
    assert len(alone) == len({key for key, *_ in alone}) == ROWS * VARIANTS
    assert sorted(keys_and_kinds(run, workers=2)) == sorted(alone)
    assert sorted(keys_and_kinds(private, workers=8)) == sorted(keys_and_kinds(private))  # 7 tars: one has none
    shuffled = keys_and_kinds(run, shuffle=100)
    assert shuffled != alone
    assert sorted(shuffled) == sorted(alone)
    assert keys_and_kinds(run, shuffle=100) == shuffled
    assert [key for key, *_ in keys_and_kinds(run, epoch=1, shuffle=100)] != [key for key, *_ in shuffled]
    assert [kind for _, kind, _ in keys_and_kinds(run, epoch=1)] != [kind for _, kind, _ in alone]


@pytest.mark.parametrize("gloo", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_covers_every_row_once_over_ranks(run, tmp_path, gloo, workers):
    work = lambda: keys_and_kinds(run, workers=workers, shuffle=100)  # noqa: E731
    one, two = in_ranks(work, tmp_path / "rendezvous" if gloo else None)
    assert len(one) > 100
    assert len(two) > 100
    assert sorted(one + two) == sorted(keys_and_kinds(run))


def test_refusals(run, plan_tiny, tmp_path):
    unmade = plan_tiny(tmp_path / "unmade")
    made = make_shards(plan_tiny(tmp_path / "none", linkage="none"))
    for form in (BoomerangMix, mixed_stream):
        with pytest.raises(UsageError, match=r"^\S+unmade misses shards 0-6; go on with: boomgen resume \S+unmade$"):
            form(unmade)
        with pytest.raises(UsageError, match=r"p = 1.5, expected a probability from 0 to 1"):
            form(run, p=1.5)
        with pytest.raises(UsageError, match="no run folder"):
            form(tmp_path / "elsewhere")
        for _ in ("before the links are destroyed", "and after"):
            with pytest.raises(UsageError, match=r"^\S+ was made with --linkage none, nothing pairs[^\n]*$"):
                form(made)
            made = finish_again(made.path)


def finish_again(path: Path) -> RunDir:
    from boomgen.finalise import finalise

    run = RunDir(path)
    finalise(run)
    return run


def test_a_changed_index_is_noticed(plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run", mode="augment"))
    (run.path / "index.parquet").write_bytes(b"something else")
    with pytest.raises(BoomgenError, match="is not the planned index"):
        BoomerangMix(RunDir(run.path))


def test_dropped_labels_are_none(plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run", labels="drop"))
    assert {label for _, label in BoomerangMix(run)} == {-1}
    assert {sample["label"] for sample in mixed_stream(run)} == {-1}
