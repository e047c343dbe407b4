"""How far bf16 and compiled outputs are from fp32 eager ones: the same images, noise and levels."""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, table
from numpy.typing import NDArray
from torch import Tensor

from boomgen import catalog, env, images, models
from boomgen.boomerang import boomerang
from boomgen.levels import Levels, parse_t_boom
from boomgen.models import ModelInfo
from boomgen.models.chain import levels as levels_of
from boomgen.models.conditions import Conditions, of_classes
from boomgen.models.denoiser import Denoiser
from boomgen.models.denoiser import Pixels as PixelCoder
from boomgen.models.network import NetworkCall, build, compile_network, example_inputs, load_compiled
from boomgen.noise import normal
from boomgen.sources import open_source

VARIANTS = (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))
Pixels = NDArray[np.uint8]


def network(info: ModelInfo, dtype: str, compiled: bool, batch: int) -> NetworkCall:
    eager = build(info, getattr(torch, dtype))
    if not compiled:
        return eager
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "network.pt2"
        compile_network(eager, example_inputs(info, batch, of_classes(info, None)), package)
        return load_compiled(package)


def sources(count: int, size: int) -> tuple[Pixels, Tensor]:
    """The first images of the embedded sample, spread over its classes, (N, H, W, C) and labels (N,)."""
    source = open_source(str(catalog.asset("fashion-sample")), "test")
    rows = list(source.rows())
    rows = rows[:: max(1, len(rows) // count)][:count]
    pixels = [images.fit(images.decode(source.read(row), 1), size, "pad")[0] for row in rows]
    return np.stack(pixels), torch.tensor([row.label for row in rows])


@torch.inference_mode()
def sampled(call: NetworkCall, info: ModelInfo, levels: Levels, level: int, pixels: Pixels, labels: Tensor) -> Pixels:
    told = of_classes(info, tuple(range(info.class_count)))
    unet = Denoiser(info, levels, call, PixelCoder("cpu"), told)
    condition, keys = unet.prepare(labels), [number.to_bytes(16, "little") for number in range(len(pixels))]
    x = boomerang(
        unet.encode(torch.from_numpy(pixels)),
        level,
        levels,
        partial(_predict, unet, condition),
        lambda stream, step: torch.from_numpy(normal(keys, stream, step, info.state)),
    )
    return np.asarray(unet.decode(x))


def _predict(unet: Denoiser, condition: Conditions, x: Tensor, k: int) -> Tensor:
    return unet.predict_x0(x, k, condition)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--t-boom", default="0.4")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print(machine(), flush=True)

    torch.set_num_threads(env.cores())
    info = models.inspect("fashion-patched-ddpm")
    levels = levels_of(info, args.steps)
    level = levels.level(parse_t_boom(args.t_boom)[0])
    pixels, labels = sources(args.images, info.size)
    exact: Pixels | None = None
    rows = []
    for dtype, compiled in VARIANTS:
        call = network(info, dtype, compiled, args.images)
        start = time.perf_counter()
        made = sampled(call, info, levels, level, pixels, labels)
        seconds = time.perf_counter() - start
        exact = made if exact is None else exact
        error = made.astype(np.int64) - exact
        mse = np.square(error).mean()
        psnr = 10 * np.log10(255**2 / mse) if mse else np.inf
        worst = f"{np.abs(error).max()}"
        rows.append(
            (
                f"{dtype} {'compiled' if compiled else 'eager'}",
                f"{psnr:.1f}",
                worst,
                f"{np.mean(error != 0):.2%}",
                f"{args.images * level / seconds:.0f}",
            )
        )
    print(f"{args.images} images, level {level}/{levels.count}, against float32 eager")
    print(table(("network", "PSNR, dB", "largest difference, of 255", "pixels that differ", "image-calls/s"), rows))


if __name__ == "__main__":
    main()
