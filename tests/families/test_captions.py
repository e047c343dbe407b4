"""Prompts with a caption for each image: from a table, from tars, and from a folder."""

import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import webdataset as wds
from diffusers import StableDiffusionPipeline

from boomgen.cli import main
from boomgen.job import Job, Launch
from boomgen.models.conditions import prompt_of
from boomgen.plan import source_lines
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.sources import open_source
from boomgen.sources.base import MAX_CAPTION
from boomgen.verify import remake, verify
from boomgen.worker import Worker

from ..conftest import Complaint
from ..source_checks import picture
from .folders import save

CAPTIONS = ["a grey cat", "zwei  Hunde\nim Schnee", "", "x" * 5_000, "a grey cat"]
READ = ["a grey cat", "zwei Hunde im Schnee", "", "x" * MAX_CAPTION, "a grey cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sd1", tmp_path_factory.mktemp("model") / "sd1")


def table(place: Path, column: str = "text", captions: list[Any] = [*CAPTIONS[:2], None, *CAPTIONS[3:]]) -> Path:  # noqa: B006
    images = [{"bytes": picture(number), "path": None} for number in range(5)]
    data = datasets.Dataset.from_dict({"image": images, "id": list("abcde"), column: captions})
    data.cast_column("image", datasets.Image()).save_to_disk(place)
    return place


def tars(place: Path) -> Path:
    place.mkdir()
    with wds.TarWriter(str(place / "a.tar")) as writer:
        for number, text in enumerate(CAPTIONS):
            told = {"txt": text} if text else {}
            writer.write({"__key__": str(number), "png": picture(number), **told})
    return place


def folder(place: Path) -> Path:
    place.mkdir()
    for number, text in enumerate(CAPTIONS):
        (place / f"{number}.png").write_bytes(picture(number))
        if text:
            (place / f"{number}.txt").write_text(text)
    return place


@pytest.mark.parametrize("kind", [table, tars, folder])
def test_captions_are_read_only_where_they_are_asked_for(kind: Any, tmp_path: Path) -> None:
    place = str(kind(tmp_path / "source"))
    source = open_source(place, captions=True)
    assert [row.caption for row in source.rows()] == READ
    assert not source.passed_over
    assert {row.caption for row in open_source(place).rows()} == {""}


def test_the_column_of_captions_may_be_named(tmp_path: Path) -> None:
    source = open_source(str(table(tmp_path / "source")), captions=True, caption_column="id")
    assert [row.caption for row in source.rows()] == list("abcde")


def test_odd_captions_cost_no_row(tmp_path: Path) -> None:
    (folder(tmp_path / "source") / "0.txt").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "source" / "2.txt")  # reading it would never end
    captions = [row.caption for row in open_source(str(tmp_path / "source"), captions=True).rows()]
    assert captions == ["caf\ufffd", *READ[1:]]


@pytest.mark.parametrize(
    ("template", "class_name", "caption", "prompt"),
    [
        ("{caption}", "", "a {class}", "a {class}"),  # what is filled in is not filled again
        ("{class}: {caption}", "cat", "on a {caption}", "cat: on a {caption}"),
        ("a {class}, {caption}, sharp", "cat", "", "a cat,"),
        ("a {class}, {caption}", "", "grey", "a"),
        ("  as it is ", "cat", "grey", "  as it is "),
    ],
)
def test_a_template_is_cut_before_what_is_lacking(template: str, class_name: str, caption: str, prompt: str) -> None:
    assert prompt_of(template, class_name, caption) == prompt


def planned(source: Path, model: Path, out: Path, prompt: str = "{caption}, sharp") -> RunDir:
    job = {"dataset": str(source), "model": str(model), "t_boom": "0.5", "steps": 4, "batch_size": 3, "shard_size": 4}
    exact = Job(mode="augment", prompt=prompt, dtype="float32", **job)  # on any CPU, as the pipelines it is held to
    return prepare(exact, Launch(device="cpu", out=str(out)))


