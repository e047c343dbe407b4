"""Hugging Face data sets as a source: saved, and in Parquet; on the Hub, see test_hub."""

import pytest

from boomgen.errors import RowError
from boomgen.sources import hf, open_source

from .source_checks import listed, picture, refused


def table(count: int = 4, **columns):
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog"])
    features = {"n": datasets.Value("int64"), "image": datasets.Image(), "kind": names, "coarse": names}
    rows = {
        "n": list(range(count)),
        "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)],
        "kind": [i % 2 for i in range(count)],
        "coarse": [0] * count,
    }
    return datasets.Dataset.from_dict(rows | columns, features=datasets.Features(features))


def test_a_saved_data_set(tmp_path):
    table().save_to_disk(tmp_path)
    source = open_source(str(tmp_path))
    assert (source.kind, source.split, source.classes) == ("huggingface", "data", ("cat", "dog"))
    assert listed(tmp_path) == [(f"data-{i:08d}", i % 2) for i in range(4)]
    rows = list(source.rows())
    assert rows[2][:5] == ("data-00000002", "", 2, -1, 0)
    assert [source.read(row) for row in rows] == [picture(i) for i in range(4)]
    with pytest.raises(OSError, match="has 4 rows"):
        source.read(rows[3]._replace(offset=4))


def test_a_saved_data_set_of_chosen_rows_keeps_their_order(tmp_path):
    table(6).select([5, 1, 2]).save_to_disk(tmp_path)
    source = open_source(str(tmp_path))
    assert [source.read(row) for row in source.rows()] == [picture(i) for i in (5, 1, 2)]
    assert [row.label for row in source.rows()] == [1, 1, 0]


def test_a_saved_dict_of_splits(tmp_path):
    import datasets

    datasets.DatasetDict(train=table(3), test=table(2)).save_to_disk(tmp_path)
    assert open_source(str(tmp_path)).split == "train"
    assert listed(tmp_path, "test") == [("test-00000000", 0), ("test-00000001", 1)]
    assert "no split 'dev'; pass --split with one of train, test" in refused(tmp_path, "dev")


def test_columns_can_be_chosen(tmp_path):
    table().save_to_disk(tmp_path)
    assert [row.label for row in open_source(str(tmp_path), label_column="coarse").rows()] == [0] * 4
    numbers = open_source(str(tmp_path), label_column="n")
    assert ([row.label for row in numbers.rows()], numbers.classes) == ([0, 1, 2, 3], ())
    said = refused(tmp_path, image_column="kind")
    assert "'kind' is not a column of images; pass --image-column with one of image (it has n, image, kind" in said
    said = refused(tmp_path, label_column="image")
    assert "'image' is not a column of labels; pass --label-column with one of kind, coarse, n" in said


def test_labels_fall_back_to_integer_columns_and_then_to_none(tmp_path):
    images = table().select_columns(["image"])
    images.add_column("label", [5, None, 7, 8]).save_to_disk(tmp_path / "whole")
    images.add_column("label", ["dog", None, "cat", "dog"]).save_to_disk(tmp_path / "text")
    images.save_to_disk(tmp_path / "none")
    assert [label for _, label in listed(tmp_path / "whole")] == [5, -1, 7, 8]
    assert [label for _, label in listed(tmp_path / "text")] == [-1] * 4  # words may be names or whole texts
    words = open_source(str(tmp_path / "text"), label_column="label")
    assert words.classes == ("cat", "dog")
    assert [row.label for row in words.rows()] == [1, -1, 0, 1]
    assert [label for _, label in listed(tmp_path / "none")] == [-1] * 4


def test_images_as_raw_bytes_and_as_paths(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict(
        {"raw": [picture(1), picture(2)]}, features=datasets.Features(raw=datasets.Value("binary"))
    )
    data.save_to_disk(tmp_path / "raw")
    assert "no column of images; pass --image-column with one of raw" in refused(tmp_path / "raw")
    source = open_source(str(tmp_path / "raw"), image_column="raw")
    assert [source.read(row) for row in source.rows()] == [picture(1), picture(2)]
    (tmp_path / "a.png").write_bytes(picture(3))
    on_disk = table(1, image=[{"bytes": None, "path": str(tmp_path / "a.png")}])
    source = hf.Table(on_disk, "train", hf.Columns(), "here", saved_here=True)
    (row,) = source.rows()
    assert source.read(row) == picture(3)
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(row)


def test_files_that_datasets_unpacked_are_read(tmp_path, cache):
    """What load_dataset makes of image files: paths, below the folder or below its cache."""
    import datasets

    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.png").write_bytes(picture(3))
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    source = hf.Table(data, "train", hf.Columns(), str(tmp_path / "images"))
    assert [source.read(row) for row in source.rows()] == [picture(3)]


def test_an_empty_cell_is_a_failed_row(tmp_path):
    table(2, image=[None, {"bytes": picture(1), "path": None}]).save_to_disk(tmp_path)
    source = open_source(str(tmp_path))
    empty, full = source.rows()
    assert source.read(full) == picture(1)
    with pytest.raises(RowError, match="undecodable: data-00000000 has no image in column 'image'"):
        source.read(empty)


def test_a_saved_data_set_that_lost_a_file(tmp_path):
    table().save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).unlink()
    assert "is not readable" in refused(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_downloaded_copy_in_parquet(tmp_path, cache):
    place = tmp_path / "copy"
    (place / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        table(count).to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")
    source = open_source(str(place))
    assert (source.split, source.classes) == ("train", ("cat", "dog"))
    assert [source.read(row) for row in source.rows()] == [picture(i) for i in range(3)]
    assert listed(place, "test") == [("test-00000000", 0), ("test-00000001", 1)]
    (place / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert f"data set {place} does not load" in refused(place)
