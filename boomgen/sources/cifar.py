"""CIFAR-10 and CIFAR-100: the binary version, and the one for Python, pickles, read here by a reader that has no way
to call anything."""

import pickle
import pickletools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError
from boomgen.sources.base import Row, choose_split

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


class Layout(NamedTuple):
    """How one data set is published."""

    folder: str
    splits: dict[str, list[str]]  # the files of each
    meta: str  # file of the class names
    prefix: str = ""  # how the keys in pickles begin
    labels: int = 0  # label bytes before each image of the binary version, of which the last counts; 0: pickles


LAYOUTS = (
    Layout("cifar-10-batches-py", {"test": ["test_batch"], "train": BATCHES}, "batches.meta"),
    Layout("cifar-100-python", {"test": ["test"], "train": ["train"]}, "meta", "fine_"),
    Layout(
        "cifar-10-batches-bin",
        {"test": ["test_batch.bin"], "train": [f"{name}.bin" for name in BATCHES]},
        "batches.meta.txt",
        labels=1,
    ),
    Layout("cifar-100-binary", {"test": ["test.bin"], "train": ["train.bin"]}, "fine_label_names.txt", labels=2),
)
SIZE = 3 * 32 * 32
MAX_BYTES, MAX_STEPS, MAX_NAME = 1 << 30, 2_000_000, 200  # a step can be one byte long, and what it makes 60
GLOBALS = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}
PUSHES: dict[str, Callable[[Any], Any]] = {  # the steps that push what their own bytes say
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), lambda arg: arg),
    **dict.fromkeys(("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), lambda arg: arg),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda arg: arg.encode("latin-1")),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT"), lambda _: []),
    **{"EMPTY_TUPLE": lambda _: (), "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False},
}
TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1}


def is_here(place: Path) -> bool:
    """Whether a folder, or one in it with the name that the authors gave it, holds a whole split of one data set."""
    return len(_found(place)) == 1


class Cifar:
    """One split; each of its files is read when it is first asked for, and kept."""

    kind = "cifar"

    def __init__(self, place: Path, split: str | None) -> None:
        self.passed_over = Counter[str]()
        [(root, layout)] = _found(place)
        splits = _whole(root, layout)
        missing = [name for name in layout.splits.get(split or "train", ()) if not (root / name).is_file()]
        if missing:
            rest = f", or pass --split with one of {', '.join(splits)}" if split is None else ""
            raise UsageError(f"{root} has no {', '.join(missing)}: it is not whole; unpack it again{rest}")
        self.split = choose_split(list(splits), split, str(root))
        self.classes = _names(root / layout.meta, layout) if (root / layout.meta).is_file() else ()
        self._root, self._files, classes = root, splits[self.split], len(self.classes) or inf
        self._batch = cache(lambda name: _read(root / name, layout, classes))

    def rows(self) -> Iterator[Row]:
        """The offset is the row number in the file."""
        places = ((name, i, label) for name in self._files for i, label in enumerate(self._batch(name)[1]))
        for n, (name, i, label) in enumerate(places):
            yield Row(f"{self.split}-{n:05d}", name, i, SIZE, label)

    def read(self, row: Row) -> NDArray[np.uint8]:
        """Pixels of shape (32, 32, 3)."""
        try:
            pixels: NDArray[np.uint8] = self._batch(row.path)[0][row.offset]
            return pixels
        except (UsageError, IndexError) as err:
            raise OSError(f"{self._root / row.path} is not what it was when the rows were listed: {err}") from err


def _found(place: Path) -> list[tuple[Path, Layout]]:
    """The data sets here of which a split is whole."""
    roots = ((root, layout) for layout in LAYOUTS for root in (place, place / layout.folder))
    return [
        (root, layout)
        for root, layout in roots
        if any(_may_be(root / names[0], layout) for names in _whole(root, layout).values())
    ]


def _whole(root: Path, layout: Layout) -> dict[str, list[str]]:
    return {split: names for split, names in layout.splits.items() if all((root / name).is_file() for name in names)}


def _may_be(path: Path, layout: Layout) -> bool:
    """`train` may be anyone's file, so its first byte, or its length, has a say."""
    if layout.labels:
        return path.stat().st_size % (layout.labels + SIZE) == 0
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _names(path: Path, layout: Layout) -> tuple[str, ...]:
    if layout.labels:
        return tuple(_load(path, lambda data: tuple(_text(line) for line in data.splitlines() if line)))
    return tuple(_load(path, lambda data: tuple(map(_text, _dict(data)[f"{layout.prefix}label_names"]))))


