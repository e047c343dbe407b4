"""The same chains by the families' own diffusers components and schedulers, fed the same noise.

A reference takes images, (B, 3, 16, 16) fp32 in [-1, 1], and gives images in that range. Nothing of boomgen's models is
used here: only the planned levels' indices, and the noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, schedulers
from torch import Tensor

from boomgen.noise import Stream

from . import ablated

Noise = Callable[[Stream, int], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> the network's output."""
CLASSES = ("class 3, kind of", "class 7, kind of")


@dataclass
class Case:
    """One reference run: its folder, the indices of its levels, and the noise of its rows."""

    folder: Path
    indices: list[int]  # of the trained chain, for levels 1..S
    k: int
    labels: list[int]
    guidance: float
    noise: Noise
    monkeypatch: pytest.MonkeyPatch

    @property
    def prompts(self) -> list[str]:
        return [f"a photo of a {CLASSES[label]}" for label in self.labels]

    def drawing(self, scheduler: Any) -> None:
        """Have the scheduler draw our noise: of the steps that arrive at level k - 1, ..., 1, and one to throw away."""
        draws = iter([self.noise(Stream.STEP, u) for u in range(self.k - 1, -1, -1)])
        module = getattr(schedulers, scheduler.__module__.rpartition(".")[2])
        self.monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))


def pipeline(case: Case) -> Any:
    return DiffusionPipeline.from_pretrained(case.folder)


