"""The other named data sets on miniature copies of what their authors publish, and a user's own YAML file."""

import contextlib
import io
import json
import os
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from boomgen import catalog, hub, index
from boomgen.errors import UsageError
from boomgen.sources import Row, hf, open_source

from .conftest import Complaint
from .finished import finish
from .source_checks import picture
from .test_datasets import labels, planned, refused
from .test_sources import idx, tree
from .test_sources_cifar import CIFAR10, CIFAR100, layout


def test_cifar_and_fashion_mnist_in_one_folder_as_torchvision_keeps_them(tmp_path):
    layout(tmp_path / "cifar-10-batches-py", CIFAR10)
    layout(tmp_path / "cifar-100-python", CIFAR100)
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    idx(tmp_path / "FashionMNIST/raw", "train")
    for name, rows, classes in (
        ("cifar10", 15, "clàss 9"),
        ("cifar100", 7, "clàss 99"),
        ("fashion-mnist", 3, "Ankle boot"),
    ):
        found = planned(tmp_path, name, tmp_path)
        assert (found.rows, found.classes[-1], found.split) == (rows, classes, "train")


PEOPLE = [f"{person}/{person}_000{i}.jpg" for person, n in (("Ann_Lee", 2), ("Zoë_Day", 1)) for i in range(1, n + 1)]


@pytest.mark.parametrize("home", ["lfw", "lfw_home/lfw_funneled", "lfw-py/lfw_funneled"])
def test_lfw(tmp_path, home):
    place = tree(tmp_path / "scikit_learn_data" / home, *PEOPLE).relative_to(tmp_path)
    (tmp_path / place / "pairs_01.txt").write_text("Ann_Lee\t1\t2\n")
    for given in (tmp_path / "scikit_learn_data", tmp_path / place):
        found = planned(tmp_path, "lfw", given)
        assert (found.classes, found.labels, found.passed_over) == (("Ann_Lee", "Zoë_Day"), 2, ((".txt", 1),))
        assert [row.key for row in found.open().rows()] == PEOPLE


def test_celeba_hq(tmp_path):
    home = tmp_path / "CelebAMask-HQ"
    tree(home, "CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg", "CelebA-HQ-img/10.jpg")
    tree(home, "CelebAMask-HQ-mask-anno/0/00000_hair.png")  # no picture of a person
    for place in (tmp_path, home, home / "CelebA-HQ-img"):
        assert labels(planned(tmp_path, "celeba-hq", place)) == [("0.jpg", ""), ("1.jpg", ""), ("10.jpg", "")]
    tree(tmp_path / "other", "data1024x1024/00001.jpg")
    assert labels(planned(tmp_path, "celeba-hq", tmp_path / "other")) == [("00001.jpg", "")]


def test_thousands_of_ffhq_are_no_classes(tmp_path):
    names = [f"{n // 1000 * 1000:05d}/{n:05d}.png" for n in (0, 1, 1000, 69999)]
    tree(tmp_path, *(f"{size}/{name}" for size in ("images1024x1024", "thumbnails128x128") for name in names))
    (tmp_path / "images1024x1024/LICENSE.txt").write_text("see flickr.com")
    found = planned(tmp_path, "ffhq", tmp_path)
    assert found.location == f"{tmp_path}/images1024x1024"
    assert labels(found) == [(name[-13:], "") for name in names]
    assert (found.labels, found.passed_over) == (0, ((".txt", 1),))
    assert planned(tmp_path, "ffhq", tmp_path / "thumbnails128x128").rows == 4
    tree(tmp_path / "signs", "00000/00000_00001.ppm", "01000/01000_00000.ppm")  # as GTSRB names its classes
    assert planned(tmp_path, str(tmp_path / "signs"), None).labels == 2


# MedMNIST


