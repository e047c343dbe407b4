"""From whole shards to a data set that loads: hard links to the tars, a card, timm's index, one manifest."""

import hashlib
import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import yaml

from boomgen import __version__, catalog, manifest
from boomgen.errors import BoomgenError
from boomgen.plan import Plan, enhancement, pass_fields
from boomgen.run import RunDir, ranges
from boomgen.shard import TAR, sealed, sync, write_durable
from boomgen.sources.base import NO_SPLIT
from boomgen.store import CARD, place_folder
from boomgen.untrusted import printable


def finalise(run: RunDir) -> None:
    """Close a run whose shards are all whole; does nothing to one that is closed.

    Raises:
        BoomgenError: shards are missing, or not one row is ok.
    """
    missing = run.missing()
    if missing:
        raise BoomgenError(
            f"{len(missing)} of {run.plan.shards} shards are missing ({ranges(missing)}); go on with: "
            f"boomgen resume {run.path}"
        )
    files = dataset_files(run)
    if not files["tars"]:
        raise BoomgenError(f"not one of {run.plan.rows} rows is ok; see why with: boomgen logs {run.path} --failed")
    shutil.rmtree(run.workers, ignore_errors=True)
    if run.plan.job.linkage == "none":
        _destroy_links(run)
    place_folder(run.path, run.manifest, manifest_links(run), {})
    texts = {CARD: card(run, files).encode(), "_info.json": timm_index(run.plan, files)}
    _record(run, files, texts)
    run.store.close(dataset_names(files), texts)  # last: it says "closed"
    shutil.rmtree(run.staging, ignore_errors=True)


def dataset_files(run: RunDir) -> dict[str, Any]:
    """The shards that hold rows: their names in the data set, their row counts, and what is known of their tars."""
    records = {number: run.done(number) for number in range(run.plan.shards)}
    held = [number for number, record in records.items() if record["ok"]]
    names = {number: f"{split_name(run.plan)}-{i:05d}-of-{len(held):05d}.tar" for i, number in enumerate(held)}
    return {
        "tars": names,
        "rows": {number: records[number]["ok"] for number in held},
        "written": [records[number]["files"][TAR] for number in held],
    }


def dataset_names(files: dict[str, Any]) -> dict[int, str]:
    """The names of the shards' tars in the data set."""
    return {number: f"data/{name}" for number, name in files["tars"].items()}


def manifest_links(run: RunDir) -> dict[str, Path]:
    """The manifest's parts, and which shard's part each is."""
    return {f"part-{number:05d}.parquet": run.store.part(number) for number in range(run.plan.shards)}


def _record(run: RunDir, files: dict[str, Any], texts: dict[str, bytes]) -> None:
    """What is about to be placed: the tars' names, and hashes of the texts, since another boomgen may write others."""
    if run.store.closed():
        return
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    tars = {str(number): name for number, name in dataset_names(files).items()}
    run.staging.mkdir(exist_ok=True)
    staged = run.staging / f"{run.closing.name}-{uuid.uuid4().hex[:8]}"
    try:
        write_durable(staged, sealed({"boomgen": __version__, "tars": tars, "texts": hashes}))
        staged.replace(run.closing)
    except OSError:
        if not run.store.closed():  # if it does, another finalise was first
            raise
    sync(run.path)


def _destroy_links(run: RunDir) -> None:
    """`--linkage none`: the linking columns of every part, what workers left and said, the index, last the secret."""
    for folder in (run.staging, run.logs):  # a log may name the source that a shard failed on
        if folder.exists():
            shutil.rmtree(folder)
    for number in range(run.plan.shards):
        run.store.change_part(number, manifest.unlinked)
    for name in ("index.parquet", "secret"):
        (run.path / name).unlink(missing_ok=True)
    sync(run.path)


def split_name(plan: Plan) -> str:
    """What the split is called in the data set: a word, as `datasets` wants it, 'train' where the source has none."""
    return "train" if plan.source.split == NO_SPLIT else re.sub(r"\W+", "_", plan.source.split)


