"""Class-conditional transformers on latents: DiT (Peebles & Xie 2023)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from boomgen.models import ModelInfo
from boomgen.models.folder import SCHEDULER, Config, Folder
from boomgen.models.latents import common, recognise_vae

KINDS = ("DiTTransformer2DModel", "Transformer2DModel")
GUIDANCE = 4.0  # of diffusers' DiTPipeline


class _Transformer(Config):
    sample_size: int = Field(ge=1, le=2**14)
    in_channels: int = Field(ge=1)
    out_channels: int | None = None
    num_embeds_ada_norm: int = Field(ge=1)


class _Scheduler(Config):
    prediction_type: str = "epsilon"
    num_train_timesteps: int = Field(default=1000, ge=1, le=10**6)


def recognise(folder: Folder, index: dict[str, Any]) -> ModelInfo:
    """A DiT with its VAE. The class after the last one is none."""
    net = folder.checked(_Transformer, folder.part("transformer") / "config.json")
    scheduler = folder.checked(_Scheduler, folder.part("scheduler") / SCHEDULER)
    channels, factor = recognise_vae(folder)
    learned = net.out_channels == 2 * net.in_channels
    if net.in_channels != channels or not (learned or net.out_channels in (None, channels)):
        raise folder.refuse(
            f"has {net.in_channels} input, {net.out_channels} output and {channels} latent channels; expected as many, "
            "or twice as many of output with a learned variance"
        )
    return ModelInfo(
        **common(folder, "transformer", (), net.sample_size, channels, factor),
        family="dit",
        kind="DiTTransformer2DModel",
        pipeline="DiTPipeline",
        prediction=scheduler.prediction_type,  # type: ignore[arg-type]  # checked by the model
        variance="adm" if learned else "none",
        classes=_names(index, net.num_embeds_ada_norm),
        class_count=net.num_embeds_ada_norm,
        null_class=net.num_embeds_ada_norm,
        trained_steps=scheduler.num_train_timesteps,
        guidance=GUIDANCE,
        why=(
            f"transformer/ is a DiT of {net.num_embeds_ada_norm} classes on latents of side {net.sample_size}",
            f"vae/ scales by {factor}",
            f"scheduler/ has {scheduler.num_train_timesteps} steps: {scheduler.prediction_type}",
        ),
    )


def _names(index: dict[str, Any], count: int) -> tuple[str, ...]:
    """Class names of the pipeline's index, if it names all."""
    names = index.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(count)}:
        return ()
    return tuple(str(names[str(number)]) for number in range(count))


class Network(torch.nn.Module):
    """(x (B, C, H, W) fp32, t (B,), class (B,) int64) -> prediction fp32, with its variance behind it if any."""

    def __init__(self, info: ModelInfo, transformer: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer, self.dtype = transformer, dtype

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        out = self.transformer(x.to(self.dtype), timestep=t, class_labels=label, return_dict=False)
        return out[0].float()  # type: ignore[no-any-return]
