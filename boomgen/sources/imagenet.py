"""ImageNet and Tiny ImageNet as their authors and Kaggle lay them out, where a list tells the class of a flat image.

ImageNet-1k as torchvision wants it, train/WNID and val/WNID, is a plain folder of classes: see `folder`.
"""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from boomgen.errors import UsageError
from boomgen.sources.base import NO_LABEL, Source, choose_split
from boomgen.sources.folder import Folder, Listed

WNID = re.compile(r"n\d{8}")
FLAT = "ILSVRC2012_"  # how the names of flat images begin
KAGGLE, DEVKIT = "ILSVRC/Data/CLS-LOC", "ILSVRC2012_devkit_t12/data"
CSV, TRUTH, MAP = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "map_clsloc.txt"
TINY, TINY_VAL = "wnids.txt", "val/val_annotations.txt"
MAX_LIST = 2**26  # bytes
UNTAR = "for t in n*.tar; do mkdir ${t%.tar}; tar -xf $t -C ${t%.tar}; done"
UNPACK = {  # what to run beside the tar of a split, called TAR here
    "train": f"mkdir train; tar -xf TAR -C train; cd train; {UNTAR}",
    "val": "mkdir val; tar -xf TAR -C val",
    "test": "mkdir test; tar -xf TAR -C test",
}
MAKE_MAP = (
    "python -c \"import scipy.io; [print(s[1], s[0]) for s in scipy.io.loadmat('{0}/meta.mat', squeeze_me=True)"
    "['synsets'] if s[4] == 0]\" > {0}/" + MAP
)


def is_here(place: Path) -> bool:
    """Whether a place holds ImageNet's own tars, or images whose classes are in a list."""
    if not place.is_dir():
        return place.name.startswith(f"{FLAT}img_") and place.suffix == ".tar" and place.is_file()
    packed = any(place.glob(f"{FLAT}img_*.tar")) or _class_tars(place)
    return packed or (place / TINY).is_file() or _base(place) != place or _is_flat(place / "val")


def open_listed(place: Path, split: str | None, wanted: tuple[str, ...]) -> Source:
    """One split; its labels are places in `wanted`, a list of WordNet ids (empty: in the sorted ones of its list).

    Raises:
        UsageError: it is still packed, or nothing tells the classes of its flat images; the line says what to run.
    """
    base = _base(place)
    splits = [name for name in UNPACK if (base / name).is_dir()]
    _refuse_packed(place, base, splits, split or "train")
    chosen = choose_split(splits, split, str(place))
    folder = base / chosen
    if (base / TINY).is_file() and (folder / "images").is_dir():
        return _listed(folder / "images", chosen, wanted, base / TINY_VAL, dict(_tiny(base / TINY_VAL)))
    if not _is_flat(folder):
        return Folder(base, chosen, wanted)
    where, found = _ilsvrc(place) if chosen == "val" else (place, {})
    return _listed(folder, chosen, wanted, where, found)


def _listed(folder: Path, split: str, wanted: tuple[str, ...], where: Path, wnids: dict[str, str]) -> Listed:
    """A flat folder with the WordNet id of each name. Test images have none."""
    classes = wanted or tuple(sorted(set(wnids.values())))
    number = {wnid: label for label, wnid in enumerate(classes)}
    labels = {name: number.get(wnid, NO_LABEL) for name, wnid in wnids.items()}
    return Listed(folder, split, classes, None if split == "test" else labels, where)


def _base(place: Path) -> Path:
    """The folder of train, val and test."""
    return next((base for base in (place / KAGGLE, place / "Data/CLS-LOC") if base.is_dir()), place)


def _is_flat(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.startswith(FLAT) for entry in entries)


def _class_tars(folder: Path) -> bool:
    return any(WNID.fullmatch(tar.stem) for tar in folder.glob("n*.tar"))


def _refuse_packed(place: Path, base: Path, splits: list[str], asked: str) -> None:
    if place.is_file():
        asked = next((split for split in UNPACK if place.name.startswith(f"{FLAT}img_{split}")), "train")
    tars = [place] if place.is_file() else sorted(base.glob(f"{FLAT}img_*.tar"))
    tar = next((tar for tar in tars if tar.name.startswith(f"{FLAT}img_{asked}")), None)
    if tar and asked in UNPACK and asked not in splits:
        run = f"cd {quote(str(tar.parent))}; {UNPACK[asked].replace('TAR', tar.name)}"
        then = f" (then give the folder {tar.parent})" if place.is_file() else ""
        raise UsageError(f"{tar} is still packed; run: {run}{then}")
    for folder in (base, base / asked):
        if _class_tars(folder):
            run = f"cd {quote(str(folder))}; {UNTAR}; rm n*.tar"
            raise UsageError(f"{folder} holds tars of classes, still packed; run: {run}")


def _ilsvrc(place: Path) -> tuple[Path, dict[str, str]]:
    """The list that tells the classes of val, and the WordNet id of each name in it."""
    for home in (place, place.parent):
        if (home / CSV).is_file():
            return home / CSV, dict(_kaggle(home / CSV))
        if (home / DEVKIT / TRUTH).is_file():
            return home / DEVKIT / TRUTH, dict(_devkit(home / DEVKIT))
    raise UsageError(
        f"{place}: nothing tells the classes of the images in val; expected {CSV} (Kaggle) or {DEVKIT}/{TRUTH} "
        "(development kit) beside it, or val/WNID/*.JPEG"
    )


def _kaggle(path: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(csv.reader(_lines(path)), 1):
        words = row[1].split() if len(row) == 2 else []
        if words and WNID.fullmatch(words[0]):
            yield row[0], words[0]
        elif number > 1:  # the first is the header
            raise _odd(path, number, "NAME,WNID x y x y")


def _devkit(folder: Path) -> Iterator[tuple[str, str]]:
    """The ids of the development kit are not in the order of the WordNet ids, and its map is a file of MATLAB's."""
    table = next((home / MAP for home in (folder, *list(folder.parents)[:2]) if (home / MAP).is_file()), None)
    if table is None:
        raise UsageError(f"{folder} has no {MAP}, which tells what its ids mean; run: {MAKE_MAP.format(folder)}")
    wnids = {}
    for number, line in enumerate(_lines(table), 1):
        words = line.split()
        if len(words) < 2 or not WNID.fullmatch(words[0]) or not words[1].isdecimal():
            raise _odd(table, number, "WNID ID")
        wnids[int(words[1])] = words[0]
    for number, line in enumerate(_lines(folder / TRUTH), 1):
        if not line.strip().isdecimal() or int(line) not in wnids:
            raise _odd(folder / TRUTH, number, f"an id of {table}")
        yield f"{FLAT}val_{number:08d}", wnids[int(line)]


def _tiny(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), 1) if path.is_file() else ():
        words = line.split("\t")
        if len(words) < 2 or not WNID.fullmatch(words[1]):
            raise _odd(path, number, "NAME<tab>WNID<tab>x<tab>y<tab>x<tab>y")
        yield os.path.splitext(words[0])[0], words[1]


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_LIST:
            raise ValueError(f"it has more than {MAX_LIST} bytes")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as err:
        raise UsageError(f"{path} is not readable ({err}); expected a list of classes: fetch it again") from err


def _odd(path: Path, number: int, expected: str) -> UsageError:
    return UsageError(f"{path}, line {number}: expected {expected}; fetch it again")
