"""Pixel-space UNets: DDPM (whole or on patches, with or without classes), NCSN++, consistency models, ADM."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from boomgen.models import VARIANCE_PRESERVING, ModelInfo
from boomgen.models.folder import SCHEDULER, Config, Folder, Own

KINDS = ("UNet2DModel", "GuidedDiffusionUNet")  # the second is boomgen's own, in adm
SCORE, CONSISTENCY = "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler"


class _UNet(Config):
    sample_size: int = Field(ge=1, le=2**14)
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    num_class_embeds: int | None = Field(default=None, ge=1)
    time_embedding_type: str = "positional"


class _Scheduler(Config):
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    num_train_timesteps: int = Field(default=1000, ge=1, le=10**6)
    snr: float | None = None
    sigma_min: float | None = None


def recognise(folder: Folder, index: dict[str, Any]) -> ModelInfo:
    """A network beside a scheduler that tells how it was trained."""
    unet_file, scheduler_file = folder.part("unet") / "config.json", folder.part("scheduler") / SCHEDULER
    unet, scheduler = folder.checked(_UNet, unet_file), folder.checked(_Scheduler, scheduler_file)
    kind, own = str(folder.read(unet_file)["_class_name"]), folder.own
    trained = str(folder.read(scheduler_file).get("_class_name"))
    prediction: Any = {SCORE: "score", CONSISTENCY: "consistency"}.get(trained, scheduler.prediction_type)
    _check(folder, unet, scheduler, prediction)
    channels, rest = divmod(unet.in_channels, own.patch**2)
    if rest or channels not in (1, 3):
        raise folder.refuse(
            f"has {unet.in_channels} channels in patches of {own.patch}; expected 1 (grey) or 3 (RGB) for each pixel "
            "of a patch"
        )
    class_count = (unet.num_class_embeds or 0) - (own.null_class is not None)
    _check_classes(folder, own, unet, class_count)
    weights, size = folder.weights("unet"), unet.sample_size * own.patch
    return ModelInfo(
        name=folder.name,
        path=folder.path,
        sha256=folder.fingerprint([unet_file, *weights, scheduler_file]),
        pickled=weights[0].suffix == ".bin",
        variant=folder.variant("unet"),
        family="pixel-unet",
        kind=kind,
        size=size,
        channels=channels,
        state=(channels, size, size),
        patch=own.patch,
        patch_order=own.patch_order,
        prediction=prediction,
        variance="none" if unet.out_channels == unet.in_channels else own.variance,
        clip=prediction == "consistency" or (prediction in VARIANCE_PRESERVING and scheduler.clip_sample),
        classes=own.classes,
        class_count=class_count,
        null_class=own.null_class,
        trained_steps=scheduler.num_train_timesteps,
        sampler="one-call" if prediction == "consistency" else "ancestral",
        snr=scheduler.snr if prediction == "score" else None,
        sigma_min=(scheduler.sigma_min or 0.002) if prediction == "consistency" else None,
        licence=str(own.licence),
        why=(f"unet/ is a {kind} of {unet.in_channels} channels", f"scheduler/ is a {trained}: {prediction}"),
    )


def _check(folder: Folder, unet: _UNet, scheduler: _Scheduler, prediction: str) -> None:
    """What would run and give wrong images is refused."""
    fourier = unet.time_embedding_type == "fourier"
    if fourier != (prediction == "score"):
        raise folder.refuse(
            f"has a {unet.time_embedding_type} time embedding and predicts {prediction}; expected fourier with a "
            f"{SCORE}, and positional with all others"
        )
    if prediction not in (*VARIANCE_PRESERVING, "score", "consistency"):
        raise folder.refuse(f"predicts {prediction}; expected {', '.join(VARIANCE_PRESERVING)}")
    if scheduler.thresholding or scheduler.clip_sample_range != 1.0:
        raise folder.refuse("clips by thresholding or to another range than [-1, 1]; expected neither")
    if unet.out_channels not in (unet.in_channels, 2 * unet.in_channels):
        raise folder.refuse(
            f"has {unet.out_channels} output and {unet.in_channels} input channels; expected as many, or twice as many "
            "with a learned variance"
        )


def _check_classes(folder: Folder, own: Own, unet: _UNet, class_count: int) -> None:
    if own.null_class is not None and own.null_class != class_count:
        raise folder.refuse(
            f"says in boomgen.yaml that class {own.null_class} is none, of {unet.num_class_embeds or 0} classes; "
            "expected the last one"
        )
    if own.classes and len(own.classes) != class_count:
        raise folder.refuse(f"names {len(own.classes)} classes in boomgen.yaml; expected {class_count}")


class Network(torch.nn.Module):
    """(x (B, C, H, W) fp32, t (B,) fp32, class (B,) int64) -> prediction fp32, with its variance behind it if any."""

    def __init__(self, info: ModelInfo, unet: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last)
        self.patch, self.order, self.dtype = info.patch, info.patch_order, dtype
        self.conditional = info.class_count > 0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = to_patches(x, self.patch, self.order).to(self.dtype, memory_format=torch.channels_last)
        out = self.unet(x, t, class_labels=label if self.conditional else None, return_dict=False)[0].float()
        parts = out.split(x.shape[1], dim=1)
        return torch.cat([from_patches(part, self.patch, self.order) for part in parts], dim=1)


def to_patches(x: Tensor, patch: int, order: str) -> Tensor:
    """(B, C, H, W) to (B, C p p, H / p, W / p), with channels ordered as torch (c p1 p2) or TensorFlow (p1 p2 c)."""
    if patch == 1:
        return x
    if order == "c p1 p2":
        return F.pixel_unshuffle(x, patch)
    batch, channels, height, width = x.shape
    x = F.pixel_unshuffle(x, patch).view(batch, channels, patch**2, height // patch, width // patch)
    return x.transpose(1, 2).flatten(1, 2)


def from_patches(x: Tensor, patch: int, order: str) -> Tensor:
    """The inverse of `to_patches`."""
    if patch == 1:
        return x
    if order == "p1 p2 c":
        x = x.reshape(len(x), patch**2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(x, patch)