@torch.inference_mode()
def test_each_image_is_told_its_caption(model: Path, tmp_path: Path) -> None:
    """As diffusers' own pipeline encodes it, whatever else is in the batch; both workers write the same bytes."""
    run = planned(table(tmp_path / "source"), model, tmp_path / "run")
    assert source_lines(run.plan)["captions"] == "4 of 5 images"
    worker, other, told = Worker(run), Worker(run), {}
    for shard in (0, 1):
        worker.make_shard(shard)
        for rows in worker.batches(shard):
            (text,) = worker._captions(worker.load(rows))
            assert len(text) == 3
            told |= {row.source_row: text[place] for place, row in enumerate(rows)}
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for row, caption in enumerate(READ):
        expected, null = pipe.encode_prompt(f"{caption}, sharp" if caption else "", "cpu", 1, True)
        torch.testing.assert_close(told[row], expected[0])
        torch.testing.assert_close(worker.denoiser.conditions[0][0], null[0])
    assert torch.equal(told[0], told[4])
    assert list(verify(run)) == []
    for shard in (1, 0):
        made = [entry for batch in range(2 - shard) for entry in other.make_batch(shard, batch)]
        with tarfile.open(run.shard(shard) / "data.tar") as archive:
            for row in made:
                assert archive.extractfile(f"{row.entry['key']}.png").read() == row.members["png"]  # type: ignore[union-attr]


def test_a_caption_changes_its_image_and_no_other(model: Path, tmp_path: Path) -> None:
    pixels = []
    for name, captions in (("one", CAPTIONS), ("two", ["a brown dog", *CAPTIONS[1:]])):
        run = planned(table(tmp_path / name, "text", captions), model, tmp_path / f"{name}-run")
        made = [row for shard in (0, 1) for batch in range(2 - shard) for row in Worker(run).make_batch(shard, batch)]
        pixels.append({row.entry["source_row"]: row.entry["pixel_sha256"] for row in made})
    assert [row for row in range(5) if pixels[0][row] != pixels[1][row]] == [0]


def test_the_command_line_makes_and_remakes_them(model: Path, tmp_path: Path) -> None:
    source, out = folder(tmp_path / "source"), tmp_path / "run"
    asked = ["--prompt", "{caption}", "--t-boom", "0.5", "--steps", "4", "--device", "cpu", "--workers", "1"]
    assert main(["anonymize", "--dataset", str(source), "--model", str(model), *asked, "--out", str(out)]) == 0
    run = RunDir(out)
    assert run.plan.network.prompts == ("", "")
    assert list(remake(run, 5)) == []
    shared = b"".join(path.read_bytes() for path in run.dataset.rglob("*") if path.is_file())
    assert b"grey cat" not in shared  # a caption may name people


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "other",
            "",
            "SOURCE: no column of captions; pass --caption-column with one of id, told, or drop {caption}",
        ),
        (
            "table",
            "--caption-column image",
            "SOURCE: 'image' is not a column of captions; pass --caption-column with one of id, text, or drop "
            "{caption}",
        ),
        ("tars", "--caption-column text", "SOURCE holds WebDataset tars, which have no columns; drop --caption-column"),
        ("none", "", "--prompt '{caption}', but no image of SOURCE has a caption; drop {caption}"),
        (
            "table",
            "--prompt a{word}",
            "--prompt 'a{word}': {word} stands for nothing; expected {class} or {caption}",
        ),
        (
            "table",
            "--prompt x --caption-column id",
            "--caption-column without {caption} in the prompt; add --prompt '{caption}'",
        ),
        (
            "idx",
            "",
            "SOURCE holds IDX files, which have no captions; drop {caption} from the prompt",
        ),
    ],
)
def test_captions_that_are_not_there(
    kind: str, options: str, said: str, model: Path, tiny_source: Path, tmp_path: Path, complaint: Complaint
) -> None:
    made = {"table": table, "tars": tars, "none": lambda place: table(place, "text", [""] * 5)}
    made |= {"other": lambda place: table(place, "told"), "idx": lambda _: tiny_source}
    source = made[kind](tmp_path / "source")
    prompt = [] if "--prompt" in options else ["--prompt", "{caption}"]
    command = f"augment --dataset {source} --model {model} --t-boom 0.5 --steps 4 --device cpu {options}"
    assert complaint(*command.split(), *prompt) == said.replace("SOURCE", str(source))
