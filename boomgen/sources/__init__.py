"""Where images come from. `open_source` tells the kind of a source from what lies there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boomgen import hub, places
from boomgen.errors import UsageError
from boomgen.places import Place
from boomgen.sources import cifar, folder, hf, idx, imagenet, npz, wds
from boomgen.sources.base import NO_LABEL, Columns, RawImage, Reader, Row, Source
from boomgen.sources.planned import Planned

__all__ = ["NO_LABEL", "Planned", "RawImage", "Reader", "Row", "Source", "open_source"]

Opener = Callable[[Any, str | None, Columns, tuple[str, ...]], Source]
KINDS: tuple[tuple[str, Callable[[Any], bool], Opener], ...] = (
    ("IDX files", idx.is_here, lambda place, split, *_: idx.Idx(place, split)),
    ("an npz of MedMNIST", npz.is_here, lambda place, split, *_: npz.Npz(place, split)),
    (
        "a data set written by save_to_disk",
        hf.is_saved,
        lambda place, split, columns, _: hf.open_saved(place, split, columns),
    ),
    (
        "ImageNet with lists of classes",
        imagenet.is_here,
        lambda place, split, _, wanted: imagenet.open_listed(place, split, wanted),
    ),
    ("WebDataset tars", wds.is_here, lambda place, split, columns, _: wds.Tars(place, split, columns.captions)),
    (
        "Parquet files with images",
        hf.is_parquet,
        lambda place, split, columns, _: hf.open_parquet(place, split, columns),
    ),
    ("batches of CIFAR-10 or CIFAR-100", cifar.is_here, lambda place, split, *_: cifar.Cifar(place, split)),
    (
        "image files",
        folder.is_here,
        lambda place, split, columns, wanted: folder.Folder(place, split, wanted, columns.captions),
    ),
)
AT_URLS = ("WebDataset tars", "image files")
NOT_AT_URLS = re.compile(r"ILSVRC.*|wnids\.txt|dataset_dict\.json|state\.json|(?!metadata\.).*\.parquet")
"""What tells kinds that may hold image files or tars as well."""
CAPTIONED = (hf.Table, wds.Tars, folder.Folder)
HUB_ID = hub.ID


def open_source(
    location: str,
    split: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    captions: bool = False,
    revision: str | None = None,
    folders: tuple[str, ...] = (),
    numbers: tuple[int, ...] = (),
) -> Source:
    """The source at a local path or a URL, or with an id on the Hugging Face Hub.

    split None means 'train' if there is one, else the only one there is; `Source.split` says which. Columns matter to
    tables only, `revision` to the Hub only. `folders` are the class folders that the data set has, in label order, and
    `numbers` the labels in a table that it has; images of others are passed over. Rows tell their captions only where
    `captions` are asked for: a table's column, the .txt of a sample, or the .txt beside an image. UsageError where
    nothing known lies there or it is not whole.
    """
    place, columns = places.place(location), Columns(image_column, label_column, caption_column, captions, numbers)
    if isinstance(place, Path) and not place.exists() and HUB_ID.fullmatch(location):
        return hf.open_hub(location, split, columns, revision)
    for kind, is_here, opened in KINDS if isinstance(place, Path) else _at_url(place):
        if is_here(place):
            source = opened(place, split, columns, folders)
            _check_asked(source, f"{location} holds {kind}", columns)
            return source
    kinds = f"{', '.join(kind for kind, *_ in KINDS)} or a Hub id owner/name"
    if not isinstance(place, Path):
        kinds = (
            f"{' or '.join(AT_URLS)}, which are all that is read from URLs: copy other kinds here and give the folder"
        )
    raise UsageError(f"{location} {_found(place)}; expected {kinds}")


def _at_url(place: Place) -> list[tuple[str, Callable[[Any], bool], Opener]]:
    """The kinds to look for at a URL; none where something tells one that is read from disks only."""
    places.forget()
    told = any(map(NOT_AT_URLS.fullmatch, places.names(place)))
    return [] if told else [kind for kind in KINDS if kind[0] in AT_URLS]


def _check_asked(source: Source, what: str, columns: Columns) -> None:
    asked = {"image": columns.image, "label": columns.label, "caption": columns.caption}
    named = [f"--{name}-column" for name, column in asked.items() if column]
    if named and not isinstance(source, hf.Table):
        raise UsageError(f"{what}, which have no columns; drop {', '.join(named)}")
    if columns.captions and (not isinstance(source, CAPTIONED) or isinstance(source, folder.Listed)):
        raise UsageError(f"{what}, which have no captions; drop {{caption}} from the prompt")


def _found(place: Place) -> str:
    if place.name.endswith((".tar.gz", ".tgz")):
        return "is a compressed tar (gunzip it)"
    if place.suffix == ".parquet":
        return "is one Parquet file (give its folder)"
    if not places.is_folder(place):
        return "is a file of another kind" if places.exists(place) else "does not exist"
    names = places.names(place)
    return f"holds {', '.join(names[:3])}{' ...' if names[3:] else ''}" if names else "is an empty folder"