def _read(path: Path, layout: Layout, classes: float) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels (N, 32, 32, 3) and N labels of one file."""
    found: tuple[NDArray[np.uint8], list[int]] = _load(
        path,
        lambda data: (
            _binary(data, layout.labels, classes)
            if layout.labels
            else _batch(_dict(data), f"{layout.prefix}labels", classes)
        ),
    )
    return found


def _load(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of the bytes of a file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return parse(path.read_bytes())
    except (OSError, ValueError) as err:
        why = str(err)[:200]
    except KeyError as err:
        why = f"it has no {err}"
    except (IndexError, TypeError, AttributeError):
        why = "its parts do not fit together"
    raise UsageError(f"{path} is not a CIFAR file ({why}); expected what its authors publish: download it again")


def _dict(pickled: bytes) -> dict[str, Any]:
    items = _unpickle(pickled)
    return {_text(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _binary(data: bytes, count: int, classes: float) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels and labels of records of `count` label bytes and an image."""
    if not data or len(data) % (count + SIZE):
        raise ValueError(f"it has {len(data)} bytes, not a multiple of {count + SIZE}")
    records = np.frombuffer(data, np.uint8).reshape(-1, count + SIZE)
    labels = records[:, count - 1].tolist()
    return _pixels(records[:, count:]), _checked(labels, "labels", classes)


def _pixels(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _checked(labels: list[int], key: str, classes: float) -> list[int]:
    if any(type(label) is not int or not 0 <= label < classes for label in labels):
        raise ValueError(f"its {key} are not all whole numbers in 0 <= n < {classes}")
    return labels


def _text(name: Any) -> str:
    """A short string; Python 2 wrote them as bytes."""
    if len(name) > MAX_NAME:
        raise ValueError(f"it has a name of {len(name)} letters")
    text = name if isinstance(name, str) else str(name, "utf-8")
    text.encode()  # UnicodeError, a ValueError, where it holds half a character
    return text


def _batch(content: dict[str, Any], key: str, classes: float) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels (N, 32, 32, 3) and N labels."""
    labels = _checked(content[key], key, classes)
    match content["data"]:
        case [_, (_, shape, [("u1" | b"u1", *_), _], False, data)] | [(data, [("u1", *_), _], shape, "C"), _]:
            data = data.encode("latin-1") if isinstance(data, str) else data
            if shape == (len(labels), SIZE) and len(data) == len(labels) * SIZE:
                return _pixels(np.frombuffer(data, np.uint8)), labels
    raise ValueError(f"its data are not {len(labels)} x {SIZE} unsigned bytes in C order, a row for each label")


def _unpickle(pickled: bytes) -> Any:
    """What a pickle describes, but a dict as [key, value, key, value, ...] and an object as [arguments, state].

    Nothing is called, and nothing is hashed or compared, for with what a stranger nests that may never end.
    """
    stack, marks, memo = list[Any](), list[list[Any]](), dict[int, Any]()
    steps: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]] = islice(pickletools.genops(pickled), MAX_STEPS)
    for step, arg, _ in steps:
        if step.name in ("TUPLE", "APPENDS", "SETITEMS"):
            taken, stack = stack, marks.pop()
        else:
            taken = [stack.pop() for _ in range(TAKES.get(step.name, 0))][::-1]
        match step.name:
            case name if name in PUSHES:
                stack.append(PUSHES[name](arg))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                stack[-1].extend(taken)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL" | "STACK_GLOBAL":
                called = ".".join(taken) or arg.replace(" ", ".", 1)
                if called not in GLOBALS:
                    raise ValueError(f"it asks for {ascii(called[:80])[1:-1]}, which is not run")
                stack.append(called)
            case "REDUCE":  # bytes that protocol 2 wrote as a str stay one: a copy for each mention may be many
                decoded = taken[0] == "_codecs.encode" and taken[1][1] == "latin1"
                stack.append(taken[1][0] if decoded else [taken[1], None])
            case "BUILD":
                stack[-1][1] = taken[0]
            case "MARK":
                marks.append(stack)
                stack = []
            case "STOP":
                return stack[-1]
            case "PROTO" | "FRAME":
                pass
            case name:
                raise ValueError(f"it has a step {name}, which is not taken")
    raise ValueError(f"it has more than {MAX_STEPS} steps")
