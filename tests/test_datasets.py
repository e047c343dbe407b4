"""ImageNet and its parts, named and by --data-dir, on miniature copies of what their authors publish."""

import random
from pathlib import Path

import pytest

from boomgen import catalog
from boomgen.errors import UsageError
from boomgen.job import Job
from boomgen.plan import SourcePlan
from boomgen.prepare import _index_source, resolve

from .source_checks import picture
from .test_sources import tree

WNIDS = catalog.datasets()["imagenet"].folders
NAMES = catalog.datasets()["imagenet"].classes
TENCH, GOLDFISH, DRAKE, CRANE, MAYPOLE = "n01440764", "n01443537", "n01847000", "n03126707", "n03733131"
SOME = (TENCH, GOLDFISH, DRAKE, CRANE)
KAGGLE = "ILSVRC/Data/CLS-LOC"
DEVKIT = "ILSVRC2012_devkit_t12/data"


def planned(tmp_path: Path, name: str, place: Path | None, split: str | None = None, **more: str) -> SourcePlan:
    """What a plan says of a data set, after its reopened source was found to be the same."""
    job = Job(mode="augment", dataset=name, data_dir=place and str(place), split=split, model="m", t_boom="0.4", **more)
    out = tmp_path / "planned"
    out.mkdir(exist_ok=True)
    source, _ = _index_source(out, resolve(job))
    rows = list((opened := source.open()).rows())
    assert (len(rows), opened.split) == (source.rows, source.split)
    assert all(len(opened.read(row)) > 0 for row in rows)
    return source


def labels(source: SourcePlan) -> list[tuple[str, str]]:
    """(end of the key, class name) of every row."""
    return [(row.key[-13:], source.classes[row.label] if row.label >= 0 else "") for row in source.open().rows()]


def refused(tmp_path: Path, name: str, place: Path | None, split: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        planned(tmp_path, name, place, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ImageNet-1k


def imagefolder(root: Path) -> Path:
    tree(root, *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in SOME for i in (1, 2)))
    return tree(root, *(f"val/{wnid}/ILSVRC2012_val_{i:08d}.JPEG" for i, wnid in enumerate(SOME)))


def kaggle(root: Path) -> Path:
    tree(root, *(f"{KAGGLE}/train/{wnid}/{wnid}_{i}.JPEG" for wnid in SOME for i in (1, 2)))
    tree(root, *(f"{KAGGLE}/val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(4)))
    tree(root, f"{KAGGLE}/test/ILSVRC2012_test_00000001.JPEG")
    solved = [f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for i, wnid in enumerate(SOME)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(solved[::-1]))
    (root / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True))
    )
    return root


def devkit(root: Path) -> Path:
    """Its ids are in an order of their own, and images are numbered from 1."""
    tree(root, *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in SOME for i in (1, 2)))
    tree(root, *(f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)))
    ids = dict(zip(random.Random(1).sample(WNIDS, 1000), range(1, 1001), strict=True))
    (root / DEVKIT).mkdir(parents=True)
    (root / DEVKIT / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[w]}\n" for w in SOME))
    (root / DEVKIT / "map_clsloc.txt").write_text("".join(f"{wnid} {i} a_name\n" for wnid, i in ids.items()))
    return root


@pytest.mark.parametrize("make", [imagefolder, kaggle, devkit])
def test_imagenet_has_the_labels_of_the_1000_in_every_layout(tmp_path, make):
    place = make(tmp_path / "imagenet")
    train = planned(tmp_path, "imagenet", place)
    assert (train.split, train.rows, train.labels, train.passed_over) == ("train", 8, 4, ())
    assert train.classes == NAMES
    found = [row.label for row in train.open().rows()]
    assert found == [WNIDS.index(wnid) for wnid in SOME for _ in (1, 2)] == [0, 0, 1, 1, 97, 97, 517, 517]
    val = planned(tmp_path, "imagenet", place, "val")
    assert [name for _, name in labels(val)] == ["tench", "goldfish", "drake", "crane (n03126707)"]
    assert train.licence == "ImageNet terms (research, non-commercial)"
    assert "no split 'dev'; pass --split with one of train, val" in refused(tmp_path, "imagenet", place, "dev")