def npz(path: Path, shape: tuple[int, ...], many: int = 1, write=np.savez_compressed) -> dict[str, np.ndarray]:
    """As medmnist publishes them: images and (N, 1) labels of three splits."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = random.integers(0, 2, (count, many), np.uint8)
    write(path, **arrays)
    return arrays


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("name", "file", "shape"),
    [("pneumoniamnist", "pneumoniamnist.npz", (28, 28)), ("bloodmnist", "bloodmnist_64.npz", (64, 64, 3))],
)
def test_medmnist(tmp_path, name, file, shape, write):
    arrays = npz(tmp_path / file, shape, write=write)
    npz(tmp_path / "breastmnist.npz", (28, 28))
    for place in (tmp_path, tmp_path / file):
        for split in ("train", "val", "test"):
            found = planned(tmp_path, name, place, split)
            assert found.classes == catalog.datasets()[name].classes
            rows, source = list(found.open().rows()), found.open()
            assert [row.label for row in rows] == arrays[f"{split}_labels"][:, 0].tolist()
            read = [source.read(row) for row in rows[::-1]]
            assert np.array_equal(np.stack(read[::-1]), arrays[f"{split}_images"])
    assert "no split 'dev'; pass --split with one of test, train, val" in refused(tmp_path, name, tmp_path, "dev")


def test_medmnist_with_many_labels_has_none_and_volumes_are_refused(tmp_path):
    npz(tmp_path / "chestmnist.npz", (28, 28), many=14)
    assert (found := planned(tmp_path, "chestmnist", tmp_path)).labels == 0
    assert {name for _, name in labels(found)} == {""}
    npz(tmp_path / "organmnist3d.npz", (28, 28, 28))
    said = "train images are uint8 of shape (5, 28, 28, 28); expected unsigned bytes, (N, H, W) or (N, H, W, 3)"
    assert said in refused(tmp_path, str(tmp_path / "organmnist3d.npz"), None)
    npz(tmp_path / "pathmnist.npz", (28, 28), many=1)
    (tmp_path / "pathmnist.npz").write_bytes((tmp_path / "pathmnist.npz").read_bytes()[:-30])
    assert f"{tmp_path}/pathmnist.npz is a file of another kind" in refused(tmp_path, "pathmnist", tmp_path)


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    return file.getvalue()


SOUND = npy(np.zeros((2, 4, 4), np.uint8))
LABELS = npy(np.zeros((2, 1), np.uint8))


@pytest.mark.parametrize(
    ("images", "numbers", "said"),
    [
        (SOUND.replace(b"(2, 4, 4)", b"(9, 4, 4)"), LABELS, "train_images.npy has 160 bytes, its header says 272"),
        (SOUND.replace(b"(2, 4, 4)", b"(2 ,4, 4"), LABELS, "is not readable ("),
        (SOUND[:9], LABELS, "is not readable ("),
        (b"", LABELS, "is not readable ("),
        (npy(np.zeros((2, 4, 4), np.int16)), LABELS, "train images are int16 of shape (2, 4, 4); expected unsigned"),
        (
            npy(np.asfortranarray(np.zeros((2, 4, 3), np.uint8))),
            LABELS,
            "an array in Fortran's order or of Python objects",
        ),
        (
            SOUND,
            npy(np.zeros((3, 1), np.uint8)),
            "train labels are uint8 of shape (3, 1); expected whole numbers, (2, 1)",
        ),
        (SOUND, npy(np.zeros((2, 1))), "train labels are float64 of shape (2, 1); expected whole numbers, (2, 1)"),
        (SOUND, None, "(it has no train_labels.npy); expected a whole file of MedMNIST: download it again"),
    ],
)
def test_npz_that_is_not_sound(tmp_path, images, numbers, said):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train_images.npy", images)
        if numbers is not None:
            archive.writestr("train_labels.npy", numbers)
    assert said in refused(tmp_path, str(tmp_path / "a.npz"), None)


def test_a_pickle_in_an_npz_does_not_run(tmp_path):
    bad = np.array([Touch(tmp_path / "marker")] * 2, object)
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 4, 4), np.uint8), train_labels=bad)
    assert "or of Python objects" in refused(tmp_path, str(tmp_path / "a.npz"), None)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_that_changed_is_an_os_error(tmp_path, write):
    npz(tmp_path / "a.npz", (28, 28), write=write)
    source = planned(tmp_path, str(tmp_path / "a.npz"), None).open()
    *_, row = source.rows()
    os.truncate(tmp_path / "a.npz", 99)
    with pytest.raises(OSError, match=r"a\.npz cannot be unpacked into"):
        source.read(row)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_damaged_npz_ends_in_one_line(tmp_path, write):
    npz(tmp_path / "a.npz", (8, 8), write=write)
    sound, dice = (tmp_path / "a.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(sound)
        for place in dice.integers(0, len(data), 4):
            data[place] = dice.integers(256)
        (tmp_path / "a.npz").write_bytes(data)
        with contextlib.suppress(UsageError, OSError):
            source = open_source(str(tmp_path / "a.npz"), "train")
            assert all(source.read(row).shape == (8, 8) for row in source.rows())


# A user's own YAML


def own(path: Path, **keys: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": "mine"} | keys))  # JSON is YAML
    return str(path)


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    tree(tmp_path / "sets/pets/photos", "cat/a.png", "dog/b.png", "emu/c.png")
    told = {
        "folders": ["dog", "cat"],
        "classes": ["Hund", "Katze"],
        "t_boom": 0.25,
        "licence": "CC0",
        "inner": ["photos"],
    }
    path = own(tmp_path / "sets/pets.yaml", data_dir="pets", model="fashion-patched-ddpm", **told)
    monkeypatch.chdir(tmp_path / "sets")
    for name in (path, "pets.yaml"):
        found = planned(tmp_path, name, None)
        assert labels(found) == [("cat/a.png", "Katze"), ("dog/b.png", "Hund")]
        assert (found.licence, found.location) == ("CC0", f"{tmp_path}/sets/pets/photos")
        assert found.passed_over == (("images of other classes", 1),)
    preset = catalog.dataset(path)
    assert (preset.t_boom, preset.model) == ("0.25", "fashion-patched-ddpm")
    assert planned(tmp_path, path, tree(tmp_path / "elsewhere", "dog/1.png")).rows == 1


def test_the_card_of_ones_own_data_set_does_not_tell_where_it_lies(tmp_path, tiny_source, plan_tiny):
    path = own(tmp_path / "jane" / "my.yaml", data_dir=str(tiny_source), licence="CC0")
    run = plan_tiny(tmp_path / "run", dataset=path, limit=8)
    Path(path).unlink()  # a plan needs it no more
    card = (finish(run).dataset / "README.md").read_text()
    assert "CC0" in card
    assert "a private data set" in card
    assert "jane" not in card


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "while parsing a flow node"),
        ("- a", "no mapping, or one with 'builtin' or 'members'; expected the keys of a data set (docs/formats.md)"),
        ("name: a\nbuiltin: fashion-sample", "no mapping, or one with 'builtin' or 'members'"),
        ("title: a", "name: Field required"),
        ("name: a\nlicense: MIT", "license: Extra inputs are not permitted"),
        ("name: a\nhub: {id: a/b, revision: [1]}", "hub.revision: Input should be a valid string"),
        ("name: a\nfolders: [x]\nclasses: [y, z]", "1 folders and 2 classes; expected as many"),
        ("name: a\nwordnet: {}", "wordnet: Input should be 'imagenet-classes', 'imagenet-200' or 'imagenet-r-200'"),
        ("a: &a [x]\nname: *a", "an alias, *a; write out what it stands for"),
        ("name: a\nclasses: [" + "x," * 2**20 + "]", "characters of YAML, at most 1048576 are read"),
        ("name: !!python/object/apply:os.system ['touch marker']", "could not determine a constructor"),
        ("name: a\ndata_dir: nowhere", "nowhere does not exist; expected its folder"),
        ("name: a", "a needs --data-dir DIR: no copy on the Hub is known"),
    ],
)
def test_a_yaml_that_is_no_data_set(tmp_path: Path, complaint: Complaint, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    assert said in complaint("anonymize", "--dataset", "my.yaml", "--model", "m", "--t-boom", "0.4")


def test_a_yaml_that_is_not_there_and_one_that_says_too_little(tmp_path: Path, complaint: Complaint) -> None:
    said = "--dataset my/own.yaml is no file; expected a YAML file that describes a data set"
    assert complaint("anonymize", "--dataset", "my/own.yaml") == said
    path = own(tmp_path / "little.yaml", data_dir=".")
    assert complaint("anonymize", "--dataset", path).startswith("--model is missing; ")


# What is shown


def test_all_that_is_known_of_a_data_set(tmp_path, capsys):
    from boomgen.cli import main

    assert main(["datasets", "imagenet-200"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["classes"], shown["t_boom"]) == ("200", "75/250")
    assert shown["Hub"] == "ILSVRC/imagenet-1k, columns image and label"
    assert Path(shown["list"]).read_text().startswith("n01443537\t1\n")
    assert "imagenet-r-200" in shown["note"]
    assert main(["datasets", own(tmp_path / "my.yaml", note="one\x1b[31mred")]) == 0
    assert "note     one\\x1b[31mred" in capsys.readouterr().out
    assert main(["datasets", "imagenet200"]) == 2
    said = "boomgen: no data set 'imagenet200', did you mean imagenet-200 or imagenet-r-200?; see boomgen datasets\n"
    assert capsys.readouterr().err == said


# The Hub

COMMIT = "c0ffee" + "0" * 34
RAW = {"img": "image", "image": "image", "label": "label", "fine_label": "label", "coarse_label": "label"}
HUB = [
    ("cifar10", ("img", "label"), 10, 10),
    ("cifar100", ("img", "fine_label", "coarse_label"), 100, 100),
    ("fashion-mnist", ("image", "label"), 10, 10),
    ("tiny-imagenet", ("image", "label"), 200, 200),
    ("imagenet", ("image", "label"), 1000, 1000),
    ("imagenet-200", ("image", "label"), 1000, 200),
    ("imagenet-r-200", ("image", "label"), 1000, 200),
]


@pytest.mark.parametrize(("name", "columns", "count", "kept"), HUB)
def test_data_sets_of_the_hub_by_their_own_columns(tmp_path, monkeypatch, name, columns, count, kept):
    """A table with the columns that the Hub's has, one row of each class."""
    import datasets

    numbers = datasets.ClassLabel(names=[f"hub {i}" for i in range(count)])
    features = datasets.Features({c: datasets.Image() if RAW[c] == "image" else numbers for c in columns})
    cells = {c: [None] * count if RAW[c] == "image" else range(count) for c in columns}
    cells |= {"coarse_label": [0] * count} if "coarse_label" in columns else {}
    cells[columns[0]] = [{"bytes": picture(i % 100), "path": None} for i in range(count)]
    snapshot = tmp_path / COMMIT  # as the Hub's cache holds one
    (snapshot / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(cells, features=features)
    table.to_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    repo = catalog.datasets()[name].hub.id
    monkeypatch.setattr(hub, "dataset", lambda asked, commit: {repo: snapshot}[asked])
    found = planned(tmp_path, name, None)
    preset = catalog.datasets()[name]
    assert (found.location, found.revision, found.image_column) == (repo, COMMIT, columns[0])
    assert (found.label_column, found.classes, found.rows) == (columns[1], preset.classes, kept)
    rows = list(found.open().rows())
    assert [row.label for row in rows] == list(range(kept))
    assert [row.offset for row in rows] == list(preset.imagenet_classes if count == 1000 else range(count))


# Memory


class MadeUp:
    """Rows of no files, with names as long as ImageNet's."""

    kind, split, classes = "made-up", "train", ()

    def __init__(self, count: int) -> None:
        self.count, self.passed_over = count, Counter[str]()

    def rows(self) -> Iterator[Row]:
        return (Row(f"n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG", "", 0, i, i % 1000) for i in range(self.count))

    def read(self, row: Row) -> bytes:
        raise OSError(row.key)


def test_an_index_takes_a_few_bytes_of_memory_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "GROUP_ROWS", 2_000)
    peaks = []
    for count in (5_000, 5_000, 25_000):
        tracemalloc.start()
        index.build(MadeUp(count), tmp_path / "index")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 20_000 < 24


def test_a_column_of_free_text_is_no_label(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(hf, "MAX_WORDS", 3)
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    cells = {"image": [None] * 5, "text": ["a", "b", "c", "c", None]}
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(tmp_path / "few")
    assert open_source(str(tmp_path / "few"), label_column="text").classes == ("a", "b", "c")
    datasets.Dataset.from_dict(cells | {"text": list("abcde")}, features=features).save_to_disk(tmp_path / "many")
    with pytest.raises(UsageError, match="column 'text' holds more than 3 different words; expected classes"):
        open_source(str(tmp_path / "many"), label_column="text")
