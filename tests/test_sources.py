"""IDX files, image folders, and telling the kinds of sources apart."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from boomgen.catalog import asset
from boomgen.sources import open_source

from .source_checks import listed, picture, refused

SAMPLE = asset("fashion-sample")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


# IDX


def test_idx_equals_a_plain_read_of_the_files():
    images = np.frombuffer(gzip.decompress((SAMPLE / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((SAMPLE / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    source = open_source(str(SAMPLE), "test")
    rows = list(source.rows())
    assert (source.kind, source.split, source.classes) == ("idx", "test", ())
    assert np.array_equal(np.stack([source.read(row) for row in rows]), images.reshape(-1, 28, 28))
    assert [row.label for row in rows] == labels.tolist()
    assert rows[3][:5] == ("t10k-00003", "t10k-images-idx3-ubyte.gz", 3 * 784, 784, int(labels[3]))
    assert listed(SAMPLE) == [(row.key, row.label) for row in rows]  # the only split needs no name


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_sample_is_the_first_100_test_images_of_each_class_in_file_order():
    test, sample = open_source(str(DEBIAN), "test"), open_source(str(SAMPLE), "test")
    count, chosen = [0] * 10, []
    for row in test.rows():
        count[row.label] += 1
        if count[row.label] <= 100:
            chosen.append(row)
    for ours, theirs in zip(sample.rows(), chosen, strict=True):
        assert ours.label == theirs.label
        assert np.array_equal(sample.read(ours), test.read(theirs))
    assert open_source(str(DEBIAN)).split == "train"


def idx(folder: Path, prefix: str, count: int = 3) -> Path:
    pixels = np.arange(count * 20, dtype=np.uint8).tobytes()
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 4, 5))
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels)
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(count))
    return folder


def test_idx_plain_files_and_splits(tmp_path):
    idx(idx(idx(tmp_path, "train"), "t10k"), "extra")
    assert open_source(str(tmp_path)).split == "train"
    assert listed(tmp_path, "extra") == [(f"extra-{i:05d}", 0) for i in range(3)]
    source = open_source(str(tmp_path), "test")
    assert source.read(list(source.rows())[2])[1, 2] == 2 * 20 + 7
    assert "no split 'val'; pass --split with one of extra, test, train" in refused(tmp_path, "val")
    for path in tmp_path.glob("train-*"):
        path.unlink()
    assert "no split was asked for and none is called 'train'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda i, _: i.write_bytes(i.read_bytes()[:-1]), "holds 59 bytes of data, expected 60 (3 x 4 x 5)"),
        (lambda i, _: i.write_bytes(i.read_bytes() + b"x"), "holds too many bytes of data, expected 60"),
        (lambda i, _: i.write_bytes(b"\x89PNG" + i.read_bytes()[4:]), "begins with 89504e47, expected 00000803"),
        (lambda i, _: i.write_bytes(b""), "begins with nothing, expected 00000803"),
        (lambda i, _: i.write_bytes(i.read_bytes()[:15] + b"\0"), "holds images without pixels ((4, 0))"),
        (
            lambda i, _: i.write_bytes(bytes([0, 0, 8, 3, 0])),
            "begins with 00000803, expected 00000803 and 3 dimensions",
        ),
        (
            lambda i, la: la.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7])),
            "holds 3 images, but its labels file 1 labels",
        ),
        (lambda i, la: la.unlink(), "has no train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz"),
        (
            lambda i, _: (i.with_name(i.name + ".gz").write_bytes(gzip.compress(i.read_bytes())[:-9]), i.unlink()),
            "train-images-idx3-ubyte.gz is not readable",
        ),
    ],
)
def test_idx_files_that_are_not_whole(tmp_path, harm, said):
    idx(tmp_path, "train")
    harm(tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte")
    assert said in refused(tmp_path)


def test_idx_files_that_vanish_are_an_os_error(tmp_path):
    rows = list(open_source(str(idx(tmp_path, "train"))).rows())
    source = open_source(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(OSError, match="not what it was"):
        source.read(rows[0])


# Folders


def tree(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value))
    return root


def test_class_folders_are_walked_in_order(tmp_path):
    tree(tmp_path, "dog/b.PNG", "dog/a/z.jpg", "cat/10.png", "cat/9.png", "Ant/x.y.webp", ".git/a.png", "dog/.hid.png")
    (tmp_path / "dog/notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path))
    assert (source.kind, source.split, source.classes) == ("folder", "data", ("Ant", "cat", "dog"))
    assert listed(tmp_path) == [
        ("Ant/x.y.webp", 0), ("cat/10.png", 1), ("cat/9.png", 1), ("dog/a/z.jpg", 2), ("dog/b.PNG", 2)
    ]  # fmt: skip
    rows = list(source.rows())
    assert rows[1].path == rows[1].key
    assert source.read(rows[1]) == (tmp_path / "cat/10.png").read_bytes()


def test_a_flat_folder_has_no_labels(tmp_path):
    tree(tmp_path, "b.png", "a.png", "ö.png")
    assert open_source(str(tmp_path)).classes == ()
    assert listed(tmp_path) == [("a.png", -1), ("b.png", -1), ("ö.png", -1)]
    said = "no split 'val', it is not divided into splits; drop --split"
    assert refused(tmp_path, "val") == f"{tmp_path}: {said}"


def test_every_extension_counts(tmp_path):
    names = [f"a.{kind}" for kind in ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")]
    tree(tmp_path, *names, "png", ".png", "a.png.txt")
    assert [key for key, _ in listed(tmp_path)] == names


def test_linked_folders_are_not_followed_and_linked_files_are(tmp_path):
    real = tree(tmp_path / "real", "a.png")
    place = tree(tmp_path / "place", "cat/c.png")
    (place / "linked").symlink_to(real)
    (place / "cat/loop").symlink_to(place)
    (place / "cat/file.png").symlink_to(real / "a.png")
    assert listed(place) == [("cat/c.png", 0), ("cat/file.png", 0)]
    (real / "a.png").unlink()
    assert "place/cat/file.png: No such file or directory; expected an image file" in refused(place)


def test_folders_named_as_splits_are_splits(tmp_path):
    tree(tmp_path, "train/cat/a.png", "val/cat/a.png", "val/dog/b.png", "docs.txt")
    assert open_source(str(tmp_path)).split == "train"
    assert listed(tmp_path, "val") == [("cat/a.png", 0), ("dog/b.png", 1)]
    assert "no split 'test'; pass --split with one of train, val" in refused(tmp_path, "test")
    os.rename(tmp_path / "train", tmp_path / "test")
    assert "no split was asked for and none is called 'train'; pass --split with one of test, val" in refused(tmp_path)


def test_folders_in_folders_are_walked_at_any_depth(tmp_path):
    place = tree(tmp_path, "e/b.png")
    for _ in range(600):
        (place := place / "d").mkdir()
    tree(place, "a.png")
    assert [label for _, label in listed(tmp_path)] == [0, 1]


def test_a_class_may_be_called_train_or_data(tmp_path):
    tree(tmp_path, "train/a.png", "airplane/b.png", "data/c.png")
    assert listed(tmp_path) == [("airplane/b.png", 0), ("data/c.png", 1), ("train/a.png", 2)]
    assert listed(tmp_path, "train") == [("a.png", -1)]  # asked for by name, it is the split


def test_images_beside_class_folders_are_refused(tmp_path):
    tree(tmp_path, "cat/a.png", "stray.png", "stray2.png")
    assert "holds images (stray.png, 2 in all) beside folders of images (cat); expected class folders" in refused(
        tmp_path
    )


def test_a_file_that_changed_or_left_is_an_os_error(tmp_path):
    source = open_source(str(tree(tmp_path, "a.png", "b.png")))
    rows = list(source.rows())
    (tmp_path / "a.png").write_bytes(b"short")
    (tmp_path / "b.png").unlink()
    with pytest.raises(OSError, match="has 5 bytes, it had"):
        source.read(rows[0])
    with pytest.raises(FileNotFoundError):
        source.read(rows[1])


# What is none of these


def test_what_is_not_understood(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    expected = (
        "expected IDX files, an npz of MedMNIST, a data set written by save_to_disk, ImageNet with lists of classes, "
        "WebDataset tars, Parquet files with images, batches of CIFAR-10 or CIFAR-100, image files or a Hub id "
        "owner/name"
    )
    assert refused(tmp_path / "empty") == f"{tmp_path}/empty is an empty folder; {expected}"
    assert refused(tmp_path / "texts") == f"{tmp_path}/texts holds a.txt, b.txt, c.txt ...; {expected}"
    assert refused(tmp_path / "none") == f"{tmp_path}/none does not exist; {expected}"
    assert refused(tmp_path / "texts/a.txt") == f"{tmp_path}/texts/a.txt is a file of another kind; {expected}"
    assert "does not exist" in refused("./own/name")
    assert "does not exist" in refused("cifar11")


def test_pipes_and_devices_are_no_images(tmp_path):
    """Reading one would never end."""
    tree(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    source = open_source(str(tmp_path))
    assert [row.key for row in source.rows()] == ["a.png"]
    assert source.passed_over == {".png": 2}


def test_columns_are_for_tables(tmp_path):
    tree(tmp_path, "a.png")
    said = f"{tmp_path} holds image files, which have no columns; drop --label-column"
    assert refused(tmp_path, label_column="label") == said


def test_single_files_that_come_close(tmp_path):
    for name, advice in (
        ("a.tar.gz", "is a compressed tar (gunzip it)"),
        ("a.parquet", "is one Parquet file (give its"),
    ):
        (tmp_path / name).write_bytes(b"x")
        assert refused(tmp_path / name).startswith(f"{tmp_path}/{name} {advice}")


def test_an_image_folder_with_parquet_metadata_is_an_image_folder(tmp_path):
    tree(tmp_path, "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"")
    assert open_source(str(tmp_path)).kind == "folder"
