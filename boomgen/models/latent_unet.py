"""Text-conditional UNets on latents: Stable Diffusion 1.x and 2.x, SDXL, and their distilled kin (LCM, Turbo)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from boomgen.models import ModelInfo
from boomgen.models.folder import SCHEDULER, Config, Folder
from boomgen.models.latents import common, recognise_vae, text_parts

KINDS = ("UNet2DConditionModel",)
GUIDANCE = {"StableDiffusionPipeline": 7.5, "StableDiffusionXLPipeline": 5.0, "LatentConsistencyModelPipeline": 8.5}
"""Pipelines that are known, and the guidance that each would use."""


class _UNet(Config):
    sample_size: int = Field(ge=1, le=2**14)
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    cross_attention_dim: int
    time_cond_proj_dim: int | None = None


class _Scheduler(Config):
    prediction_type: str = "epsilon"
    num_train_timesteps: int = Field(default=1000, ge=1, le=10**6)
    original_inference_steps: int = Field(default=50, ge=1)


def recognise(folder: Folder, index: dict[str, Any]) -> ModelInfo:
    """A UNet2DConditionModel with its VAE, text encoders and tokenizers."""
    pipeline = str(index.get("_class_name"))
    if pipeline not in GUIDANCE:
        raise folder.refuse(f"is a {pipeline}; expected one of {', '.join(GUIDANCE)}")
    unet = folder.checked(_UNet, folder.part("unet") / "config.json")
    scheduler_file = folder.part("scheduler") / SCHEDULER
    scheduler, kind = folder.checked(_Scheduler, scheduler_file), str(folder.read(scheduler_file).get("_class_name"))
    channels, factor = recognise_vae(folder)
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise folder.refuse(
            f"has {unet.in_channels} input, {unet.out_channels} output and {channels} latent channels; expected "
            "as many of each (inpainting and other edit models are not run)"
        )
    own, trained = folder.own, scheduler.num_train_timesteps
    known, distilled = own.known, kind == "LCMScheduler"
    if distilled:
        stride = trained // scheduler.original_inference_steps
        known = known or tuple(range(stride - 1, trained, stride))
    return ModelInfo(
        **common(folder, "unet", text_parts(index), unet.sample_size, channels, factor),
        family="latent-unet",
        kind="UNet2DConditionModel",
        pipeline=pipeline,
        prediction=scheduler.prediction_type,  # type: ignore[arg-type]  # checked by the model
        text=True,
        trained_steps=trained,
        known=known,
        guidance=1.0 if known and not distilled else GUIDANCE[pipeline],
        sampler="renoise" if distilled else "ancestral",
        why=(
            f"model_index.json is a {pipeline}",
            f"unet/ is a UNet2DConditionModel on latents of side {unet.sample_size}, vae/ scales by {factor}",
            f"scheduler/ is a {kind} of {trained} steps: {scheduler.prediction_type}",
            *([f"a distilled network, which knows {len(known)} levels"] if known else []),
        ),
    )


class Network(torch.nn.Module):
    """(x (B, C, H, W) fp32, t (B,), text (B, L, D), pooled (B, P) for SDXL) -> prediction (B, C, H, W) fp32."""

    def __init__(self, info: ModelInfo, unet: torch.nn.Module, dtype: torch.dtype, guidance: float) -> None:
        super().__init__()
        self.unet, self.dtype = unet, dtype
        time_ids = torch.tensor([info.size, info.size, 0, 0, info.size, info.size], dtype=dtype)
        self.register_buffer("time_ids", time_ids)
        dim = getattr(unet.config, "time_cond_proj_dim", None)
        self.register_buffer("told_guidance", _sinusoid(guidance - 1, dim).to(dtype) if dim else None)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None = None) -> Tensor:
        more: dict[str, Any] = {}
        if pooled is not None:
            time_ids = self.time_ids.expand(len(x), -1)  # type: ignore[operator]
            more["added_cond_kwargs"] = {"text_embeds": pooled.to(self.dtype), "time_ids": time_ids}
        if self.told_guidance is not None:
            more["timestep_cond"] = self.told_guidance.expand(len(x), -1)  # type: ignore[operator]
        out = self.unet(x.to(self.dtype), t, encoder_hidden_states=text.to(self.dtype), return_dict=False, **more)
        return out[0].float()  # type: ignore[no-any-return]


def _sinusoid(value: float, dim: int) -> Tensor:
    """The embedding (1, dim) by which a latent consistency model is told its guidance (Luo et al. 2023)."""
    half = dim // 2
    angles = 1000 * value * torch.exp(-torch.arange(half) * (torch.log(torch.tensor(10000.0)) / (half - 1)))
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()])[None], (0, dim % 2))
