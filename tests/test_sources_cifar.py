"""CIFAR's files: what they hold, and that the programs in hostile ones do not run."""

import copyreg
import io
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from boomgen.sources import cifar, open_source

from .source_checks import picture, refused

CIFAR10 = ("labels", "batches.meta", "label_names", {f"data_batch_{i}": i for i in range(1, 6)} | {"test_batch": 3})
CIFAR100 = ("fine_labels", "meta", "fine_label_names", {"train": 7, "test": 4})  # how many rows each file gets
both = pytest.mark.parametrize("data_set", [CIFAR10, CIFAR100], ids=["CIFAR-10", "CIFAR-100"])


class Python2(pickle._Pickler):
    """Writes every string as Python 2's cPickle did."""

    def save_string(self, string):
        text = string.encode() if isinstance(string, str) else string
        self.write((b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + len(text).to_bytes(4, "little")) + text)
        self.memoize(string)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python2(content):
    Python2(file := io.BytesIO(), 2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def pixels(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)


def batch(**changes):
    return python2({"labels": [0, 1, 2], "data": pixels(3)} | changes)


def layout(root, data_set=CIFAR10, dump=python2, key=str):
    """The files of a data set, as `dump` writes them, with keys made by `key`."""
    labels, meta, names, counts = data_set
    classes = [f"clàss {i}" for i in range(10 if data_set is CIFAR10 else 100)]
    contents = {meta: {"num_vis": 3072, names: classes, "coarse_label_names": ["all"]}}
    for seed, (name, n) in enumerate(counts.items()):
        numbers = [(5 * seed + 7 * i) % len(classes) for i in range(n)]
        contents[name] = {"batch_label": name, labels: numbers, "coarse_labels": [0] * n, "data": pixels(n, seed)}
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(dump({key(k): v for k, v in content.items()}))
    return root


def read(root, split=None):
    """All rows and all images, after the checks that hold for every source."""
    source = open_source(str(root), split)
    rows, again = list(source.rows()), open_source(str(root), source.split)
    assert (again.kind, again.split, list(again.rows())) == ("cifar", source.split, rows)
    assert {source.read(row).nbytes for row in rows} == {row.size for row in rows} == {3072}
    return rows, np.stack([again.read(row) for row in rows])


@both
def test_cifar_equals_a_plain_read_of_the_files(tmp_path, data_set):
    label_key, *_, counts = data_set
    layout(tmp_path, data_set)
    for split in ("train", "test"):
        files = [name for name in counts if name.startswith("test") == (split == "test")]
        plain = [pickle.loads((tmp_path / name).read_bytes(), encoding="bytes") for name in files]
        places = [(name, i) for name in files for i in range(counts[name])]
        labels = [label for batch in plain for label in batch[label_key.encode()]]
        rows, images = read(tmp_path, split)
        assert [row[:5] for row in rows] == [
            (f"{split}-{n:05d}", *place, 3072, labels[n]) for n, place in enumerate(places)
        ]
        planes = np.concatenate([batch[b"data"] for batch in plain])
        assert np.array_equal(images, planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert open_source(str(tmp_path)).classes == tuple(f"clàss {i}" for i in range(10 if data_set is CIFAR10 else 100))


@both
def test_the_binary_version_reads_the_same(tmp_path, data_set):
    label_key, *_, counts = data_set
    old = layout(tmp_path / "old", data_set)
    new = tmp_path / ("cifar-10-batches-bin" if data_set is CIFAR10 else "cifar-100-binary")
    new.mkdir()
    for name in counts:
        content = pickle.loads((old / name).read_bytes(), encoding="latin-1")
        before = np.array([[9, n][-1 if data_set is CIFAR10 else 0 :] for n in content[label_key]], np.uint8)
        np.hstack([before, content["data"]]).tofile(new / f"{name}.bin")
    classes = open_source(str(old)).classes
    (new / ("batches.meta.txt" if data_set is CIFAR10 else "fine_label_names.txt")).write_text(
        "\n".join(classes) + "\n\n"
    )
    for split in ("train", "test"):
        (rows, images), (again, same) = read(old, split), read(new, split)
        assert [row._replace(path="") for row in rows] == [row._replace(path="") for row in again]
        assert np.array_equal(images, same)
    assert open_source(str(tmp_path / new.name)).classes == open_source(str(new)).classes == classes
    with next(new.glob("test*.bin")).open("r+b") as file:
        file.write(b"\xc8" * 2)
    assert "is not a CIFAR file (its labels are not all whole numbers in 0" in refused(new, "test")


@both
@pytest.mark.parametrize("key", [str, str.encode])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_saved_again_by_python_3_reads_the_same(tmp_path, data_set, protocol, key):
    old = layout(tmp_path / "old", data_set)
    new = layout(tmp_path / "new", data_set, lambda content: pickle.dumps(content, protocol), key)
    assert read(old)[0] == read(new)[0]
    assert np.array_equal(read(old)[1], read(new)[1])
    assert open_source(str(old)).classes == open_source(str(new)).classes


def test_cifar_splits_are_those_that_are_whole(tmp_path):
    place = layout(tmp_path / "cifar-10-batches-py")
    assert open_source(str(tmp_path)).split == open_source(str(place)).split == "train"
    assert read(tmp_path, "test")[0] == read(place, "test")[0]
    assert "no split 'val'; pass --split with one of test, train" in refused(tmp_path, "val")
    (place / "data_batch_4").unlink()
    (place / "data_batch_2").unlink()
    said = f"{place} has no data_batch_2, data_batch_4: it is not whole; unpack it again"
    assert refused(tmp_path, "train") == said
    assert refused(tmp_path) == f"{said}, or pass --split with one of test"
    (place / "batches.meta").unlink()
    source = open_source(str(tmp_path), "test")
    assert (source.split, source.classes) == ("test", ())
    layout(tmp_path / "cifar-100-python", CIFAR100)
    assert "holds cifar-10-batches-py, cifar-100-python; expected" in refused(tmp_path)


def test_an_image_folder_with_a_train_and_a_test_is_no_cifar(tmp_path):
    for name in ("train", "test"):
        for image in (tmp_path / "folders" / name / "a.png", tmp_path / "lists/images" / f"{name}.png"):
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(picture(1))
        (tmp_path / "lists" / name).write_text(f"images/{name}.png\n")
    assert open_source(f"{tmp_path}/folders").kind == open_source(f"{tmp_path}/lists").kind == "folder"


@pytest.mark.parametrize("content", [None, b"\x80\x02].", batch(labels=[0], data=pixels(1))])
def test_a_cifar_file_that_changed_is_an_os_error(tmp_path, content):
    *_, row = open_source(str(layout(tmp_path)), "test").rows()
    source, file = open_source(str(tmp_path), "test"), tmp_path / "test_batch"
    file.write_bytes(content) if content else file.unlink()
    with pytest.raises(OSError, match="test_batch is not what it was when the rows were listed"):
        source.read(row)


class Touch(str):
    def __reduce__(self):
        return os.system, (f"touch {self}",)


def written(value):
    return pickle.dumps(value, 2)[2:-1]  # without the first and the last step


def call(function, *args):
    return b"\x80\x04" + function + written(args) + b"R."


GETATTR = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\0\0\0os\x85RX\x06\0\0\0systemtR"
PROGRAMS = [  # what is asked for, and a pickle that touches a marker
    ("asks for os.system", lambda m: call(b"cos\nsystem\n", f"touch {m}")),
    ("asks for posix.system", lambda m: pickle.dumps({"data": pixels(3), "labels": [0, 1, 2], "more": Touch(m)})),
    ("asks for posix.system", lambda m: pickle.dumps(np.array([Touch(m)], object), 3)),
    ("asks for builtins.eval", lambda m: call(b"cbuiltins\neval\n", f"open({m!r}, 'w').close()")),
    ("asks for builtins.getattr", lambda m: call(GETATTR, f"touch {m}")),
    ("asks for shutil.os.system", lambda m: call(b"\x8c\x06shutil\x8c\x09os.system\x93", f"touch {m}")),
    ("asks for subprocess.Popen", lambda m: call(b"csubprocess\nPopen\n", ["touch", m])),
    ("asks for numpy.load", lambda m: call(b"cnumpy\nload\n", f"{m}.npy", None, True)),
    ("has a step EXT1", lambda m: call(b"\x82\xe1", f"touch {m}")),
    ("has a step INST", lambda m: b"\x80\x02(" + written(f"touch {m}") + b"ios\nsystem\n."),
    ("asks for os.system", lambda m: b"\x80\x02(cos\nsystem\n" + written(f"touch {m}") + b"o."),
]


@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
@pytest.mark.parametrize(("said", "program"), PROGRAMS)
def test_a_program_in_a_cifar_file_does_not_run(tmp_path, monkeypatch, said, program, name):
    monkeypatch.setitem(copyreg._extension_cache, 0xE1, os.system)  # where find_class is not asked
    marker = tmp_path / "marker"
    np.save(f"{marker}.npy", np.array([Touch(marker)], object))
    pickled = program(str(marker))
    getattr(pickle.loads(pickled), "wait", int)()
    marker.unlink()  # so it runs where it can
    (layout(tmp_path / "cifar") / name).write_bytes(pickled)
    assert f"{name} is not a CIFAR file (it {said}" in refused(tmp_path / "cifar", "test")
    assert not marker.exists()


BAD = [
    *((cut, "pickle exhausted before seeing STOP") for cut in (b"", batch()[:-1])),
    (b"\x80\x02Nr\xff\xff\xff\x7f.", "its parts do not fit together"),  # the memo of `pickle` grows to 32 GB
    (b"\x80\x05\x96\0\0\0\0\x09\0\0\0.", "expected 38654705664 bytes in a bytearray8, but only 1"),
    (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not enough data in stream to read long4"),
    (b"\x80\x02})" + b"q\0h\0\x86" * 64 + b"K\x01s.", "its parts do not fit together"),  # to hash it takes 2**64 steps
    (b"\x80\x02" + b"]" * 30_000, "it has more than 20000 steps"),
    (b"\x80\x02K\x01Q.", "it has a step BINPERSID"),
    (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", r"it asks for a\nb.c, which is not run"),
    (call(b"cnumpy.core.multiarray\nscalar\n", np.dtype("O"), 1), "it asks for numpy.core.multiarray.scalar"),
    (python2({"data": pixels(3)}), "it has no 'labels'"),
    *((batch(labels=[0, 1, bad]), "its labels are not all whole numbers in 0") for bad in (10, -1, True, "2")),
    (batch(**{"x" * 201: 0}), "it has a name of 201 letters"),
    (batch(labels=[0] * 4).replace(b"K\x03M\x00\x0c", b"K\x04M\x00\x0c"), "its data are not 4 x 3072 unsigned bytes"),
    (pickle.dumps({"labels": [0], "data": pixels(1)}, 2).replace(b"latin1", b"utf_16"), "its data are not 1 x 3072"),
    *((batch(data=data), "its data are not 3 x 3072") for data in (np.asfortranarray(pixels(3)), pixels(3).view("i1"))),
    *((batch(data=data), "its data are not 3") for data in (np.array([[None] * 3072] * 3), pixels(3).reshape(6, 1536))),
]


@pytest.mark.parametrize(("pickled", "said"), BAD)
def test_a_cifar_file_that_is_not_sound_is_refused_in_little_memory(tmp_path, monkeypatch, pickled, said):
    monkeypatch.setattr(cifar, "MAX_STEPS", 20_000)
    (layout(tmp_path) / "test_batch").write_bytes(pickled)
    tracemalloc.start()
    message, (_, peak) = refused(tmp_path, "test"), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"test_batch is not a CIFAR file ({said}" in message
    assert peak < 2**24
    os.truncate(tmp_path / "test_batch", 2**30 + 1)
    assert f"(it has more than {2**30} bytes)" in refused(tmp_path, "test")
