"""The manifest: its schema, one table for every reader, and that every planned row ends as exactly one row."""

import hashlib
import io
import json
import re
import shutil
import struct
import zlib

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from boomgen import cli, manifest
from boomgen.errors import BoomgenError
from boomgen.finalise import finalise
from boomgen.run import RunDir
from boomgen.sources import open_source
from tests.finished import PEOPLE, finish, make_shards, nan_model, pixel_hash, samples, write_portraits

NAMES = [name for name, _, _ in manifest.COLUMNS]


@pytest.fixture(scope="module")
def run(plan_tiny, tmp_path_factory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("manifest") / "run", mode="augment", variants=2))


@pytest.fixture(scope="module")
def portraits(plan_tiny, tmp_path_factory) -> RunDir:
    home = tmp_path_factory.mktemp("portraits")
    source = write_portraits(home / "source")
    return finish(plan_tiny(home / "run", dataset=str(source), split=None))


def rows_of(run: RunDir) -> list[dict]:
    return manifest.read(run.manifest).to_pylist()


# The schema


def test_schema_is_what_columns_say():
    assert len(set(NAMES)) == len(NAMES)
    assert [(field.name, field.type) for field in manifest.SCHEMA] == [
        (name, kind) for name, kind, _ in manifest.COLUMNS
    ]
    assert not any(field.nullable for field in manifest.SCHEMA)
    assert all(text and "\n" not in text for *_, text in manifest.COLUMNS)
    assert set(manifest.LINK_COLUMNS) < set(NAMES)
    assert {name for name in NAMES if name.startswith("source_")} < set(manifest.LINK_COLUMNS)


def test_every_part_has_the_schema_and_no_nulls(run, portraits):
    for each in (run, portraits):
        parts = sorted(each.manifest.iterdir())
        assert [path.name for path in parts] == [f"part-{number:05d}.parquet" for number in range(each.plan.shards)]
        for path in parts:
            part = pq.read_table(path)
            assert part.schema.equals(manifest.SCHEMA, check_metadata=False)
            assert part.schema.metadata[b"boomgen.manifest"] == str(manifest.SCHEMA_VERSION).encode()
            assert all(column.null_count == 0 for column in part.columns)


def a_row(**changes) -> dict:
    row = {name: "" if kind == pa.string() else 0 for name, kind, _ in manifest.COLUMNS}
    return row | changes


def test_table_keeps_every_value():
    row = {name: name if kind == pa.string() else 7 for name, kind, _ in manifest.COLUMNS}
    assert manifest.table([row]).to_pylist() == [row]
    assert manifest.table([]).schema == manifest.SCHEMA


@pytest.mark.parametrize(
    "row",
    [
        {name: value for name, value in a_row().items() if name != "source_key"},
        a_row(source_key=None),
        a_row(label="3"),
        a_row(label=2**31),
        a_row(surplus=1),
    ],
    ids=["missing", "null", "mistyped", "too large", "surplus"],
)
def test_table_refuses_what_is_not_the_schema(row):
    with pytest.raises((ValueError, TypeError)):
        manifest.table([a_row(), row])


def test_unlinked_drops_the_links_and_nothing_else():
    part = manifest.table([a_row(key=key, source_key=key, row=row) for row, key in enumerate("bca")])
    left = manifest.unlinked(part)
    assert left.column_names == [name for name in NAMES if name not in manifest.LINK_COLUMNS]
    assert manifest.unlinked(left).equals(left)
    assert left["row"].to_pylist() == [0, 1, 2]


# One table for every reader


def test_every_reader_sees_one_table(run, tmp_path):
    from datasets import load_dataset

    files = str(run.manifest / "*.parquet")
    by_arrow = pyarrow.dataset.dataset(run.manifest).to_table().sort_by("row").to_pylist()
    by_datasets = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path)).to_list()
    by_duckdb = duckdb.sql(f"SELECT * FROM '{files}' ORDER BY row").arrow().read_all()
    assert len(by_arrow) == run.plan.rows == 200
    assert by_arrow == rows_of(run)
    assert by_datasets == by_arrow
    assert by_duckdb.to_pylist() == by_arrow
    count = "SELECT label, count(*) AS n FROM '{}' WHERE status = 'ok' GROUP BY label ORDER BY label"
    assert duckdb.sql(count.format(files)).fetchall() == [(label, 20) for label in range(10)]


