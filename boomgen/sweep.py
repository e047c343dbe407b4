"""A picture of some images over their Boomerang versions at several t_boom, to choose t_boom by."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from boomgen import images
from boomgen.images import Pixels
from boomgen.job import Job, Launch
from boomgen.levels import parse_t_boom
from boomgen.prepare import prepare

MARGIN = 92


def sweep(job: Job, launch: Launch, t_booms: list[str], out: Path) -> dict[str, str]:
    """Write the picture; per t_boom the abar and the rms distance to the source (pixels in [-1, 1])."""
    from boomgen.worker import Worker

    rows: list[tuple[str, list[Pixels]]] = []
    table: dict[str, str] = {}
    for t_boom in t_booms:
        parse_t_boom(t_boom)
        with tempfile.TemporaryDirectory() as folder:
            alone: dict[str, Any] = {"t_boom": t_boom, "compile": "no", "batch_size": job.batch_size or job.limit}
            run = prepare(job.model_copy(update=alone), launch.model_copy(update={"out": f"{folder}/run"}))
            worker = Worker(run)
            loaded = worker._load(worker.batches(0)[0])
            pixels, _ = worker.sample(loaded)
        loaded_by_source = sorted(range(len(loaded)), key=lambda i: loaded[i].row.source_row)
        good = [i for i in loaded_by_source if loaded[i].pixels is not None]
        sources = [loaded[i].pixels for i in good]
        outputs = [pixels[i].numpy() for i in good]
        rms = np.sqrt(np.mean((np.stack(outputs) / 127.5 - np.stack(sources) / 127.5) ** 2))  # type: ignore[arg-type]
        level, levels = run.plan.chain.level, run.plan.chain.levels
        table[f"t_boom {t_boom}"] = f"level {level}/{levels.count}, abar {levels.abar(level):.4f}, rms {rms:.3f}"
        if not rows:
            rows.append(("source", sources))  # type: ignore[arg-type]
        rows.append((f"t_boom {t_boom}\nabar {levels.abar(level):.3f}", outputs))
    _draw(rows).save(out)
    return table


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
