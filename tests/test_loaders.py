"""The data set folder as users load it: `datasets`, `webdataset` and timm give exactly the manifest's ok rows."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from datasets import Features, Value, load_dataset
from datasets.exceptions import NonMatchingSplitsSizesError
from huggingface_hub import DatasetCard
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader

from boomgen import manifest
from boomgen.run import RunDir
from tests.finished import PEOPLE, finish, grey, in_ranks, pixel_hash, samples, write_portraits

Found = list[tuple[str, int, str]]
"""(pixel hash, label, class name) of each sample, sorted."""

CLASSES = ("healthy_volunteers", "patients")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loaders")


@pytest.fixture(scope="module")
def portraits(home) -> Path:
    """25 pictures of two named classes; one of them cannot be decoded."""
    source = write_portraits(home / "source")
    (source / "patients" / f"{PEOPLE[1]}.03.png").write_bytes(b"no picture")
    return source


@pytest.fixture(scope="module", params=["anonymize", "augment"])
def run(request, home, plan_tiny, portraits) -> RunDir:
    name = f"{request.param}-run"
    return finish(plan_tiny(home / name, mode=request.param, dataset=str(portraits), split=None, shard_size=8))


@pytest.fixture(scope="module", params=["webp", "jpg"])
def other_format(request, home, plan_tiny, portraits) -> RunDir:
    name = f"{request.param}-run"
    return finish(plan_tiny(home / name, dataset=str(portraits), split=None, shard_size=8, format=request.param))


def expected(run: RunDir) -> Found:
    """What the manifest says; where jpg lost some, pixels are those of the file in the tar."""
    ok = [row for row in manifest.read(run.manifest).to_pylist() if row["status"] == "ok"]
    assert len(ok) == 24
    hashes = {row["key"]: row["pixel_sha256"] for row in ok}
    if run.plan.job.format == "jpg":
        files = {key: members["jpg"] for key, members in samples(run).items()}
        hashes = {key: pixel_hash(Image.open(io.BytesIO(file))) for key, file in files.items()}
    return sorted((hashes[row["key"]], row["label"], row["class_name"]) for row in ok)


# datasets


def by_datasets(run: RunDir, cache: Path) -> Any:
    return load_dataset(str(run.dataset), cache_dir=str(cache))


def test_two_runs_do_not_share_a_place_in_the_cache(plan_tiny, portraits, tmp_path, monkeypatch):
    """Loaded by the same relative path, as in the README: `datasets` tells copies in its cache apart by their cards."""
    for name, t_boom in (("one", "0.4"), ("two", "0.8")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run = finish(plan_tiny(tmp_path / name / "RUN", dataset=str(portraits), split=None, t_boom=t_boom))
        loaded = load_dataset("RUN/dataset", split="train", cache_dir=str(tmp_path / "cache"))
        assert {row["t_boom"] for row in loaded["json"]} == {f"{run.plan.chain.level}/10"}


def test_datasets_loads_the_ok_rows(run, tmp_path):
    check_datasets(run, tmp_path)


def test_datasets_loads_other_formats(other_format, tmp_path):
    check_datasets(other_format, tmp_path)


def check_datasets(run: RunDir, cache: Path) -> None:
    loaded = by_datasets(run, cache)
    assert list(loaded) == ["train"]
    train, image = loaded["train"], run.plan.job.format
    assert train.features["cls"].names == list(CLASSES)
    found = [(pixel_hash(grey(row[image])), row["cls"], train.features["cls"].int2str(row["cls"])) for row in train]
    assert sorted(found) == expected(run)
    assert [row["__key__"] for row in train] == list(samples(run))
    assert [row["json"] for row in train] == [json.loads(members["json"]) for members in samples(run).values()]


def test_datasets_streams_the_ok_rows(run, tmp_path):
    stream = load_dataset(str(run.dataset), split="train", streaming=True, cache_dir=str(tmp_path))
    assert [row["__key__"] for row in stream] == list(samples(run))


def test_datasets_reads_the_card_without_a_warning(run, tmp_path, caplog):
    by_datasets(run, tmp_path)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_datasets_notices_a_tar_cut_between_samples(run, tmp_path):
    """Such a tar reads without an error; that rows are missing is seen by the count in the card alone."""
    folder = tmp_path / "copy"
    shutil.copytree(run.dataset, folder)
    tar = sorted(folder.glob("data/*.tar"))[0]
    with tarfile.open(tar) as file:
        members = file.getmembers()
    data = tar.read_bytes()[: members[-3].offset]
    tar.write_bytes(data + bytes(1024))
    with pytest.raises(NonMatchingSplitsSizesError):
        load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def test_declared_features_are_what_is_there(run, tmp_path):
    """Declared types, not those guessed from the first samples: without the card all but the class names is equal."""
    declared = by_datasets(run, tmp_path / "declared")["train"].features
    files = str(run.dataset / "data" / "*.tar")
    guessed = load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "guessed")).features
    assert declared.keys() == guessed.keys()
    for name in declared.keys() - {"cls"}:
        assert declared[name] == guessed[name], name


# webdataset


def by_webdataset(run: RunDir, workers: int = 0, **more: Any) -> list[list]:
    """[key, pixel hash, label] of each sample."""
    image = run.plan.job.format
    tars = sorted(map(str, run.dataset.glob("data/*.tar")))
    stream = webdataset.WebDataset(tars, shardshuffle=False, **more).decode("pil")
    stream = stream.map(lambda s: [s["__key__"], pixel_hash(grey(s[image])), s["cls"], s["json"]["class_name"]])
    return list(DataLoader(stream, batch_size=None, num_workers=workers)) if workers else list(stream)


def check_webdataset(found: list[list], run: RunDir) -> None:
    assert sorted(key for key, *_ in found) == sorted(samples(run))
    assert sorted(tuple(rest) for _, *rest in found) == expected(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_reads_the_ok_rows(run, workers):
    check_webdataset(by_webdataset(run, workers), run)


def test_webdataset_reads_other_formats(other_format):
    check_webdataset(by_webdataset(other_format), other_format)


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_splits_over_ranks(run, workers):
    one, two = in_ranks(lambda: by_webdataset(run, workers, nodesplitter=webdataset.split_by_node))
    assert one
    assert two
    check_webdataset(one + two, run)


# timm


def by_timm(run: RunDir, split: str = "train") -> Found:
    dataset = create_dataset("wds/any", root=str(run.dataset), split=split)
    return sorted((pixel_hash(grey(image)), label, CLASSES[label]) for image, label in dataset)


def test_timm_reads_the_ok_rows(run):
    assert by_timm(run) == expected(run)


def test_timm_reads_other_formats(other_format):
    assert by_timm(other_format) == expected(other_format)


def test_timm_knows_the_length_and_trains(run):
    """Its training mode shuffles and stops after as many samples as `_info.json` promises."""
    dataset = create_dataset("wds/any", root=str(run.dataset), split="train", is_training=True, batch_size=8, seed=0)
    assert len(dataset) == 24
    assert sorted((pixel_hash(grey(image)), label, CLASSES[label]) for image, label in dataset) == expected(run)


# Card, index and json


def head(run: RunDir) -> dict[str, Any]:
    text = (run.dataset / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_is_there(run):
    found = head(run)
    public = run.plan.job.linkage == "public"
    assert found["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.tar"}]}
    ]
    held = sum(path.stat().st_size for path in run.dataset.glob("data/*.tar"))
    assert found["dataset_info"]["splits"] == [{"name": "train", "num_bytes": held, "num_examples": 24}]
    features = Features._from_yaml_list(found["dataset_info"]["features"])
    assert features["png"].dtype == "PIL.Image.Image"
    assert features["cls"].names == list(CLASSES)
    links = {"source_key": Value("string"), "source_row": Value("int64"), "variant": Value("int64")}
    about = {"abar": Value("float64"), "class_name": Value("string"), "t_boom": Value("string")}
    assert features["json"] == about | (links if public else {})
    assert features.keys() == {"__key__", "__url__", "png", "cls", "json"}


def test_the_card_is_one_the_hub_takes(run):
    card = DatasetCard.load(run.dataset / "README.md")
    assert card.data.license == "other"
    assert "synthetic" in card.data.tags
    assert "reduced links, not proof of anonymity" in card.text


def test_json_has_the_same_fields_and_types_everywhere(run):
    kinds = {
        tuple((name, type(value)) for name, value in json.loads(members["json"]).items())
        for members in samples(run).values()
    }
    assert len(kinds) == 1
    assert all(members.keys() == {"png", "cls", "json"} for members in samples(run).values())


def test_timm_index_counts_what_the_tars_hold(run):
    split = json.loads((run.dataset / "_info.json").read_bytes())["splits"]["train"]
    assert split["filenames"] == sorted(f"data/{path.name}" for path in run.dataset.glob("data/*.tar"))
    assert sum(split["shard_lengths"]) == split["num_samples"] == 24


# Data sets that are harder to load


def test_a_set_without_labels(plan_tiny, home, tmp_path):
    run = finish(plan_tiny(tmp_path / "run", labels="drop"))
    train = by_datasets(run, tmp_path / "cache")["train"]
    assert train.features.keys() == {"__key__", "__url__", "png", "json"}
    assert {row["json"]["class_name"] for row in train} == {""}
    assert len(train) == 100


def half_labelled(folder: Path) -> Path:
    """WebDataset tars in which only every second sample has a label."""
    folder.mkdir()
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for number in range(20):
            picture = Image.fromarray(np.full((8, 8), number * 10, np.uint8))
            out = io.BytesIO()
            picture.save(out, "png")
            members = {"png": out.getvalue()} | ({"cls": str(number % 3).encode()} if number % 2 else {})
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_a_set_with_some_labels(plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run", dataset=str(half_labelled(tmp_path / "source")), split=None))
    rows = {row["key"]: row for row in manifest.read(run.manifest).to_pylist()}
    assert sum(row["label"] == -1 for row in rows.values()) == 10
    train = by_datasets(run, tmp_path / "cache")["train"]
    assert {row["__key__"]: -1 if row["cls"] is None else row["cls"] for row in train} == {
        key: row["label"] for key, row in rows.items()
    }


def test_class_names_that_yaml_could_mistake(plan_tiny, tiny_source, tmp_path):
    """Folders called no, 1.0, null, ünï and the like stay the words they are."""
    names = ["0x1f", "1.0", "#hash", "no", "null", "on: off", "ünï", "~"]
    for number, name in enumerate(names):
        (tmp_path / "source" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "source" / name / "a.png")
    run = finish(plan_tiny(tmp_path / "run", dataset=str(tmp_path / "source"), split=None))
    train = by_datasets(run, tmp_path / "cache")["train"]
    assert train.features["cls"].names == sorted(names, key=str.encode)
    assert all(train.features["cls"].int2str(row["cls"]) == row["json"]["class_name"] for row in train)


@pytest.mark.parametrize(("asked", "called"), [("test", "test"), ("hard-cases 2", "hard_cases_2")])
def test_splits_are_words(plan_tiny, tmp_path, asked, called):
    source = write_portraits(tmp_path / "source" / asked, per_person=1).parent
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=asked))
    assert {path.name for path in run.dataset.glob("data/*")} == {f"{called}-00000-of-00001.tar"}
    assert list(by_datasets(run, tmp_path / "cache")) == [called]
    assert len(by_timm(run, split=called)) == 5


def test_a_shard_without_ok_rows_has_no_tar(plan_tiny, tmp_path):
    source = write_portraits(tmp_path / "source", per_person=1)
    (source / "patients" / f"{PEOPLE[1]}.00.png").write_bytes(b"no picture")
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=None, shard_size=1))
    assert sorted(path.name for path in run.dataset.glob("data/*")) == [f"train-{i:05d}-of-00004.tar" for i in range(4)]
    assert len(by_datasets(run, tmp_path / "cache")["train"]) == len(by_timm(run)) == 4