def test_a_folder_named_like_a_partition_adds_no_column(run, tmp_path):
    shutil.copytree(run.manifest, tmp_path / "t_boom=0.4" / "manifest")
    assert manifest.read(tmp_path / "t_boom=0.4" / "manifest").equals(manifest.read(run.manifest))


def test_read_takes_columns(run):
    assert manifest.read(run.manifest, ["row", "key"]).column_names == ["row", "key"]


# Every planned row is one row, and what it says is so


def test_every_planned_row_is_exactly_one_row(run, portraits):
    for each in (run, portraits):
        rows = rows_of(each)
        assert [row["row"] for row in rows] == list(range(each.plan.rows))
        assert [row["shard"] for row in rows] == [i // each.plan.shard_size for i in range(each.plan.rows)]
        pairs = {(row["source_row"], row["variant"]) for row in rows}
        assert pairs == {(s, v) for s in range(each.plan.source.rows) for v in range(each.plan.job.variants)}
        assert len({row["key"] for row in rows}) == len({row["noise_key"] for row in rows}) == each.plan.rows


def test_outputs_are_what_their_rows_say(run, portraits):
    for each in (run, portraits):
        held = samples(each)
        rows = {row["key"]: row for row in rows_of(each)}
        assert list(held) == list(rows)  # in one order, too
        for key, row in rows.items():
            file = held[key]["png"]
            picture = Image.open(io.BytesIO(file))
            assert hashlib.sha256(file).hexdigest() == row["output_sha256"]
            assert pixel_hash(picture) == row["pixel_sha256"]
            assert picture.size == (row["width"], row["height"])
            assert held[key]["cls"] == str(row["label"]).encode()
            assert json.loads(held[key]["json"])["class_name"] == row["class_name"]


def test_sources_are_what_their_rows_say(run, portraits):
    for each in (run, portraits):
        source = open_source(each.plan.source.location, each.plan.source.split)
        listed = list(source.rows())
        for row in rows_of(each):
            here = listed[row["source_row"]]
            raw = source.read(here)
            image = np.asarray(Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw)
            assert (here.key, here.label) == (row["source_key"], row["source_label"])
            assert hashlib.sha256(raw).hexdigest() == row["source_sha256"]
            assert image.shape == (row["source_height"], row["source_width"])
            assert row["class_name"] == (source.classes[here.label] if source.classes else str(here.label))


def test_how_a_row_was_made(run):
    levels, level = run.plan.chain.levels, run.plan.chain.level
    said = {name: {row[name] for row in rows_of(run)} for name in NAMES}
    assert said["level"] == {level} == {4}
    assert said["levels"] == {10}
    assert said["t"] == {run.plan.chain.t[level]}
    assert said["abar"] == {levels.abar(level)}
    assert said["model_sha256"] == {run.plan.model.sha256}
    assert said["eta"] == {1.0}
    assert said["fit"] == {"crop"}
    assert said["attempt"] == {0}
    assert said["status"] == {"ok"}
    assert said["reason"] == said["detail"] == {""}


# Rows that fail


def spoilt_portraits(folder):
    """The same portraits, one of them cut short."""
    source = write_portraits(folder)
    bad = source / "patients" / f"{PEOPLE[1]}.03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    return source, bad.relative_to(source).as_posix()


def test_an_undecodable_image_is_one_failed_row_and_changes_no_other(portraits, plan_tiny, tmp_path):
    source, bad = spoilt_portraits(tmp_path / "source")
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=None))
    fine, spoilt = rows_of(portraits), rows_of(run)
    failed = [row for row in spoilt if row["status"] == "failed"]
    assert [(row["source_key"], row["reason"]) for row in failed] == [(bad, "undecodable")]
    gone = failed[0]
    assert gone["detail"]
    assert "\n" not in gone["detail"]
    assert gone["source_sha256"] == hashlib.sha256((source / bad).read_bytes()).hexdigest()
    assert {gone[name] for name in ("output_sha256", "pixel_sha256")} == {""}
    assert {gone[name] for name in ("width", "height", "source_width", "source_height")} == {-1}
    assert [row for row in spoilt if row != gone] == [row for row in fine if row["key"] != gone["key"]]
    whole = samples(portraits)
    del whole[gone["key"]]
    assert samples(run) == whole
    assert run.done(gone["shard"])["failed"] == {"undecodable": 1}


