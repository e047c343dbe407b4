"""The step equals the schedulers of diffusers, fed the same noise."""

from fractions import Fraction

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete

from boomgen.boomerang import boomerang
from boomgen.levels import flow, respaced, spaced, variance_exploding
from boomgen.noise import Stream

from .chains import ABAR, KEYS, Noise, curved, images, predictor


@pytest.fixture(scope="module")
def net():
    """A small random noise-predicting network; (x, trained t) -> eps."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()

    def eps(x, t):
        with torch.inference_mode():
            return unet(x, torch.tensor(float(t))).sample

    return eps


def respaced_betas(levels):
    """The betas whose cumulative products are the abar of `levels`; index i of them is level i + 1."""
    return (1 - (levels.a[1:] / levels.a[:-1]) ** 2).tolist()


def draws(noise, k):
    """What the scheduler's own draws return: z of level k - 1, ..., and level 0's, which is to have no effect."""
    return iter([noise(Stream.STEP, u) for u in range(k - 1, -1, -1)])


def ddpm(net, x0, k, levels, noise, eta, clip, monkeypatch):
    """Custom timesteps on the trained chain, fixed_small."""
    scheduler = DDPMScheduler(beta_end=0.02, variance_type="fixed_small", clip_sample=clip)
    scheduler.set_timesteps(timesteps=[int(t) for t in levels.t[:0:-1]])
    zs = draws(noise, k)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(zs))
    timesteps = scheduler.timesteps[levels.count - k :]
    x = scheduler.add_noise(x0, noise(Stream.FORWARD, 0), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    assert next(zs) is not None, "the last step draws nothing"
    return x


def ddim(net, x0, k, levels, noise, eta, clip, monkeypatch):
    """A chain of respaced betas, with the network told the trained index."""
    scheduler = DDIMScheduler(
        levels.count, trained_betas=respaced_betas(levels), clip_sample=clip, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(levels.count)
    zs = draws(noise, k)
    x = scheduler.add_noise(x0, noise(Stream.FORWARD, 0), torch.tensor([k - 1]))
    for t in scheduler.timesteps[levels.count - k :].tolist():
        eps = net(x, levels.t[t + 1])
        step = scheduler.step(eps, t, x, eta=eta, use_clipped_model_output=True, variance_noise=next(zs))
        x = step.prev_sample
    return x


def euler_ancestral(net, x0, k, levels, noise, eta, clip, monkeypatch):
    """Variance-exploding units: its state is x / a, on the sigmas of the respaced chain."""
    scheduler = EulerAncestralDiscreteScheduler(levels.count, trained_betas=respaced_betas(levels))
    scheduler.set_timesteps(levels.count)
    scheduler.set_begin_index(levels.count - k)
    zs = draws(noise, k)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(zs))
    timesteps = scheduler.timesteps[levels.count - k :]
    x = scheduler.add_noise(x0, noise(Stream.FORWARD, 0), timesteps[:1])
    for t in timesteps:
        eps = net(scheduler.scale_model_input(x, t), levels.t[int(t) + 1])
        x = scheduler.step(eps, t, x).prev_sample
    assert next(zs, None) is None
    return x


def sde_dpm_first_order(net, x0, k, levels, noise, eta, clip, monkeypatch):
    scheduler = DPMSolverMultistepScheduler(
        levels.count, trained_betas=respaced_betas(levels), algorithm_type="sde-dpmsolver++", solver_order=1
    )
    scheduler.set_timesteps(timesteps=list(range(levels.count - 1, -1, -1)))
    scheduler.set_begin_index(levels.count - k)
    zs = draws(noise, k)
    timesteps = scheduler.timesteps[levels.count - k :]
    x = scheduler.add_noise(x0, noise(Stream.FORWARD, 0), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(net(x, levels.t[int(t) + 1]), t, x, variance_noise=next(zs)).prev_sample
    return x


@pytest.mark.parametrize("rule", ["fastdpm-linear", "fastdpm-quadratic"])
@pytest.mark.parametrize(
    ("scheduler", "eta", "clip"),
    [
        (ddpm, 1.0, False),
        (ddpm, 1.0, True),
        (ddim, 1.0, False),
        (ddim, 1.0, True),
        (ddim, 0.5, False),
        (ddim, 0.5, True),
        (ddim, 0.0, False),
        (ddim, 0.0, True),
        (euler_ancestral, 1.0, False),
        (sde_dpm_first_order, 1.0, False),
    ],
)
def test_equals_diffusers(net, monkeypatch, scheduler, eta, clip, rule):
    """Boomerang 40/100 of a network is the chain of four schedulers that others wrote, fed the same noise: to 5e-5."""
    levels = respaced(ABAR, spaced(1000, 100, rule))
    k, x0 = levels.level(Fraction(40, 100)), images(1, 2)
    ours = boomerang(x0, k, levels, predictor(net, levels, clip), Noise(KEYS[:2], (3, 8, 8)), eta)
    theirs = scheduler(net, x0, k, levels, Noise(KEYS[:2], (3, 8, 8)), eta, clip, monkeypatch)
    assert (ours - x0).abs().max() > 0.1, "the chain moved the image"
    assert (ours - theirs).abs().max() < 5e-5 * max(1, ours.abs().max())


@pytest.mark.parametrize("k", [1, 15, 40])
def test_ve_levels_equal_euler(k):
    """VE levels at eta = 0 are the Euler method of EDM on the same sigmas (state x0 + sigma eps)."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(50)
    levels = variance_exploding(scheduler.sigmas.double().numpy()[-2::-1])
    predict, noise = curved(levels), Noise(KEYS, (3, 8, 8))
    scheduler.set_begin_index(50 - k)
    x = scheduler.add_noise(images(2), noise(Stream.FORWARD, 0), scheduler.timesteps[50 - k :][:1])
    for i, t in enumerate(scheduler.timesteps[50 - k :]):
        scheduler.is_scale_input_called = True  # our denoiser takes x itself
        level = k - i
        x = scheduler.step((x - predict(x, level)) / float(levels.s[level]), t, x).prev_sample
    ours = boomerang(images(2), k, levels, predict, noise, eta=0)
    assert (ours - x).abs().max() < 5e-5


@pytest.mark.parametrize("k", [1, 15, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_equal_flow_match_euler(k, shift):
    """Flow levels at eta = 0 are the ODE of SD3 and Flux, with their shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    levels = flow(scheduler.sigmas.double().numpy()[-2::-1])
    predict, noise = curved(levels), Noise(KEYS, (3, 8, 8))
    timesteps = scheduler.timesteps[50 - k :]
    scheduler.set_begin_index(50 - k)
    x = scheduler.scale_noise(images(3), timesteps[:1], noise(Stream.FORWARD, 0))
    for i, t in enumerate(timesteps):
        x = scheduler.step((x - predict(x, k - i)) / float(levels.s[k - i]), t, x).prev_sample
    ours = boomerang(images(3), k, levels, predict, noise, eta=0)
    assert (ours - x).abs().max() < 5e-5
