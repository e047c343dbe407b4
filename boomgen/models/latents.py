"""What models on latents share: the folder's parts, and the VAE between images and latents."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from boomgen.models import ModelInfo
from boomgen.models.chain import loading
from boomgen.models.folder import SCHEDULER, Config, Folder

TOKENS = (".json", ".txt", ".model")
"""Files of a tokenizer."""


class _VAE(Config):
    block_out_channels: tuple[int, ...] = Field(min_length=1, max_length=10)
    latent_channels: int = Field(ge=1)


def recognise_vae(folder: Folder) -> tuple[int, int]:
    """Channels of the latents, and by how much they are smaller than the image."""
    kind = folder.read(folder.part("vae") / "config.json").get("_class_name")
    if kind != "AutoencoderKL":
        raise folder.refuse(f"has a {kind} in vae/; expected an AutoencoderKL")
    vae = folder.checked(_VAE, folder.part("vae") / "config.json")
    return vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)


def text_parts(index: dict[str, Any]) -> list[str]:
    """The text encoders and tokenizers that a pipeline's index lists."""
    return sorted(
        name for name, kind in index.items() if name.startswith(("text_encoder", "tokenizer")) and kind != [None, None]
    )


def parts(folder: Folder, named: Iterable[str]) -> list[Path]:
    """The files of these components that are loaded, in a fixed order."""
    files: list[Path] = []
    for part in named:
        if part == "scheduler":
            files.append(folder.part(part) / SCHEDULER)
        elif part.startswith("tokenizer"):
            files += sorted(file for file in folder.part(part).iterdir() if file.suffix in TOKENS)
        else:
            files += [folder.part(part) / "config.json", *folder.weights(part)]
    return files


def common(folder: Folder, network: str, more: Iterable[str], side: int, channels: int, factor: int) -> dict[str, Any]:
    """What a ModelInfo says alike of every model on latents, of `side` and `channels`; `more` are its text parts."""
    files = parts(folder, [network, "vae", "scheduler", *more])
    return {
        "name": folder.name,
        "path": folder.path,
        "sha256": folder.fingerprint(files),
        "pickled": any(file.suffix == ".bin" for file in files),
        "variant": folder.variant(network),
        "size": side * factor,
        "channels": 3,
        "state": (channels, side, side),
        "licence": str(folder.own.licence),
    }


class Latents:
    """An AutoencoderKL of diffusers: images, uint8 (B, H, W, 3), to scaled latents, fp32 (B, C, H / f, W / f)."""

    def __init__(self, info: ModelInfo, dtype: torch.dtype, device: str) -> None:
        from diffusers import AutoencoderKL

        with loading(info, "vae"):
            vae = AutoencoderKL.from_pretrained(
                info.root / "vae", torch_dtype=dtype, use_safetensors=not info.pickled, variant=info.variant
            )
        self.vae, self.dtype, self.device = vae.eval().requires_grad_(False).to(device), dtype, device
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0)
        self.mean, self.std = _moment(vae.config.latents_mean, 0, device), _moment(vae.config.latents_std, 1, device)

    def encode(self, images: Tensor) -> Tensor:
        """The mode of the posterior: no noise but Boomerang's own enters."""
        x = images.to(self.device).permute(0, 3, 1, 2).to(self.dtype).div(127.5).sub(1)
        mode = self.vae.encode(x).latent_dist.mode().float()
        state: Tensor = (mode - self.mean - self.shift) * self.scale / self.std
        return state

    def decode(self, state: Tensor) -> Tensor:
        """Latents to pixels, fp32 (B, 3, H, W), about [-1, 1]."""
        latents = state * self.std / self.scale + self.shift + self.mean
        pixels: Tensor = self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
        return pixels


def _moment(values: Any, otherwise: float, device: str) -> Tensor:
    """Per-channel mean or spread of the latents, which some VAEs of SDXL state."""
    return torch.tensor(values or [otherwise], dtype=torch.float32, device=device).view(1, -1, 1, 1)
