"""Train (or go on training) the embedded patched, class-conditional DDPM on Fashion-MNIST, on a CPU.

    python train.py --data /usr/share/datasets/fashion-mnist --seconds 6000 --out OUT [--init MODEL --lr 1e-4]

28x28 grey images are padded to 32x32, scaled to [-1, 1] and cut into 2x2 patches (4 channels at 16x16). Class 10 is
the null class: 10 % of the labels are dropped to it. T = 1000, squared-cosine schedule, eps-prediction, min-SNR-5
weights, stratified timesteps. What is saved is the exponential moving average of the weights, in half precision.
"""

import argparse
import copy
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

BATCH = 128
NULL_CLASS = 10


def images_and_labels(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The 60,000 training images as (N, 4, 16, 16) floats in [-1, 1], and their labels."""
    x = np.frombuffer(gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    y = np.frombuffer(gzip.decompress((data / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    x = np.pad(x.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    images = torch.from_numpy(x).float().div_(127.5).sub_(1)[:, None]
    images = F.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last)
    return images, torch.from_numpy(y.copy()).long()


def new_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL_CLASS + 1,
        norm_num_groups=16,
    )


def train(data: Path, seconds: float, out: Path, init: Path | None, lr: float) -> None:
    torch.manual_seed(0)
    x, y = images_and_labels(data)
    network = UNet2DModel.from_pretrained(init / "unet", torch_dtype=torch.float32) if init else new_network()
    network.to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(network).eval()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5.0) / snr
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    fast = torch.compile(network)
    start, step, loss_mean, order, at = time.time(), 0, 0.0, torch.randperm(len(x)), 0
    while (done := (time.time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 200)
            group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        if at + BATCH > len(x):
            order, at = torch.randperm(len(x)), 0
        rows, at = order[at : at + BATCH], at + BATCH
        label = torch.where(torch.rand(BATCH) < 0.1, NULL_CLASS, y[rows])
        t = ((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH * 1000).long().clamp(max=999)
        t = t[torch.randperm(BATCH)]
        eps = torch.randn_like(x[rows])
        a = abar[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x[rows] + (1 - a).sqrt() * eps
        guess = fast(x_t, t, class_labels=label, return_dict=False)[0]
        loss = ((guess - eps).square().mean((1, 2, 3)) * weight[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        loss_mean = loss.item() if step == 1 else 0.98 * loss_mean + 0.02 * loss.item()
        if step % 100 == 0:
            epoch = step * BATCH / len(x)
            print(step, f"{time.time() - start:.0f} s, epoch {epoch:.2f}, loss {loss_mean:.4f}", flush=True)
        if step % 500 == 0:
            save(average, scheduler, out)
    save(average, scheduler, out)


def save(network: UNet2DModel, scheduler: DDPMScheduler, out: Path) -> None:
    copy.deepcopy(network).half().save_pretrained(out / "unet")
    scheduler.save_pretrained(out / "scheduler")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--lr", type=float, default=4e-4)
    given = parser.parse_args()
    train(given.data, given.seconds, given.out, given.init, given.lr)
