"""The ways back beside Algorithm 1: closed forms, and equality with the schedulers of diffusers, fed the same noise."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, ScoreSdeVeScheduler
from diffusers.schedulers import scheduling_ddpm, scheduling_lcm, scheduling_sde_ve

from boomgen.boomerang import ancestral, boomerang, forward
from boomgen.job import SAMPLER_NAMES
from boomgen.levels import respaced, spaced, variance_exploding
from boomgen.noise import Stream
from boomgen.samplers import SAMPLERS, SNR, dpm, guided, learned, one_call, predictor_corrector, renoise

from .chains import ABAR, FAMILIES, KEYS, Noise, curved, images
from .test_boomerang_diffusers import draws, respaced_betas

SHAPE = (3, 8, 8)
V = 0.25  # variance of Gaussian data


def gaussian(levels):
    """The denoiser of data N(0, v)."""
    return lambda x, k: levels.a[k] * V / (levels.a[k] ** 2 * V + levels.s[k] ** 2) * x


def feed(monkeypatch, module, zs):
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(zs))


# --------------------------------------------------------------------------------------------------- learned variance


def telling(levels, v):
    """A denoiser that tells v in [-1, 1] as its share of the variance."""
    predict = curved(levels)
    return lambda x, k: (predict(x, k), (v(x, k) + 1) / 2)


@pytest.mark.parametrize("rule", ["even", "fastdpm-quadratic"])
@pytest.mark.parametrize("k", [2, 40, 100])
def test_learned_equals_ddpm_with_learned_range(monkeypatch, rule, k):
    """share = (v + 1) / 2: diffusers' v runs from -1, beta-tilde, to 1, beta."""
    levels = respaced(ABAR, spaced(1000, 100, rule))
    k = min(k, levels.count)

    def v(x, k):
        return torch.tanh(x.roll(1, -2) + math.sin(k))

    noise = Noise(KEYS, SHAPE)
    start = forward(images(1), k, levels, noise)
    ours = learned(start, k, levels, telling(levels, v), noise)
    scheduler = DDPMScheduler(beta_end=0.02, variance_type="learned_range", clip_sample=False, prediction_type="sample")
    scheduler.alphas_cumprod = torch.from_numpy(ABAR)  # its own are fp32, four digits of 1 - abar near the source
    scheduler.set_timesteps(timesteps=[int(t) for t in levels.t[:0:-1]])
    feed(monkeypatch, scheduling_ddpm, draws(noise, k))
    x, predict = start, curved(levels)
    for level, t in zip(range(k, 0, -1), scheduler.timesteps[levels.count - k :], strict=True):
        x = scheduler.step(torch.cat([predict(x, level), v(x, level)], dim=1), t, x).prev_sample
    assert (ours - ancestral(start, k, levels, predict, noise)).abs().max() > 1e-3, "the variance matters"
    assert (ours - x).abs().max() < 5e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_share_of_none_is_algorithm_1_to_the_bit(family, eta):
    levels = FAMILIES[family](20)
    plain = boomerang(images(2), 12, levels, curved(levels), Noise(KEYS, SHAPE), eta)
    for share in (torch.zeros(4, *SHAPE), None):
        predict, noise = curved(levels), Noise(KEYS, SHAPE)
        told = boomerang(images(2), 12, levels, lambda x, k: (predict(x, k), share), noise, eta, learned)  # noqa: B023
        assert torch.equal(told, plain)


# ---------------------------------------------------------------------------------------------------- DPM-Solver++(2M)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 20])
def test_dpm_equals_the_multistep_solver(k):
    levels = respaced(ABAR, spaced(1000, 20))
    predict = curved(levels)
    scheduler = DPMSolverMultistepScheduler(
        levels.count, trained_betas=respaced_betas(levels), prediction_type="sample", solver_order=2
    )
    scheduler.set_timesteps(timesteps=list(range(levels.count - 1, -1, -1)))
    scheduler.set_begin_index(levels.count - k)
    start = forward(images(3), k, levels, Noise(KEYS, SHAPE))
    x = start
    for level in range(k, 0, -1):
        x = scheduler.step(predict(x, level), level - 1, x).prev_sample
    assert (dpm(start, k, levels, predict, None) - x).abs().max() < 5e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_dpm_of_gaussian_data(family):
    """A linear map of x_k, so corr(x0, x0') = corr(x0, x_k) = sqrt(rho) exactly. The variance of the data is kept to
    second order: four times the steps, a sixteenth of the error, down to that of level 1, which VE chains share."""

    def excess(sampler, steps):
        levels = FAMILIES[family](steps)
        k, one = steps // 2, torch.ones(1, dtype=torch.float64)
        slope = float(sampler(one, k, levels, gaussian(levels), None, 0.0))
        assert slope > 0
        assert sampler(-3 * one, k, levels, gaussian(levels), None, 0.0).item() == pytest.approx(-3 * slope)
        return abs(slope**2 * (levels.a[k] ** 2 * V + levels.s[k] ** 2) / V - 1)

    assert excess(dpm, 100) < 0.6 * excess(ancestral, 100), "DDIM is of first order"
    assert excess(dpm, 400) < max(excess(dpm, 100) / 12, 5e-4)


def test_dpm_starts_where_nothing_of_the_image_is_left():
    """Flow's last level has a = 0; the step from there is the exact one of first order."""
    levels = FAMILIES["flow"](4)
    assert levels.a[4] == 0
    x, predict = images(4), curved(levels)
    first = float(levels.s[3]) * x + float(levels.a[3]) * predict(x, 4)
    assert torch.allclose(dpm(x, 4, levels, predict, None), dpm(first, 3, levels, predict, None), atol=1e-6)
    assert torch.isfinite(dpm(x, 4, levels, predict, None)).all()