@pytest.mark.parametrize("make", [imagefolder, kaggle, devkit])
def test_imagenet_200_takes_its_classes_out_of_imagenet(tmp_path, make):
    place = make(tmp_path / "imagenet")
    for split, each in (("train", 2), ("val", 1)):
        source = planned(tmp_path, "imagenet-200", place, split)
        assert source.passed_over == (("images of other classes", 2 * each),)
        assert [(row.label, name) for row, (_, name) in zip(source.open().rows(), labels(source), strict=True)] == [
            pair for pair in ((0, "goldfish"), (95, "crane (n03126707)")) for _ in range(each)
        ]
        assert len(source.classes) == 200
    other = planned(tmp_path, "imagenet-r-200", place)
    assert {name for _, name in labels(other)} == {"goldfish", "drake"}


def test_kaggles_test_images_have_no_label(tmp_path):
    for place in (kaggle(tmp_path / "all"), tmp_path / "all/ILSVRC"):
        assert labels(planned(tmp_path, "imagenet", place, "test")) == [("00000001.JPEG", "")]


def test_lists_of_imagenet_that_are_not_whole(tmp_path):
    place = devkit(tmp_path / "kit")
    ids, truth = place / DEVKIT / "map_clsloc.txt", place / DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(truth.read_text().splitlines(True)[:3]))
    said = "has no line for ILSVRC2012_val_00000004.JPEG; expected one for each image: fetch it again"
    assert refused(tmp_path, "imagenet", place, "val") == f"{truth} {said}"
    truth.write_text("7\n1001\n")
    assert refused(tmp_path, "imagenet", place, "val") == f"{truth}, line 2: expected an id of {ids}; fetch it again"
    ids.write_text("n02119789 one kit_fox\n")
    assert refused(tmp_path, "imagenet", place, "val") == f"{ids}, line 1: expected WNID ID; fetch it again"
    ids.unlink()
    said = refused(tmp_path, "imagenet", place, "val")
    assert said.startswith(f"{place / DEVKIT} has no map_clsloc.txt, which tells what its ids mean; run: python -c ")
    assert f"loadmat('{place / DEVKIT}/meta.mat', squeeze_me=True)" in said
    truth.unlink()
    assert "nothing tells the classes of the images in val; expected LOC_val_solution.csv (Kaggle)" in refused(
        tmp_path, "imagenet", place, "val"
    )
    solution = kaggle(tmp_path / "kaggle") / "LOC_val_solution.csv"
    solution.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,tench\n")
    said = f"{solution}, line 2: expected NAME,WNID x y x y; fetch it again"
    assert refused(tmp_path, "imagenet", tmp_path / "kaggle", "val") == said
    solution.write_bytes(b"\xff\xfe")
    assert f"{solution} is not readable ('utf-8' codec" in refused(tmp_path, "imagenet", tmp_path / "kaggle", "val")


def test_imagenet_that_is_still_packed(tmp_path):
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / name).write_bytes(bytes(10240))
    train, untar = (
        tmp_path / "ILSVRC2012_img_train.tar",
        "for t in n*.tar; do mkdir ${t%.tar}; tar -xf $t -C ${t%.tar}; done",
    )
    run = f"cd {tmp_path}; mkdir train; tar -xf {train.name} -C train; cd train; {untar}"
    assert refused(tmp_path, "imagenet", tmp_path) == f"{train} is still packed; run: {run}"
    assert (
        refused(tmp_path, "imagenet", train) == f"{train} is still packed; run: {run} (then give the folder {tmp_path})"
    )
    said = f"run: cd {tmp_path}; mkdir val; tar -xf ILSVRC2012_img_val.tar -C val"
    assert refused(tmp_path, "imagenet", tmp_path, "val").endswith(said)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/n01440764.tar").write_bytes(bytes(10240))
    said = f"{tmp_path}/train holds tars of classes, still packed; run: cd {tmp_path}/train; {untar}; rm n*.tar"
    assert refused(tmp_path, "imagenet", tmp_path) == said
    (tmp_path / "train/n01440764.tar").unlink()
    imagefolder(tmp_path)  # unpacked, with the tars left beside
    assert planned(tmp_path, "imagenet", tmp_path).rows == 8


