"""The manifest: one row per planned row, linked to its source. Typed columns, no nulls: "" and -1 mean none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from boomgen.errors import BoomgenError

SCHEMA_VERSION = 1

OK, FAILED, REJECTED = "ok", "failed", "rejected"

COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("key", pa.string(), "name of the sample in the data set's tars"),
    ("status", pa.string(), "ok, failed or rejected"),
    ("reason", pa.string(), "why a row failed or was rejected, one word; '' for ok"),
    ("detail", pa.string(), "the reason in one line"),
    ("shard", pa.int32(), "number of the shard"),
    ("row", pa.int64(), "position in the output, 0-based over all shards"),
    ("variant", pa.int32(), "which Boomerang version of the source, from 0"),
    ("label", pa.int32(), "label in the data set, -1 for none"),
    ("class_name", pa.string(), "name of the label, '' for none"),
    ("output_sha256", pa.string(), "sha256 of the image file in the tar"),
    ("pixel_sha256", pa.string(), "sha256 of the output's pixels before jpg loses some, (H, W, C) uint8"),
    ("width", pa.int32(), "output width, pixels"),
    ("height", pa.int32(), "output height, pixels"),
    ("source_row", pa.int64(), "row number in index.parquet"),
    ("source_key", pa.string(), "key of the source image: path, tar key or split and number"),
    ("source_label", pa.int32(), "label of the source, also where the data set drops labels; -1 for none"),
    ("source_sha256", pa.string(), "sha256 of the source as stored: the file's bytes, or the pixels of an array"),
    ("source_width", pa.int32(), "source width, pixels, after EXIF rotation"),
    ("source_height", pa.int32(), "source height, pixels, after EXIF rotation"),
    ("fit", pa.string(), "crop or pad"),
    ("model_width", pa.int32(), "width at which the model saw the image, pixels, without what pad added"),
    ("model_height", pa.int32(), "height at which the model saw the image, pixels, without what pad added"),
    ("scale", pa.float64(), "factor between the low-resolution image and its output; 1 where nothing was enlarged"),
    ("interpolation", pa.string(), "filter that enlarged the image for the model, '' for none"),
    ("degrade", pa.string(), "filter that made the low-resolution image from the source, '' for none"),
    ("cascade", pa.int32(), "number of Boomerang passes"),
    ("model_sha256", pa.string(), "hash of the model's configs and weights"),
    ("level", pa.int32(), "level t_boom was run from, 0..levels"),
    ("levels", pa.int32(), "S, number of levels in the chain"),
    ("t", pa.float64(), "what the network is told at that level (index of the trained chain, 0-based)"),
    ("abar", pa.float64(), "signal power share at that level"),
    ("sampler", pa.string(), "reverse step"),
    ("eta", pa.float64(), "share of fresh noise in the reverse step"),
    ("noise_key", pa.string(), "key of the row's noise, 128 bits in hexadecimal"),
    ("attempt", pa.int32(), "how often the row was drawn again, from 0"),
)

LINK_COLUMNS = (
    *("source_row", "source_key", "source_label", "source_sha256", "source_width", "source_height"),
    *("noise_key", "detail", "variant"),
)
"""What ties an output to its source; `--linkage none` destroys these columns."""

SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind, _ in COLUMNS],
    metadata={"boomgen.manifest": str(SCHEMA_VERSION)},
)


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a manifest part.

    Raises:
        ValueError, TypeError: a row lacks a column, has one too many, or a value that is null or of another type.
    """
    for row in rows:
        if odd := row.keys() ^ SCHEMA.names:
            raise ValueError(f"a manifest row with {', '.join(sorted(odd))} missing or too many")
    part = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    if nulls := [name for name in SCHEMA.names if part[name].null_count]:
        raise ValueError(f"a manifest row without a value for {', '.join(nulls)}")
    return part


def unlinked(part: pa.Table) -> pa.Table:
    """A part without the columns that link it to its sources; its order is the secret's, which tells nothing."""
    return part.drop_columns([name for name in LINK_COLUMNS if name in part.column_names])


def read(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All parts of RUN/manifest as one table."""
    return read_parts(sorted(folder.glob("part-*.parquet")), columns)


def read_parts(parts: Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """Parts as one table. Each is read alone: a data set reader would take a folder named `t=0.4` for a column."""
    return pa.concat_tables(read_part(part, columns) for part in parts)


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One part.

    Raises:
        BoomgenError: it is not there, or damaged.
    """
    try:
        found = pq.ParquetFile(part).read(columns=columns)
        if odd := [field.name for field in found.schema if field not in list(SCHEMA)]:
            raise pa.ArrowInvalid(f"column {odd[0]!r} is not one of a manifest")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as err:
        line = " ".join(str(err).split())[:200]
        raise BoomgenError(f"{part} is not readable ({line}); see what boomgen verify says of its run") from err
    return found
