"""A picture of some images over their Boomerang versions at several t_boom, to choose t_boom by."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from boomgen import images
from boomgen.errors import UsageError
from boomgen.images import Pixels
from boomgen.job import Job, Launch
from boomgen.levels import parse_t_boom
from boomgen.prepare import prepare

MARGIN = 92


def sweep(job: Job, launch: Launch, t_booms: list[str], out: Path) -> dict[str, str]:
    """Write the picture; per t_boom the abar and the rms distance to the source (pixels in [-1, 1])."""
    if out.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UsageError(f"a picture named {out}; expected a name that ends in .png, .jpg or .webp")
    lines: list[tuple[str, list[Pixels]]] = []
    table: dict[str, str] = {}
    for t_boom in t_booms:
        parse_t_boom(t_boom)
        abar, sources, outputs = _at(job.model_copy(update={"t_boom": t_boom}), launch)
        rms = np.sqrt(np.mean(np.square((np.stack(outputs).astype(float) - np.stack(sources)) / 127.5)))
        table[f"t_boom {t_boom}"] = f"abar {abar:.4f}, rms to source {rms:.3f}"
        lines = lines or [("source", sources)]
        lines.append((f"t_boom {t_boom}\nabar {abar:.3f}", outputs))
    _draw(lines).save(out)
    return table


def _at(job: Job, launch: Launch) -> tuple[float, list[Pixels], list[Pixels]]:
    """abar, sources and outputs of a job that is one batch, in the order of the source."""
    from boomgen.worker import Worker

    with tempfile.TemporaryDirectory() as folder:
        whole = job.model_copy(update={"compile": "no", "batch_size": job.batch_size or job.limit})
        run = prepare(whole, launch.model_copy(update={"out": f"{folder}/run"}))
        worker = Worker(run)
        loaded = worker.load(worker.batches(0)[0])
        (outputs,), _ = worker.sample(loaded)
    pairs = [(item.row.source_row, item.pixels, outputs[i].numpy()) for i, item in enumerate(loaded)]
    shown = sorted((pair for pair in pairs if pair[1] is not None), key=lambda pair: pair[0])
    if not shown:
        raise UsageError(
            f"not one of the first {job.limit} images of {job.dataset} can be decoded; try a greater --limit"
        )
    abar = run.plan.chain.levels.abar(run.plan.chain.level)
    return abar, [source for _, source, _ in shown if source is not None], [output for _, _, output in shown]


def _draw(rows: list[tuple[str, list[Pixels]]]) -> Image.Image:
    size = rows[0][1][0].shape[0]
    cell = max(size, 96 // size * size)
    picture = Image.new("RGB", (MARGIN + cell * len(rows[0][1]), cell * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for y, (text, line) in enumerate(rows):
        pen.text((6, y * cell + cell // 2 - 12), text, fill="black")
        for x, pixels in enumerate(line):
            tile = images.to_image(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (MARGIN + x * cell, y * cell))
    return picture