def timm_index(plan: Plan, files: dict[str, Any]) -> bytes:
    """timm's `_info.json`: the tars of the split and their lengths."""
    split = {
        "name": split_name(plan),
        "num_samples": sum(files["rows"].values()),
        "filenames": [f"data/{name}" for name in files["tars"].values()],
        "shard_lengths": list(files["rows"].values()),
    }
    return json.dumps({"splits": {split_name(plan): split}}, indent=1).encode() + b"\n"


def card(run: RunDir, files: dict[str, Any]) -> str:
    """The README.md that makes `load_dataset` read the folder right, and tells people what it is."""
    plan = run.plan
    split, rows = split_name(plan), sum(files["rows"].values())
    held = sum(tar["bytes"] for tar in files["written"])
    unnamed = "a private data set" if plan.job.mode == "anonymize" else "a local data set"
    origin = plan.source.name if plan.source.name in catalog.datasets() else unnamed
    # The path of a local folder may tell whose data this is.
    public = plan.model.name in catalog.models() or f"models--{plan.model.name.replace('/', '--')}" in plan.model.path
    model = plan.model.name if public else "a local model"
    head = {
        "license": "other",
        "license_name": plan.source.licence,
        "tags": ["synthetic", "boomerang", "webdataset"],
        "annotations_creators": ["machine-generated"],
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.tar"}]}],
        "dataset_info": {
            "description": f"content {_content(files)}",  # `datasets` knows a copy in its cache by the head alone
            "features": _features(plan),
            "splits": [{"name": split, "num_bytes": held, "num_examples": rows}],
        },
    }
    levels, how = plan.chain.levels, enhancement(plan.job)
    words = {"anonymize": "anonymized", "augment": "augmented", "enhance": "enhanced"}[plan.job.mode]
    return (
        f"---\n{yaml.dump(head, Dumper=_OneLine, sort_keys=False, allow_unicode=True, width=1e9)}---\n\n"
        f"# {origin}, {words} with Boomerang\n\n"
        f"{rows} images made by boomgen {plan.boomgen} from {origin}: each was noised to level {plan.chain.level} of "
        f"{levels.count} (abar {levels.abar(plan.chain.level):.4f}) of {model} and brought back "
        f"(Luzi et al., TMLR 2024).{f' Enhanced: {how}.' if how else ''}\n\n"
        "A small t_boom changes an image little: distances to the source are reduced links, not proof of anonymity.\n\n"
        f"- source licence: {_literal(plan.source.licence)}\n- model licence: {_literal(plan.model.licence)}\n"
    )


def _content(files: dict[str, Any]) -> str:
    """A hash of what the tars hold, which tells two data sets apart and nothing else."""
    return hashlib.sha256("".join(tar["sha256"] for tar in files["written"]).encode()).hexdigest()[:16]


class _OneLine(yaml.SafeDumper):
    """Writes names with line breaks on one line: `---` on a line of its own would end the card's head."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _quoted)


def _literal(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line: it may come from a stranger's model folder."""
    return re.sub(r"([\\`*_\[\]<>&#|])", r"\\\1", printable(" ".join(text.split())))


def _features(plan: Plan) -> list[dict[str, Any]]:
    about: list[dict[str, Any]] = [
        {"name": "abar", "dtype": "float64"},
        {"name": "class_name", "dtype": "string"},
    ]
    if plan.job.linkage == "public":
        about += [{"name": "source_key", "dtype": "string"}, {"name": "source_row", "dtype": "int64"}]
    about += [{"name": "t_boom", "dtype": "string"}]
    if plan.job.linkage == "public":
        about += [{"name": "variant", "dtype": "int64"}]
    features: list[dict[str, Any]] = [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
    if plan.labels_kept:
        names = {str(number): name for number, name in enumerate(plan.source.classes)}
        features.append({"name": "cls", "dtype": {"class_label": {"names": names}}})
    images = [{"name": name, "dtype": "image"} for name in (*pass_fields(plan.job), plan.job.format)]
    return [*features, {"name": "json", "struct": about}, *images]
