"""Pixel-space UNets of diffusers (DDPM), whole or on patches, with or without classes."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from boomgen.errors import UsageError
from boomgen.levels import Levels
from boomgen.models import WEIGHTS, ModelInfo

NetworkCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W) fp32, t (B,) fp32, class (B,) int64) -> prediction (B, C, H, W) fp32."""


def trained_abar(info: ModelInfo) -> NDArray[np.float64]:
    """abar of every trained index, shape (T,), from the betas of the folder's scheduler, in float64."""
    from diffusers import DDPMScheduler

    folder = info.root / "scheduler" if (info.root / "scheduler").is_dir() else info.root
    with _loading(info, "scheduler"):
        abar = np.cumprod(1 - DDPMScheduler.from_pretrained(folder).betas.double().numpy())
        if not (abar.shape == (info.trained_steps,) and abar[-1] > 0 and (np.diff(abar) < 0).all() and abar[0] < 1):
            raise ValueError(f"abar does not fall from 1 to 0 in {info.trained_steps} steps")
    return abar


@contextlib.contextmanager
def _loading(info: ModelInfo, part: str) -> Iterator[None]:
    """diffusers and torch fail with a dozen exception types on a folder whose files do not fit each other."""
    try:
        yield
    except MemoryError:  # another machine may have it
        raise
    except Exception as err:
        if isinstance(err, OSError) and err.errno is not None:  # the disk's; diffusers uses OSError for its own too
            raise
        raise UsageError(
            f"model {info.name}: its {part} does not load ({' '.join(str(err).split())[:200]}); fetch it again"
        ) from err


class Network(torch.nn.Module):
    """The UNet with its patching and precision: the one thing that is compiled."""

    def __init__(self, info: ModelInfo, dtype: torch.dtype) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        folder = info.root / "unet" if (info.root / "unet").is_dir() else info.root
        with _loading(info, "network"):
            unet = UNet2DModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=info.weights == WEIGHTS)
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.patch, self.conditional, self.dtype = info.patch, info.class_count > 0, dtype

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        x = x.to(self.dtype, memory_format=torch.channels_last)
        out = self.unet(x, t, class_labels=label if self.conditional else None, return_dict=False)[0].float()
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


def example_inputs(info: ModelInfo, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the one planned shape."""
    shape = (batch, info.channels, info.size, info.size)
    return (
        torch.zeros(shape, device=device),
        torch.ones(batch, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


class PixelUNet:
    """The Denoiser of a pixel-space UNet on given levels."""

    def __init__(
        self, info: ModelInfo, levels: Levels, network: NetworkCall, classes: tuple[int, ...] | None, device: str
    ) -> None:
        self.info, self.levels, self.network, self.device = info, levels, network, device
        none = info.null_class if info.null_class is not None else 0
        self.class_of = torch.tensor([*(classes or ()), none], device=device)  # label -1 picks the last entry
        self.class_blind = classes is None

    def encode(self, images: Tensor) -> Tensor:
        x = images.to(self.device).permute(0, 3, 1, 2).float()
        return x.div_(127.5).sub_(1).contiguous()

    def decode(self, state: Tensor) -> Tensor:
        return ((state.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def prepare(self, labels: Tensor) -> Tensor:
        return self.class_of[torch.full_like(labels, -1) if self.class_blind else labels]

    def predict_x0(self, x: Tensor, k: int, condition: Tensor) -> Tensor:
        a, s = float(self.levels.a[k]), float(self.levels.s[k])
        t = torch.full((len(x),), float(self.levels.t[k]), device=self.device)
        out = self.network(x, t, condition)
        if self.info.prediction == "epsilon":
            out = (x - s * out) / a
        elif self.info.prediction == "v_prediction":
            out = a * x - s * out
        return out.clamp(-1, 1) if self.info.clip else out


def compile_network(info: ModelInfo, dtype: torch.dtype, batch: int, device: str, package: Path) -> None:
    """Compile the network for the one planned batch shape, ahead of time, into a file that loads in milliseconds."""
    from torch._inductor import aoti_compile_and_package

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA is no news on a CPU
    with torch.no_grad():
        network = Network(info, dtype).to(device)
        exported = torch.export.export(network, example_inputs(info, batch, device))
        aoti_compile_and_package(exported, package_path=str(package))


def load_compiled(package: Path) -> NetworkCall:
    """The compiled network; needs no diffusers."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(package))


def flops(info: ModelInfo, batch: int) -> int:
    """Floating-point operations of one network call, counted by running it once for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Network(info, torch.float32)(*example_inputs(info, 1))
    return int(counter.get_total_flops()) * batch