def test_what_is_no_imagenet(tmp_path):
    tree(tmp_path / "other", "cat/a.png", "dog/b.png")
    said = f"{tmp_path}/other holds the folders cat, dog; expected some of n01440764, n01443537, n01484850 ...: is it"
    assert refused(tmp_path, "imagenet", tmp_path / "other").startswith(said)
    tree(tmp_path / "flat", "a.png")
    assert "holds no class folders; expected some of n01443537" in refused(tmp_path, "imagenet-200", tmp_path / "flat")


def saved(root: Path, names: list[str], numbers: list[int]) -> Path:
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    images = [{"bytes": picture(i % 100), "path": None} for i in range(len(numbers))]
    datasets.Dataset.from_dict({"image": images, "label": numbers}, features=features).save_to_disk(root)
    return root


def test_imagenet_200_takes_its_classes_out_of_a_table(tmp_path):
    full = saved(tmp_path / "full", [f"class {i}" for i in range(1000)], [0, 1, -1, 988, 1])
    source = planned(tmp_path, "imagenet-200", full)
    assert [(row.offset, row.label) for row in source.open().rows()] == [(1, 0), (2, -1), (3, 199), (4, 0)]
    assert source.passed_over == (("images of other classes", 1),)
    assert (len(source.classes), source.classes[199]) == (200, "class 988")
    part = saved(tmp_path / "part", list(catalog.datasets()["imagenet-200"].folders), [0, 199])
    source = planned(tmp_path, "imagenet-200", part)
    assert [row.label for row in source.open().rows()] == [0, 199]
    assert source.classes[0] == "goldfish"
    assert "names 3 classes; expected 200, or all that they are chosen from" in refused(
        tmp_path, "imagenet-200", saved(tmp_path / "odd", ["a", "b", "c"], [0])
    )


# Tiny ImageNet


def tiny(root: Path) -> Path:
    """As in tiny-imagenet-200.zip; wnids.txt is not sorted."""
    wnids = (CRANE, MAYPOLE, GOLDFISH)
    root.mkdir()
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    tree(root, *(f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in wnids for i in (0, 1)))
    for wnid in wnids:
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t63\n")
    tree(root, *(f"val/images/val_{i}.JPEG" for i in range(3)), "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(wnids))
    )
    return root


def test_tiny_imagenet(tmp_path):
    home = tiny(tmp_path / "tiny-imagenet-200")
    names = ["crane (n03126707)", "maypole", "goldfish"]
    for place in (tmp_path, home):
        train, val = planned(tmp_path, "tiny-imagenet", place), planned(tmp_path, "tiny-imagenet", place, "val")
        assert sorted({name for _, name in labels(train)}) == sorted(names)
        assert (train.rows, train.passed_over) == (6, ((".txt", 3),))
        assert labels(val) == [(f"val_{i}.JPEG", name) for i, name in enumerate(names)]
        assert [name for _, name in labels(planned(tmp_path, "tiny-imagenet", place, "test"))] == [""]
        assert train.classes == val.classes == catalog.datasets()["imagenet-200"].classes
    (home / "val/val_annotations.txt").write_text("val_0.JPEG goldfish\n")
    assert "val_annotations.txt, line 1: expected NAME<tab>WNID" in refused(tmp_path, "tiny-imagenet", home, "val")
