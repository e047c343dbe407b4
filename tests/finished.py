"""Finished runs for the tests, and what they hold, read with nothing of boomgen's own readers."""

import hashlib
import io
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from boomgen.finalise import finalise
from boomgen.run import RunDir
from boomgen.shard import PART, TAR, sha256_file

PEOPLE = ("jane_doe.0017", "john_smith.0023", "maria_garcia.0042", "wei_chen.0101", "fatima_khan.0300")


def make_shards(run: RunDir) -> RunDir:
    """All shards, made by one worker in this process; a fresh RunDir."""
    import torch

    from boomgen.worker import Worker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker = Worker(run)
    for number in range(run.plan.shards):
        worker.make_shard(number)
    worker.pool.shutdown()
    torch.set_num_threads(threads)
    return RunDir(run.path)


def finish(run: RunDir) -> RunDir:
    """A planned run, made and closed in this process."""
    finalise(made := make_shards(run))
    return made


Bytes = dict[str, str]


def made(run: RunDir) -> Bytes:
    """The hash of every tar and manifest part, in the shards and as they were placed."""
    files = [run.shard(number) / name for number in range(run.plan.shards) for name in (TAR, PART)]
    files += sorted(run.dataset.rglob("*")) + sorted(run.manifest.iterdir())
    return {path.relative_to(run.path).as_posix(): sha256_file(path) for path in files if path.is_file()}


def samples(run: RunDir) -> dict[str, dict[str, bytes]]:
    """What the data set's tars hold: key -> extension -> content, in the order of the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(run.dataset.glob("data/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = (tar.extractfile(member) or io.BytesIO()).read()
    return found


def pixel_hash(image: Image.Image | np.ndarray) -> str:
    """sha256 over (H, W, C) uint8, as in the manifest."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(image)).tobytes()).hexdigest()


def grey(image: Image.Image | np.ndarray) -> np.ndarray:
    """The one channel of a grey picture that a loader made RGB, (H, W)."""
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        assert (pixels == pixels[..., :1]).all()
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels)


def write_portraits(folder: Path, per_person: int = 5, size: tuple[int, int] = (12, 10)) -> Path:
    """An image folder whose names, text chunks and EXIF all tell who is shown: patients/jane_doe.0017.00.png, ..."""
    random = np.random.default_rng(1)
    for place, person in enumerate(PEOPLE):
        home = folder / ("patients" if place % 2 else "healthy_volunteers")
        home.mkdir(parents=True, exist_ok=True)
        for number in range(per_person):
            picture = Image.fromarray(random.integers(0, 256, size, np.uint8))
            text, exif = PngInfo(), picture.getexif()
            text.add_text("Patient", f"{person} born 1980-02-29")
            text.add_itxt("Comment", f"{person} at Saint Mary", zip=True)
            exif[0x010E] = f"portrait of {person}"
            picture.save(home / f"{person}.{number:02d}.png", pnginfo=text, exif=exif)
    return folder


def nan_model(model: Path, folder: Path, classes: slice) -> Path:
    """A copy of the tiny model that gives NaN for these classes."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["class_embedding.weight"][classes] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def in_ranks(work: Callable[[], Any], rendezvous: Path | None = None, ranks: int = 2) -> list[Any]:
    """What `work` returns in each of several real processes that know their RANK and WORLD_SIZE.

    With a rendezvous file, also inside a gloo process group.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [context.Process(target=_rank, args=(work, r, ranks, rendezvous, pipes[r][1])) for r in range(ranks)]
    for process in processes:
        process.start()
    try:
        found = [pipe.recv() if pipe.poll(60) else None for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    return found


def _rank(work: Callable[[], Any], rank: int, ranks: int, rendezvous: Path | None, pipe: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if rendezvous is not None:
        import torch.distributed as group

        group.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    pipe.send(work())


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: path -> time and content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def command_line(job: Any, out: Path, *more: str, verb: str, **changes: Any) -> list[str]:
    """The command line of a job."""
    names = ("dataset", "model", "t_boom", "steps", "batch_size", "shard_size", "eta")
    if verb == "augment":
        names += ("variants", "seed", "limit")
    values = {name: getattr(job, name) for name in names} | changes
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [verb, *flags, "--out", str(out), "--device", "cpu", *more]
