"""Where images come from. `open_source` tells the kind of a source from what lies there."""

from collections.abc import Callable
from pathlib import Path

from boomgen import hub
from boomgen.errors import UsageError
from boomgen.sources import cifar, folder, hf, idx, imagenet, npz, wds
from boomgen.sources.base import NO_LABEL, Columns, RawImage, Row, Source

__all__ = ["NO_LABEL", "RawImage", "Row", "Source", "open_source"]

Opener = Callable[[Path, str | None, Columns, tuple[str, ...]], Source]
KINDS: tuple[tuple[str, Callable[[Path], bool], Opener], ...] = (
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
    """The source at a local path, or with an id on the Hugging Face Hub.

    split None means 'train' if there is one, else the only one there is; `Source.split` says which. Columns matter to
    tables only, `revision` to the Hub only. `folders` are the class folders that the data set has, in label order, and
    `numbers` the labels in a table that it has; images of others are passed over. Rows tell their captions only where
    `captions` are asked for: a table's column, the .txt of a sample, or the .txt beside an image. UsageError where
    nothing known lies there or it is not whole.
    """
    place, columns = Path(location), Columns(image_column, label_column, caption_column, captions, numbers)
    if not place.exists() and HUB_ID.fullmatch(location):
        return hf.open_hub(location, split, columns, revision)
    for kind, is_here, opened in KINDS:
        if is_here(place):
            source = opened(place, split, columns, folders)
            _check_asked(source, f"{location} holds {kind}", columns)
            return source
    raise UsageError(
        f"{location} {_found(place)}; expected {', '.join(kind for kind, *_ in KINDS)} or a Hub id owner/name"
    )


def _check_asked(source: Source, what: str, columns: Columns) -> None:
    asked = {"image": columns.image, "label": columns.label, "caption": columns.caption}
    named = [f"--{name}-column" for name, column in asked.items() if column]
    if named and not isinstance(source, hf.Table):
        raise UsageError(f"{what}, which have no columns; drop {', '.join(named)}")
    if columns.captions and (not isinstance(source, CAPTIONED) or isinstance(source, folder.Listed)):
        raise UsageError(f"{what}, which have no captions; drop {{caption}} from the prompt")


def _found(place: Path) -> str:
    if place.name.endswith((".tar.gz", ".tgz")):
        return "is a compressed tar (gunzip it)"
    if place.suffix == ".parquet":
        return "is one Parquet file (give its folder)"
    if not place.is_dir():
        return "is a file of another kind" if place.exists() else "does not exist"
    names = sorted(path.name for path in place.iterdir())
    return f"holds {', '.join(names[:3])}{' ...' if names[3:] else ''}" if names else "is an empty folder"