def latents_of(vae: Any, x: Tensor) -> Tensor:
    return (vae.encode(x).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def images_of(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample


def guided(case: Case, both: Tensor) -> Tensor:
    null, told = both.chunk(2)
    return null + case.guidance * (told - null)


def ddpm_chain(case: Case, scheduler: Any, x: Tensor, predict: Predict) -> Tensor:
    """A DDPMScheduler with custom timesteps, begun at level k."""
    scheduler.set_timesteps(timesteps=case.indices[::-1])
    case.drawing(scheduler)
    timesteps = scheduler.timesteps[len(case.indices) - case.k :]
    x = scheduler.add_noise(x, case.noise(Stream.FORWARD, 0), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def ddpm_of(config: Any, **changes: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(config, **({"variance_type": "fixed_small"} | changes))


def stable(case: Case, x: Tensor) -> Tensor:
    pipe = pipeline(case)
    text, null = pipe.encode_prompt(case.prompts, "cpu", 1, case.guidance != 1)
    told = torch.cat([null, text]) if case.guidance != 1 else text

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if case.guidance == 1:
            return pipe.unet(x, t, encoder_hidden_states=told).sample
        return guided(case, pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=told).sample)

    scheduler = ddpm_of(pipe.scheduler.config, clip_sample=False)
    return images_of(pipe.vae, ddpm_chain(case, scheduler, latents_of(pipe.vae, x), predict))


def sdxl(case: Case, x: Tensor) -> Tensor:
    pipe = pipeline(case)
    text, null, pooled, null_pooled = pipe.encode_prompt(case.prompts, device="cpu", do_classifier_free_guidance=True)
    told, side = torch.cat([null, text]), x.shape[-1]
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(len(told), -1)
    more = {"text_embeds": torch.cat([null_pooled, pooled]), "time_ids": ids}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=told, added_cond_kwargs=more).sample
        return guided(case, both)

    config = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    z = (pipe.vae.encode(x).latent_dist.mode() - mean) * config.scaling_factor / std
    z = ddpm_chain(case, ddpm_of(pipe.scheduler.config, clip_sample=False), z, predict)
    return pipe.vae.decode(z * std / config.scaling_factor + mean).sample


def lcm(case: Case, x: Tensor) -> Tensor:
    from diffusers import LatentConsistencyModelPipeline

    pipe = LatentConsistencyModelPipeline.from_pretrained(case.folder, safety_checker=None)
    text, _ = pipe.encode_prompt(case.prompts, "cpu", 1, False)
    w = pipe.get_guidance_scale_embedding(torch.full((len(x),), case.guidance - 1), embedding_dim=8)
    pipe.scheduler.set_timesteps(timesteps=case.indices[::-1][len(case.indices) - case.k :])
    case.drawing(pipe.scheduler)
    z = pipe.scheduler.add_noise(latents_of(pipe.vae, x), case.noise(Stream.FORWARD, 0), pipe.scheduler.timesteps[:1])
    for t in pipe.scheduler.timesteps:
        out = pipe.unet(z, t, timestep_cond=w, encoder_hidden_states=text).sample
        z, denoised = pipe.scheduler.step(out, t, z, return_dict=False)
    return images_of(pipe.vae, denoised)


def dit(case: Case, x: Tensor) -> Tensor:
    pipe = pipeline(case)
    classes = torch.tensor([(3, 7)[label] for label in case.labels])
    told = torch.cat([torch.full_like(classes, 10), classes])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = pipe.transformer(torch.cat([x, x]), timestep=t.expand(len(told)), class_labels=told).sample
        return guided(case, both.chunk(2, dim=1)[0])

    scheduler = ddpm_of(pipe.scheduler.config, clip_sample=False)
    return images_of(pipe.vae, ddpm_chain(case, scheduler, latents_of(pipe.vae, x), predict))


def flow_chain(
    case: Case, scheduler: Any, z: Tensor, predict: Callable[[Tensor, Tensor], Tensor], **more: Any
) -> Tensor:
    """The scheduler's own Euler steps on sigma = i / S before its shift, begun at level k."""
    steps = len(case.indices)
    scheduler.set_timesteps(sigmas=np.arange(steps, 0, -1) / steps, **more)
    scheduler.set_begin_index(steps - case.k)
    timesteps = scheduler.timesteps[steps - case.k :]
    z = scheduler.scale_noise(z, timesteps[:1], case.noise(Stream.FORWARD, 0))
    for t in timesteps:
        z = scheduler.step(predict(z, t), t, z).prev_sample
    return z


def sd3(case: Case, x: Tensor) -> Tensor:
    pipe = pipeline(case)
    text, null, pooled, null_pooled = pipe.encode_prompt(case.prompts, None, None, device="cpu")
    told, pools = torch.cat([null, text]), torch.cat([null_pooled, pooled])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([z, z])
        return guided(case, pipe.transformer(both, told, pools, t.expand(len(both))).sample)

    return images_of(pipe.vae, flow_chain(case, pipe.scheduler, latents_of(pipe.vae, x), predict))


def flux(case: Case, x: Tensor) -> Tensor:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    pipe = pipeline(case)
    text, pooled, text_ids = pipe.encode_prompt(case.prompts, None, device="cpu")
    z = latents_of(pipe.vae, x)
    batch, channels, side, _ = z.shape
    ids = pipe._prepare_latent_image_ids(batch, side // 2, side // 2, "cpu", torch.float32)
    told = torch.full((batch,), case.guidance) if pipe.transformer.config.guidance_embeds else None

    def predict(z: Tensor, t: Tensor) -> Tensor:
        packed = pipe._pack_latents(z, batch, channels, side, side)
        t = t.expand(batch) / 1000
        out = pipe.transformer(packed, text, pooled, t, ids, text_ids, told).sample
        return pipe._unpack_latents(out, 2 * side, 2 * side, 2)

    mu = calculate_shift((side // 2) ** 2) if pipe.scheduler.config.use_dynamic_shifting else None
    return images_of(pipe.vae, flow_chain(case, pipe.scheduler, z, predict, **({"mu": mu} if mu else {})))


def pixels(case: Case, x: Tensor) -> Tensor:
    """DDPM, as it is and clipped as its config says."""
    pipe = pipeline(case)
    return ddpm_chain(case, ddpm_of(pipe.scheduler.config), x, lambda x, t: pipe.unet(x, t).sample)


def _parts(case: Case) -> tuple[Any, Any]:
    from diffusers import DDPMScheduler, UNet2DModel

    return UNet2DModel.from_pretrained(case.folder / "unet"), DDPMScheduler.from_pretrained(case.folder / "scheduler")


def adm(case: Case, x: Tensor) -> Tensor:
    """Classes, and the variance that the network learned."""
    unet, scheduler = _parts(case)
    labels = torch.tensor(case.labels)
    return ddpm_chain(case, scheduler, x, lambda x, t: unet(x, t, class_labels=labels).sample)


def ablated_classes(case: Case, x: Tensor) -> Tensor:
    """azula's network, with the variance that it learned by diffusers."""
    from diffusers import DDPMScheduler

    unet, labels = ablated.denoiser("classes").backbone, torch.tensor(case.labels)
    scheduler = DDPMScheduler(beta_end=0.02, variance_type="learned_range")
    return ddpm_chain(case, scheduler, x, lambda x, t: unet(x, t.expand(len(x)), y=labels))


def ablated_cosine(case: Case, x: Tensor) -> Tensor:
    """azula's denoiser, which tells and clips the clean image."""
    from diffusers import DDPMScheduler

    net = ablated.denoiser("cosine")
    told = {"prediction_type": "sample", "clip_sample": False}
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", **told)
    return ddpm_chain(case, scheduler, x, lambda x, t: net(x, t).mean)


def patched(case: Case, x: Tensor) -> Tensor:
    """Space-to-depth as TensorFlow has it, x0-prediction, a reversed sigmoid of the variance, guidance."""
    unet, scheduler = _parts(case)
    labels = torch.tensor(case.labels)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        batch, channels, side, _ = x.shape
        folded = x.reshape(batch, channels, side // 2, 2, side // 2, 2).permute(0, 3, 5, 1, 2, 4)
        folded = folded.reshape(batch, 4 * channels, side // 2, side // 2)

        def unfold(y: Tensor) -> Tensor:
            return y.reshape(batch, 2, 2, channels, side // 2, side // 2).permute(0, 3, 4, 1, 5, 2).reshape(x.shape)

        told = unet(folded, t, class_labels=labels).sample
        null = unet(folded, t, class_labels=torch.full_like(labels, 10)).sample
        mean = unfold(null[:, :12] + case.guidance * (told - null)[:, :12])
        return torch.cat([mean, 2 * (1 - unfold(told[:, 12:]).sigmoid()) - 1], dim=1)

    return ddpm_chain(case, scheduler, x, predict)


def ncsnpp(case: Case, x: Tensor) -> Tensor:
    """Predictor and corrector on [0, 1], for one image: the corrector takes the mean norm of its batch."""
    pipe = pipeline(case)
    scheduler, steps = pipe.scheduler, len(case.indices)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    asked = [(stream, u) for u in range(case.k, 0, -1) for stream in (Stream.CORRECT, Stream.STEP)]
    draws = iter([case.noise(stream, u - (stream == Stream.STEP)) for stream, u in asked])
    module = getattr(schedulers, scheduler.__module__.rpartition(".")[2])
    case.monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))
    x = (x + 1) / 2 + scheduler.discrete_sigmas[case.k - 1] * case.noise(Stream.FORWARD, 0)
    for level in range(case.k - 1, -1, -1):
        sigma = scheduler.discrete_sigmas[level].expand(len(x))
        x = scheduler.step_correct(pipe.unet(x, sigma).sample, x).prev_sample
        step = scheduler.step_pred(pipe.unet(x, sigma).sample, (level + 0.5) / (steps - 1), x)
        x = step.prev_sample
    return 2 * step.prev_sample_mean - 1


def consistency(case: Case, x: Tensor) -> Tensor:
    """One call at sigma_k, whatever noise the scheduler would add after it."""
    pipe = pipeline(case)
    scheduler, labels = pipe.scheduler, torch.tensor(case.labels)
    scheduler.set_timesteps(timesteps=[len(case.indices) - case.k])
    case.monkeypatch.setattr(schedulers.scheduling_consistency_models, "randn_tensor", lambda *_, **__: torch.zeros(1))
    (t,) = scheduler.timesteps
    x = x + scheduler.sigmas[0] * case.noise(Stream.FORWARD, 0)
    out = pipe.unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
    return scheduler.step(out, t, x).prev_sample
