"""The loop that one writes without boomgen: diffusers, a DataLoader, webdataset's ShardWriter, all cores as threads.

Algorithm 1 at the same levels: 100 evenly spaced ones of the trained 1,000, DDPM steps from t_boom down. It keeps no
provenance, cannot be resumed and has one random stream. Prints one JSON object; throughput.py runs it.
"""

import argparse
import gzip
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import boomgen

ASSETS = Path(boomgen.__file__).parent / "assets"


class FashionSample(Dataset[tuple[Tensor, int]]):
    """The 1,000 embedded images, over and over up to `count`: (1, 32, 32) in [-1, 1] and the label."""

    def __init__(self, count: int) -> None:
        folder, self.count = ASSETS / "fashion-sample", count
        images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
        self.images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        self.labels = np.frombuffer(labels, np.uint8, offset=8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[index % len(self.images)].copy())[None]
        return F.pad(image, (2, 2, 2, 2)).float() / 127.5 - 1, int(self.labels[index % len(self.labels)])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--levels", type=int, default=40, help="network calls per image, of a chain of 100")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    model = ASSETS / "fashion-patched-ddpm"
    unet = UNet2DModel.from_pretrained(model / "unet", torch_dtype=dtype).eval().to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    levels = [round(i * 999 / 99) for i in range(args.levels)][::-1]
    scheduler.set_timesteps(timesteps=levels)
    network = torch.compile(unet) if args.compile else unet
    start = time.perf_counter()
    network(
        torch.zeros(args.batch_size, 4, 16, 16, dtype=dtype).to(memory_format=torch.channels_last),
        torch.ones(args.batch_size),
        class_labels=torch.zeros(args.batch_size, dtype=torch.int64),
    )
    first_call = time.perf_counter() - start

    start, calls = time.perf_counter(), 0
    loader = DataLoader(FashionSample(args.images), batch_size=args.batch_size, num_workers=1)
    with tempfile.TemporaryDirectory() as folder, webdataset.ShardWriter(f"{folder}/%05d.tar", verbose=0) as writer:
        for batch, (x0, labels) in enumerate(loader):
            x = scheduler.add_noise(x0, torch.randn_like(x0), torch.full((len(x0),), levels[0]))
            for t in levels:
                patches = F.pixel_unshuffle(x, 2).to(dtype, memory_format=torch.channels_last)
                out = network(patches, torch.full((len(x),), float(t)), class_labels=labels).sample
                x = scheduler.step(F.pixel_shuffle(out.float(), 2), t, x).prev_sample
                calls += len(x)
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[:, 0, 2:30, 2:30].numpy()
            for i, image in enumerate(pixels):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                key = f"{batch * args.batch_size + i:08d}"
                writer.write({"__key__": key, "png": png.getvalue(), "cls": int(labels[i])})
    seconds = time.perf_counter() - start
    print(json.dumps({"image_calls_per_s": calls / seconds, "seconds": seconds, "first_call": first_call}))


if __name__ == "__main__":
    main()
