"""WebDataset tars as a source."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from boomgen.errors import UsageError
from boomgen.sources import open_source

from .source_checks import listed, picture, refused


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_tarfile(tmp_path):
    long = "d/" * 70 + "k"  # a name that needs an extension header
    tar(tmp_path / "b.tar", [("x.jpg", picture(5, "JPEG")), ("x.json", b'{"label": 4}')])
    tar(
        tmp_path / "a.tar",
        [
            ("e/1.cls", b"3\n"), ("e/1.PNG", picture(1)), ("e/1.json", b'{"cls": 9}'),
            ("e/2.img.png", picture(2)),
            ("README", b"no sample"), ("._e.png", b"resource fork"), ("__meta__.json", b"{}"),
            ("e/3.txt", b"a sample without an image"),
            (long + ".webp", picture(3, "WEBP")), (long + ".json", b'{"cls": true, "label": 2}'),
        ],
    )  # fmt: skip
    assert listed(tmp_path) == [("e/1", 3), ("e/2", -1), (long, 2), ("x", 4)]
    source = open_source(str(tmp_path))
    rows = list(source.rows())
    assert (source.kind, source.split, [row.path for row in rows]) == ("webdataset", "data", ["a.tar"] * 3 + ["b.tar"])
    assert [source.read(row) for row in rows] == [picture(1), picture(2), picture(3, "WEBP"), picture(5, "JPEG")]
    assert listed(tmp_path / "b.tar") == [("x", 4)]


def test_tars_of_webdataset_agree_with_its_reader(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "set-000000.tar")) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i:06d}", "png": picture(i), "cls": i % 3, "json": {"cls": 7, "n": i}})
    source = open_source(str(tmp_path))
    ours = [(row.key, row.label, source.read(row)) for row in source.rows()]
    theirs = webdataset.WebDataset(str(tmp_path / "set-000000.tar"), shardshuffle=False)
    assert ours == [(sample["__key__"], int(sample["cls"]), sample["png"]) for sample in theirs]
    assert len(ours) == 20


def test_only_regular_files_count(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("d.png", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            archive.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(picture(1))
        archive.addfile(info, io.BytesIO(picture(1)))
    assert listed(tmp_path) == [("a", -1)]


@pytest.mark.parametrize("names", ["{}-00000-of-00001.tar", "data/{}-00000-of-00001.tar", "imagenet-{}-0000.tar"])
def test_splits_are_told_by_file_names(tmp_path, names):
    for split in ("validation", "test"):
        tar(tmp_path / names.format(split), [(f"{split}.png", picture(1))])
    assert listed(tmp_path, "test") == [("test", -1)]
    assert "pass --split with one of test, validation" in refused(tmp_path)
    tar(tmp_path / names.format("train"), [("train.png", picture(1))])
    assert listed(tmp_path) == [("train", -1)]
    assert listed(tmp_path / names.format("test")) == [("test", -1)]
    assert "no split 'val'" in refused(tmp_path, "val")


def test_a_split_of_any_name_is_a_prefix(tmp_path):
    for name in ("faces-0.tar", "data-1.tar"):
        tar(tmp_path / name, [(name[:5] + ".png", picture(1))])
    assert listed(tmp_path, "faces") == [("faces", -1)]
    assert listed(tmp_path) == [("data-", -1), ("faces", -1)]


@pytest.mark.parametrize("infos", [{}, []])
@pytest.mark.parametrize("below", ["", "sub"])
@pytest.mark.parametrize("as_map", [True, False])
def test_class_names_come_from_the_card(tmp_path, infos, below, as_map):
    names = {"0": "cat", "2": "eel", "10": "fox", "1": "dog"} if as_map else ["cat", "dog", "eel", "fox"]
    info = {
        "features": [{"name": "png", "dtype": "image"}, {"name": "cls", "dtype": {"class_label": {"names": names}}}]
    }
    card = {"dataset_info": info if infos == {} else [info]}
    tar(tmp_path / below / "a.tar", [("a.png", picture(1)), ("a.cls", b"2")])
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# A set\n")
    assert open_source(str(tmp_path / below)).classes == ("cat", "dog", "eel", "fox")


@pytest.mark.parametrize(
    "text", ["no front matter", "---\n[", "---\n- 1\n---\n", "---\ndataset_info: 3\n---\n", "---\n: :"]
)
def test_a_card_without_names_names_none(tmp_path, text):
    tar(tmp_path / "a.tar", [("a.png", picture(1))])
    (tmp_path / "README.md").write_text(text)
    assert open_source(str(tmp_path)).classes == ()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"3")], "the members of sample 'a' are not next to each other"),
        ([("a.png", b"1"), ("a.cls", b"cat")], "sample 'a' has no readable label"),
        ([("a.png", b"1"), ("a.json", b"{")], "sample 'a' has no readable label"),
        ([("a.png", b"1"), ("a.mask.png", b"2")], "sample 'a' holds 2 images (png, mask.png), expected one"),
    ],
)
def test_tars_that_are_no_webdataset(tmp_path, members, said):
    assert said in refused(tar(tmp_path / "a.tar", members))


def test_labels_at_the_end_of_a_tar_are_seen_before_its_first_row(tmp_path):
    """All images, then all labels: with a limit nobody would come to the labels."""
    members = [("a.png", picture(1)), ("b.png", picture(2)), ("a.cls", b"0"), ("b.cls", b"1")]
    tar(tmp_path / "set.tar", members)
    with pytest.raises(UsageError, match="the members of sample 'a' are not next to each other"):
        next(open_source(str(tmp_path / "set.tar")).rows())


def test_a_cut_tar_is_named_wherever_it_was_cut(tmp_path):
    whole = tar(tmp_path / "whole.tar", [(f"{i}.{kind}", picture(i)) for i in range(3) for kind in ("png", "txt")])
    data = whole.read_bytes()
    end = 6 * 1024  # each member is one header block and one data block
    assert data[end : end + 512] == bytes(512)
    for length in [*range(0, end, 512), 100, 700, end - 1, end, end + 511]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        assert "cut.tar" in refused(tmp_path / "cut.tar"), length
    (tmp_path / "cut.tar").write_bytes(data[: end + 512])
    assert len(listed(tmp_path / "cut.tar")) == 3
    (tmp_path / "cut.tar").write_bytes(data[:2048] + b"\xff" * 512 + data[2560:])
    assert "truncated or damaged at byte 2048" in refused(tmp_path / "cut.tar")


def test_a_compressed_tar_is_refused(tmp_path):
    whole = tar(tmp_path / "a.tar", [("a.png", picture(1))])
    whole.write_bytes(gzip.compress(whole.read_bytes()))
    assert "expected a whole, uncompressed tar" in refused(whole)


def test_a_tar_that_shrank_is_an_os_error(tmp_path):
    source = open_source(str(tar(tmp_path / "a.tar", [("a.png", picture(1))])))
    (row,) = source.rows()
    os.truncate(tmp_path / "a.tar", 520)
    with pytest.raises(OSError, match="ends inside a: 8 of"):
        source.read(row)
