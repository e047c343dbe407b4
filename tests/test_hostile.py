"""Data made to do harm. Each attack works on a naive reader and fails on ours."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from boomgen import images, manifest, models
from boomgen.cli import main
from boomgen.engines.local import LocalEngine
from boomgen.errors import RowError, UsageError
from boomgen.run import RunDir
from boomgen.sources import open_source
from boomgen.untrusted import printable, read_yaml

from .conftest import Complaint, PlanTiny
from .finished import finish, samples
from .scanner import leaks
from .source_checks import member, picture, write_tar
from .test_secret import processes

WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
ESCAPES = "\x1b]0;pwned\x07\x1b[2J\u202e"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once an attack has run a program."""
    return tmp_path / "pwned"


class Program:
    """Pickles to a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


# Programs that come as data ----------------------------------------------------------------------------------------


def test_pickled_weights_do_not_run(tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    import torch

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "unet" / WEIGHTS).unlink()
    weights = folder / "unet" / PICKLED
    torch.save({"conv_in.weight": Program(marker)}, weights)
    torch.load(weights, weights_only=False)
    assert marker.exists()
    marker.unlink()
    job = f"plan --dataset fashion-sample --model {folder} --t-boom 0.4 --device cpu --out {tmp_path / 'run'}"
    for trust in ([], ["--allow-pickle"]):
        assert main([*job.split(), *trust]) == 2
        assert not marker.exists()


def test_pickled_weights_of_numbers_are_read_when_allowed(
    plan_tiny: PlanTiny, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, the same pixels."""
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "unet" / WEIGHTS
    torch.save(load_file(weights), folder / "unet" / PICKLED)
    weights.unlink()
    safe = finish(plan_tiny(tmp_path / "safe"))
    job = f"--dataset {safe.plan.job.dataset} --model {folder} --t-boom 0.4 --steps 10 --batch-size 8 --shard-size 16"
    secret = ["--secret-file", str(safe.path / "secret"), "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["plan", *job.split(), *secret]) == 2
    assert "pickled weights are programs" in capsys.readouterr().err
    assert main(["plan", *job.split(), *secret, "--allow-pickle"]) == 0
    run = finish(RunDir(tmp_path / "run"))
    assert manifest.read(run.manifest, ["pixel_sha256"]) == manifest.read(safe.manifest, ["pixel_sha256"])


def test_code_beside_a_model_does_not_run(tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    """`trust_remote_code` is never given: a config that names a class of its own file is another family."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "unet" / "network.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    subprocess.run([sys.executable, "-c", "import network"], cwd=folder / "unet", check=True)
    assert marker.exists()
    marker.unlink()
    config = folder / "unet" / "config.json"
    named = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "network.Net"}}
    for kind in ("UNet2DModel", "network.Net"):
        config.write_text(json.dumps(named | {"_class_name": kind}))
        job = f"plan --dataset fashion-sample --model {folder} --t-boom 0.4 --device cpu --out {tmp_path / kind}"
        assert main(job.split()) == (0 if kind == "UNet2DModel" else 2)
        assert not marker.exists()


def test_a_picture_that_starts_a_program_is_none(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow draws Encapsulated PostScript, whatever the file is called, by starting `gs`."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Exception):  # noqa: B017
        Image.open(io.BytesIO(drawing)).load()
    assert marker.exists()
    marker.unlink()
    with pytest.raises(RowError, match="undecodable"):
        images.decode(drawing, 3)
    assert not marker.exists()


# YAML --------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [lol,lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


def test_tags_of_programs_are_refused(complaint: Complaint, tmp_path: Path, marker: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"mode: !!python/object/apply:os.mkdir [{marker}]\n")
    yaml.unsafe_load(job.read_text())
    assert marker.exists()
    marker.rmdir()
    assert "could not determine a constructor for the tag" in complaint("run", job)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["!!bool x", "!!timestamp x", "!!int ''", "? [a]\n: b", "\0", "[" * 2000])
def test_yaml_that_breaks_the_reader_is_a_value_error(text: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        yaml.safe_load(text)
    with pytest.raises(ValueError):
        read_yaml(text)


def test_bombs_of_aliases_are_refused(complaint: Complaint, tmp_path: Path, tiny_model: Path) -> None:
    naive = yaml.safe_load("".join(BOMB.splitlines(keepends=True)[:5]))
    assert len(repr(naive)) > 500_000  # five lines; each further one is ten times as much
    (tmp_path / "job.yaml").write_text(BOMB + "t_boom: *a8\n")
    said = complaint("run", tmp_path / "job.yaml")
    assert (
        said == f"job {tmp_path}/job.yaml: an alias, *a0; write out what it stands for; expected a YAML file of options"
    )
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "boomgen.yaml").write_text(BOMB)
    with pytest.raises(UsageError, match="an alias"):
        models.inspect(str(folder))
    archive = write_tar(tmp_path / "set.tar", member("a.png", picture(1)))
    (tmp_path / "README.md").write_text(f"---\n{BOMB}dataset_info: *a8\n---\n")
    assert open_source(str(archive)).classes == ()


# Names -------------------------------------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"
NAMES = [
    "---\n# Pwned\n",
    f"a{ESCAPES}",
    SCRIPT.replace("/", "∕"),
    "]( javascript:alert(1) )",
    "x: !!python y",
    "'\"",
]


@pytest.fixture
def odd_names(tmp_path: Path) -> Path:
    """A folder of classes, and in each a picture and what is none, with names that are no names."""
    for number, name in enumerate(NAMES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), number * 9, np.uint8)).save(folder / f"{ESCAPES}.png")
        (folder / f"broken{ESCAPES}.png").write_bytes(b"GIF89a" + ESCAPES.encode())
    return tmp_path / "photos"


def test_names_cannot_speak_markdown_or_html(
    odd_names: Path, tiny_model: Path, tmp_path: Path, plan_tiny: PlanTiny
) -> None:
    from huggingface_hub import DatasetCard

    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "boomgen.yaml").write_text(json.dumps({"null_class": 10, "licence": f"MIT\n\n# Pwned {SCRIPT} [a](b)"}))
    job = {"mode": "augment", "dataset": str(odd_names), "model": str(model)}
    run = finish(plan_tiny(tmp_path / "run", **job))
    text = (run.dataset / "README.md").read_text()
    naive = f"---\n{yaml.safe_dump({'names': NAMES})}---\n"
    assert naive.split("---\n")[1].count("Pwned") == 0  # the head of a naive card ends where the name wants
    card = DatasetCard(text)
    features = {feature["name"]: feature for feature in card.data.dataset_info["features"]}
    known = features["cls"]["dtype"]["class_label"]["names"]
    assert sorted(known.values()) == sorted(NAMES)
    assert "Pwned" not in card.text.replace("MIT # Pwned", "").replace(r"MIT \# Pwned", "")
    assert SCRIPT not in card.text
    assert "[a](b)" not in card.text
    assert open_source(str(run.dataset)).classes == tuple(known[str(label)] for label in range(len(NAMES)))


def test_names_cannot_speak_to_the_terminal(odd_names: Path, plan_tiny: PlanTiny, tmp_path: Path, boomgen: Any) -> None:
    run = plan_tiny(tmp_path / f"run{ESCAPES}", dataset=str(odd_names), mode="augment")
    assert any("\x1b" in f"row {name}" for name in odd_names.iterdir())  # what a naive line would hold
    told = [boomgen("resume", run.path, "--device", "cpu", "--workers", 1, check=False)]
    (run.shard(0) / "data.tar").write_bytes(b"damaged")
    told += [boomgen(*command, check=False) for command in (["status", run.path], ["verify", run.path])]
    told += [boomgen("logs", run.path, *more, check=False) for more in ((), ("--failed",))]
    told.append(boomgen("status", f"nowhere{ESCAPES}", check=False))
    for done in told:
        text = done.stdout + done.stderr
        assert text
        assert printable(text) == text
    assert "undecodable" in told[4].stdout
    assert told[4].stdout.count("broken\\x1b]0;pwned\\x07\\x1b[2J\\u202e.png") == len(NAMES)


def test_names_cannot_leave_the_card_of_a_tar(tmp_path: Path, plan_tiny: PlanTiny) -> None:
    """Keys become names of nothing: neither of files nor of samples."""
    keys = ["../../up", "/etc/passwd", f"a{ESCAPES}", "--checkpoint-action=exec=sh", "con", "ü" * 100]
    archive = write_tar(tmp_path / "set.tar", *(member(f"{key}.png", picture(1)) for key in keys))
    run = finish(plan_tiny(tmp_path / "run", dataset=str(archive)))
    assert all(len(key) == 24 and set(key) <= set("0123456789abcdef") for key in samples(run))
    assert sorted(manifest.read(run.manifest, ["source_key"])["source_key"].to_pylist()) == sorted(keys)


# Files of this machine, and its secrets -----------------------------------------------------------------------------


def test_a_strangers_table_cannot_name_private_files(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    private = tmp_path / "private.png"
    private.write_bytes(picture(1))
    rows = datasets.Dataset.from_dict({"image": [{"path": str(private), "bytes": None}]})
    rows = rows.cast(datasets.Features({"image": datasets.Image()}))
    assert rows[0]["image"].size == (4, 3)  # a naive reader shows it
    (tmp_path / "stranger" / "data").mkdir(parents=True)
    cell = pa.array([{"bytes": None, "path": str(private)}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    about = {"huggingface": json.dumps({"info": {"features": rows.features.to_dict()}})}
    table = pa.table({"image": cell}).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "stranger" / "data" / "train-00000-of-00001.parquet")
    source = open_source(str(tmp_path / "stranger"))
    (row,) = source.rows()
    with pytest.raises(RowError, match="names a file of this machine, which only a saved data set may"):
        source.read(row)
    rows.save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert [source.read(row) for row in source.rows()] == [picture(1)]


@pytest.mark.parametrize("files", ["{private}/*.parquet", "../private/*.parquet", "http://127.0.0.1:9/a.parquet"])
def test_a_strangers_card_cannot_name_private_files(files: str, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": picture(1)}]})
    rows = rows.cast(datasets.Features({"image": datasets.Image()}))
    for place in ("private", "stranger"):
        (tmp_path / place).mkdir()
        rows.to_parquet(tmp_path / place / "rows.parquet")
    named = files.format(private=tmp_path / "private")
    card = tmp_path / "stranger" / "README.md"
    card.write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n")
    if ":" not in named:
        assert datasets.load_dataset(str(tmp_path / "stranger"))["train"].num_rows == 1  # a naive reader shows it
    with pytest.raises(UsageError, match=r"expected files of its own|does not load"):
        open_source(str(tmp_path / "stranger"))
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.parquet\n---\n")
    assert len(list(open_source(str(tmp_path / "stranger")).rows())) == 1


TOKENS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE",
}


def test_tokens_are_nowhere(plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the run, nor in a worker's command line or environment; yet the worker has them."""
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    run = plan_tiny(tmp_path / "run_of_the_test")
    seen: dict[int, bytes] = {}
    for _ in LocalEngine(run, ["cpu"]).run(range(run.plan.shards)):
        seen |= processes(str(run.path))
    environment = subprocess.run(["cat", "/proc/self/environ"], capture_output=True, check=True).stdout
    needles = [value.encode() for value in TOKENS.values()]
    assert all(needle in environment for needle in needles)
    assert len(seen) == 1
    assert not any(needle in told for told in seen.values() for needle in needles)
    assert run.missing() == []
    assert not leaks(run.path, needles)


def test_tokens_reach_the_worker_through_its_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from boomgen.engines import local

    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "worker"
    got = tmp_path / "got"
    script.write_text(
        f"#!{sys.executable}\nimport os, sys, json\n"
        f"open({str(got)!r}, 'w').write(json.dumps([sorted(os.environ), json.loads(sys.stdin.readline())]))\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(local.sys, "executable", str(script))

    class Somewhere:
        path = tmp_path

    hand = local._Hand(Somewhere(), 0, "cpu", False, tmp_path / "log")  # type: ignore[arg-type]
    hand.process.wait(timeout=60)
    hand.close()
    names, secrets = json.loads(got.read_text())
    assert secrets.items() >= TOKENS.items()
    assert not TOKENS.keys() & set(names)
    assert "PATH" in names
