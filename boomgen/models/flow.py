"""Rectified-flow transformers on latents: Stable Diffusion 3 and FLUX."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from boomgen.models import ModelInfo
from boomgen.models.folder import SCHEDULER, Config, Folder
from boomgen.models.latents import common, recognise_vae, text_parts

KINDS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
GUIDANCE = {"StableDiffusion3Pipeline": 7.0, "FluxPipeline": 3.5}
"""Pipelines that are known, and the guidance that each would use; FLUX is told it, or has none."""
FLUX_PATCH = 2


class _Transformer(Config):
    in_channels: int = Field(ge=1)
    sample_size: int = Field(default=128, ge=1, le=2**14)
    guidance_embeds: bool = False


class _VAE(Config):
    sample_size: int = Field(default=1024, ge=1, le=2**17)


class _Scheduler(Config):
    num_train_timesteps: int = Field(default=1000, ge=1, le=10**6)


def recognise(folder: Folder, index: dict[str, Any]) -> ModelInfo:
    """An SD3 or FLUX transformer with its VAE, text encoders and tokenizers."""
    pipeline = str(index.get("_class_name"))
    if pipeline not in GUIDANCE:
        raise folder.refuse(f"is a {pipeline}; expected one of {', '.join(GUIDANCE)}")
    scheduler_file, flux = folder.part("scheduler") / SCHEDULER, pipeline == "FluxPipeline"
    scheduler, kind = folder.checked(_Scheduler, scheduler_file), str(folder.read(scheduler_file).get("_class_name"))
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise folder.refuse(f"has a {kind}; expected a FlowMatchEulerDiscreteScheduler")
    net = folder.checked(_Transformer, folder.part("transformer") / "config.json")
    channels, factor = recognise_vae(folder)
    if net.in_channels != channels * (FLUX_PATCH**2 if flux else 1):
        raise folder.refuse(f"has {net.in_channels} input channels, which do not fit {channels} latent channels")
    side = folder.checked(_VAE, folder.part("vae") / "config.json").sample_size // factor if flux else net.sample_size
    told = flux and not net.guidance_embeds
    return ModelInfo(
        **common(folder, "transformer", text_parts(index), side, channels, factor),
        family="flux" if flux else "sd3",
        kind=KINDS[flux],
        pipeline=pipeline,
        prediction="velocity",
        text=True,
        trained_steps=scheduler.num_train_timesteps,
        guidance=1.0 if told else GUIDANCE[pipeline],
        why=(
            f"model_index.json is a {pipeline}",
            f"transformer/ runs on {channels}x{side}x{side} latents, vae/ scales by {factor}",
            f"scheduler/ is a {kind}: velocity",
        ),
    )


class SD3Network(torch.nn.Module):
    """(x (B, C, H, W) fp32, sigma (B,), text (B, L, D), pooled (B, P)) -> velocity (B, C, H, W) fp32."""

    def __init__(self, info: ModelInfo, transformer: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer, self.dtype, self.steps = transformer, dtype, info.trained_steps

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        out = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma * self.steps,
            encoder_hidden_states=text.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            return_dict=False,
        )
        return out[0].float()  # type: ignore[no-any-return]


class FluxNetwork(torch.nn.Module):
    """As SD3Network, on latents folded into 2x2 tokens; networks distilled to it are told the `guidance`."""

    def __init__(self, info: ModelInfo, transformer: Any, dtype: torch.dtype, guidance: float) -> None:
        super().__init__()
        self.transformer, self.dtype = transformer, dtype
        self.guidance = guidance if transformer.config.guidance_embeds else None
        rows, columns = (side // FLUX_PATCH for side in info.state[1:])
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        self.register_buffer("ids", ids.reshape(-1, 3).to(dtype))

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        told = None if self.guidance is None else torch.full_like(sigma, self.guidance)
        out = self.transformer(
            hidden_states=fold(x).to(self.dtype),
            timestep=sigma,
            guidance=told,
            encoder_hidden_states=text.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            img_ids=self.ids,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=self.dtype),
            return_dict=False,
        )
        return unfold(out[0].float(), x.shape[2], x.shape[3])


def fold(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) to tokens (B, H/2 W/2, 4 C)."""
    return torch.nn.functional.pixel_unshuffle(x, FLUX_PATCH).flatten(2).transpose(1, 2)


def unfold(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `fold`."""
    x = tokens.transpose(1, 2).reshape(len(tokens), -1, height // FLUX_PATCH, width // FLUX_PATCH)
    return torch.nn.functional.pixel_shuffle(x, FLUX_PATCH)