def test_failed_rows_are_counted_and_exit_with_3(plan_tiny, tmp_path, capsys):
    source, _ = spoilt_portraits(tmp_path / "source")
    run = make_shards(plan_tiny(tmp_path / "run", dataset=str(source), split=None))
    assert run.status().ok == 24
    assert run.status().failed == {"undecodable": 1}
    for command in ("status", "finalise", "status", "resume"):
        assert cli.main([command, str(run.path)]) == 3
        assert "24 ok, 1 failed (undecodable) of 25" in capsys.readouterr().out
    assert cli.main(["status", str(run.path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["failed"] == {"undecodable": 1}
    assert cli.main(["verify", str(run.path), "--remake", "3"]) == 0


def test_a_whole_run_with_a_failed_row_exits_with_3(tiny_model, tmp_path, capsys):
    source, _ = spoilt_portraits(tmp_path / "source")
    options = ["--model", tiny_model, "--t-boom", "0.4", "--steps", "10", "--device", "cpu", "--workers", "1"]
    made = cli.main(["anonymize", "--dataset", str(source), "--out", str(tmp_path / "run"), *map(str, options)])
    assert made == 3
    assert "1 failed (undecodable) of 25" in capsys.readouterr().out


def test_an_image_of_too_many_pixels_fails_its_row(plan_tiny, tmp_path):
    source = write_portraits(tmp_path / "source", per_person=1)
    (source / "patients" / "bomb.png").write_bytes(bomb())
    run = finish(plan_tiny(tmp_path / "run", dataset=str(source), split=None))
    failed = {row["source_key"]: row["reason"] for row in rows_of(run) if row["status"] != "ok"}
    assert failed == {"patients/bomb.png": "too-large"}


def bomb() -> bytes:
    """A small PNG whose header promises 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_nan_fails_its_rows_and_no_others(run, plan_tiny, tiny_model, tmp_path):
    """Class 3 gives NaN: its rows fail, and their neighbours in the batch are as they were."""
    model = nan_model(tiny_model, tmp_path / "model", slice(3, 4))
    spoilt = finish(plan_tiny(tmp_path / "run", mode="augment", variants=2, model=str(model)))
    failed = [row for row in rows_of(spoilt) if row["status"] == "failed"]
    assert len(failed) == 20
    assert {(row["label"], row["reason"]) for row in failed} == {(3, "nan")}
    assert all(row["source_width"] == 8 for row in failed)  # the source is known
    lost = {row["key"] for row in failed}
    assert samples(spoilt) == {key: members for key, members in samples(run).items() if key not in lost}


def test_a_network_that_gives_only_nan_is_an_error(plan_tiny, tiny_model, tmp_path, capsys):
    model = nan_model(tiny_model, tmp_path / "model", slice(None))
    run = make_shards(plan_tiny(tmp_path / "run", model=str(model)))
    assert run.status().failed == {"nan": 100}
    with pytest.raises(BoomgenError, match=r"^not one of 100 rows is ok; see why with: boomgen logs \S+ --failed$"):
        finalise(run)
    assert not run.dataset.exists()
    assert cli.main(["finalise", str(run.path)]) == 1
    assert re.fullmatch(r"boomgen: not one of 100 rows is ok; [^\n]+\n", capsys.readouterr().err)
    assert cli.main(["status", str(run.path)]) == 3
    assert "0 ok, 100 failed (nan) of 100" in capsys.readouterr().out