# ----------------------------------------------------------------------------------------------------------- few steps


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_renoise_equals_lcm(monkeypatch, k):
    """At the four levels of latent consistency models. Their scheduler mixes x_k in by c_skip, at most 4e-8 here."""
    known = [259, 499, 759, 999]
    levels, noise = respaced(ABAR, known), Noise(KEYS, SHAPE)
    predict = curved(levels)
    scheduler = LCMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=known[::-1])
    scheduler.set_begin_index(4 - k)
    assert max(scheduler.get_scalings_for_boundary_condition_discrete(t)[0] for t in known) < 4e-8
    feed(monkeypatch, scheduling_lcm, draws(noise, k))
    start = forward(images(5), k, levels, noise)
    x = start
    for level in range(k, 0, -1):
        x = scheduler.step(predict(x, level), known[level - 1], x).prev_sample
    assert (renoise(start, k, levels, predict, noise) - x).abs().max() < 1e-5


def test_one_call_is_what_the_network_says():
    levels = FAMILIES["ve"](40)
    noise = Noise(KEYS, SHAPE)
    x = boomerang(images(6), 30, levels, curved(levels), noise, 1.0, one_call)
    assert torch.equal(x, curved(levels)(forward(images(6), 30, levels, noise), 30))
    assert set(noise.asked) == {(Stream.FORWARD, 0)}


# ------------------------------------------------------------------------------------------------- predictor-corrector

VE = variance_exploding(np.geomspace(0.01, 50, 30))


def score_sde(start, k, noise, monkeypatch):
    """ScoreSdeVeScheduler's chain: a correction, then a prediction, at each level."""
    scheduler = ScoreSdeVeScheduler(VE.count, snr=SNR, sigma_min=0.01, sigma_max=50)
    predict, x = curved(VE), start
    for level in range(k, 0, -1):
        variance, u = float(VE.s[level]) ** 2, level - 1
        feed(monkeypatch, scheduling_sde_ve, iter([noise(Stream.CORRECT, level), noise(Stream.STEP, u)]))
        x = scheduler.step_correct((predict(x, level) - x) / variance, x).prev_sample
        told = (u + 0.5) / (VE.count - 1)  # the scheduler takes the whole part of this times (S - 1)
        x, mean = scheduler.step_pred((predict(x, level) - x) / variance, told, x, return_dict=False)
    return mean


@pytest.mark.parametrize("k", [1, 2, 15, 30])
def test_predictor_corrector_equals_score_sde_for_one_image(monkeypatch, k):
    noise = Noise(KEYS[:1], SHAPE)
    start = forward(images(7, 1), k, VE, noise)
    ours, theirs = predictor_corrector(start, k, VE, curved(VE), noise), score_sde(start, k, noise, monkeypatch)
    assert (ours - theirs).abs().max() < 5e-5


def test_predictor_corrector_knows_no_neighbours(monkeypatch):
    """The scheduler's norms are means over the batch, so there an image depends on what it is with."""
    x0, k = images(8) * torch.tensor([1.0, 30, 60, 90]).view(4, 1, 1, 1), 15
    batch, alone = Noise(KEYS, SHAPE), Noise(KEYS[:1], SHAPE)
    many, one = forward(x0, k, VE, batch), forward(x0[:1], k, VE, alone)
    ours = predictor_corrector(many, k, VE, curved(VE), batch)[:1]
    assert (ours - predictor_corrector(one, k, VE, curved(VE), alone)).abs().max() < 1e-6
    theirs = score_sde(many, k, batch, monkeypatch)[:1]
    assert (theirs - score_sde(one, k, alone, monkeypatch)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- classifier guidance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_gaussian_is_the_posterior_mean(family, scale):
    """Data N(0, v) seen as y = x0 + N(0, w). x0 given x_k is N(m, c), so p(y | x_k) is N(m, c + w); with scale 1 the
    guided prediction is the mean of x0 given both, m + c / (c + w) (y - m)."""
    levels, y, w = FAMILIES[family](20), 0.7, 0.4
    predict, x = gaussian(levels), images(9).double()
    for k in (1, 10, 19):
        a, s = levels.a[k], levels.s[k]
        c = V * s**2 / (a**2 * V + s**2)

        def gradient(x, k, c=c):
            return (y - predict(x, k)) / (c + w) * predict(torch.ones_like(x), k)

        m = predict(x, k)
        expected = m + scale * c / (c + w) * (y - m)
        assert torch.allclose(guided(predict, gradient, levels, scale)(x, k), expected, atol=1e-12)


def test_guidance_where_nothing_of_the_image_is_left():
    """With a = 0 the gradient is 0 whatever the class: no guidance, and no division by it."""
    levels = FAMILIES["flow"](4)
    predict = guided(curved(levels), lambda x, k: torch.zeros_like(x), levels)
    assert torch.equal(predict(images(1), 4), curved(levels)(images(1), 4))


# --------------------------------------------------------------------------------------------------------- all of them


def test_the_names_that_a_job_may_give_are_those_there_are():
    assert set(SAMPLER_NAMES) == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_noise_is_drawn_twice(name):
    noise, predict = Noise(KEYS, SHAPE), curved(VE)
    told = (lambda x, k: (predict(x, k), None)) if name == "learned" else predict
    x = boomerang(images(3), 12, VE, told, noise, 1.0, SAMPLERS[name])
    assert torch.isfinite(x).all()
    assert len(noise.asked) == len(set(noise.asked))
