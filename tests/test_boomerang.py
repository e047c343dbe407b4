"""Boomerang is Algorithm 1: right in closed form, local, and a function of its own row."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    UNet2DModel,
)

from boomgen.boomerang import boomerang, forward
from boomgen.keys import noise_key
from boomgen.levels import Levels, flow, respaced, spaced, variance_exploding
from boomgen.noise import Stream, normal

from .chains import ABAR, FAMILIES, KEYS, Noise, curved, images, predictor

# -------------------------------------------------------------------------------- closed form: Gaussian data N(0, v)

N = 100_000
V = 0.4


def gaussian(levels: Levels, v: float):
    """The exact posterior mean E[x0 | x_k] for data N(0, v)."""
    gain = levels.a * v / (levels.a**2 * v + levels.s**2)
    return lambda x, k: float(gain[k]) * x


def exact_law(levels: Levels, k: int, eta: float, v: float) -> tuple[float, float]:
    """x0' = slope * x0 + N(0, variance), by propagating the affine-Gaussian law of the chain in float64.

    Written from q(x_u | x_t, x0) of DDIM (eq. 7 of Song et al. 2021) for general a and s: variance eta^2 beta-tilde,
    and what remains of s_u^2 along the predicted noise.
    """
    a, s = levels.a, levels.s
    slope, variance = (a[k] if k < levels.count else 0.0), s[k] ** 2
    for t in range(k, 0, -1):
        u = t - 1
        gain = a[t] * v / (a[t] ** 2 * v + s[t] ** 2)
        beta_tilde = (s[u] / s[t]) ** 2 * (s[t] ** 2 - (a[t] / a[u]) ** 2 * s[u] ** 2)
        along = math.sqrt(s[u] ** 2 - eta**2 * beta_tilde) / s[t]
        factor = a[u] * gain + along * (1 - a[t] * gain)
        slope, variance = factor * slope, factor**2 * variance + eta**2 * beta_tilde
    return slope, variance


def monte_carlo(levels, k, eta, v):
    """Boomerang of N scalars: (x0, x0') in float64."""
    x0 = math.sqrt(v) * torch.from_numpy(normal([KEYS[0]], Stream.FORWARD, 0, (N,), draw=9))
    x = boomerang(x0, k, levels, gaussian(levels, v), Noise([KEYS[1]], (N,)), eta)
    return x0[0].double().numpy(), x[0].double().numpy()


def rho(levels: Levels, k: int) -> float:
    """corr(x0, x_k)^2 of Gaussian data, a^2 v / (a^2 v + s^2)."""
    return float(levels.a[k] ** 2 * V / (levels.a[k] ** 2 * V + levels.s[k] ** 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [50, 150, 250])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_correlation_in_closed_form(family, k, eta):
    """corr(x0, x0') = rho at eta = 1, sqrt(rho) at eta = 0, and rho^((1 + eta^2) / 2) between (FastDPM's kappa); and
    the samples keep the distribution of the data.

    In the variable x / sqrt(a^2 v + s^2) a fine chain is an Ornstein-Uhlenbeck process of rate eta^2 / 2 in log rho,
    started at correlation sqrt(rho).
    """
    levels = FAMILIES[family](500)
    x0, x = monte_carlo(levels, k, eta, V)
    assert np.corrcoef(x0, x)[0, 1] == pytest.approx(rho(levels, k) ** ((1 + eta**2) / 2), abs=0.01)
    assert x.std() / x0.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_chains_converge_to_the_closed_form(family, fraction, eta):
    """Twice the steps, half the error: in the correlation, in var(x0') = v and in var(x0' | x0) = v (1 - corr^2)."""
    errors = []
    for steps in (250, 500, 1000):
        levels = FAMILIES[family](steps)
        k = round(fraction * steps)
        slope, variance = exact_law(levels, k, eta, V)
        total = slope**2 * V + variance
        corr = rho(levels, k) ** ((1 + eta**2) / 2)
        errors.append([slope * math.sqrt(V / total) - corr, total / V - 1, variance / V - (1 - corr**2)])
    coarse, fine, finest = np.abs(errors)
    assert (finest < 0.015).all()
    floor = 5e-4  # the jump from level 1 to 0, which VE chains of any length share
    assert (fine <= np.maximum(0.6 * coarse, floor)).all()
    assert (finest <= np.maximum(0.6 * fine, floor)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("steps", "k"), [(20, 1), (20, 2), (20, 12), (20, 20), (100, 40)])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_exact_law_of_coarse_chains(family, steps, k, eta):
    """Every chain, coarse ones too, has the law that its levels give: slope and variance to 4 standard errors."""
    levels = FAMILIES[family](steps)
    slope, variance = exact_law(levels, k, eta, V)
    x0, x = monte_carlo(levels, k, eta, V)
    measured = (x0 @ x) / (x0 @ x0)
    assert measured == pytest.approx(slope, abs=4 * math.sqrt(variance / (x0 @ x0)))
    assert (x - measured * x0).var() == pytest.approx(variance, rel=4 * math.sqrt(2 / N))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deterministic_reverse_is_more_local(family):
    """corr falls from eta = 0 to eta = 1, strictly, at each level: the sampler changes the anonymity."""
    levels = FAMILIES[family](100)
    for k in (20, 40, 80):
        laws = [exact_law(levels, k, eta, V) for eta in (0, 0.25, 0.5, 0.75, 1)]
        corr = [slope * math.sqrt(V / (slope**2 * V + variance)) for slope, variance in laws]
        assert (np.diff(corr) < 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_of_one_source_spread_with_the_noise(family):
    """Eq. 7 of the paper: the variance over variants of ONE image grows with 1 - abar; here it is v (1 - rho^2),
    around the mean rho x0. 20 variants, keyed as the package keys them, of one image of 4096 pixels."""
    levels = FAMILIES[family](250)
    source = math.sqrt(V) * torch.from_numpy(normal([KEYS[0]], Stream.FORWARD, 0, (4096,)))
    keys = [noise_key(b"s" * 32, "one image", variant) for variant in range(20)]
    spreads, powers = [], []
    for k in (12, 50, 87, 125, 162):
        x = boomerang(source.expand(20, -1), k, levels, gaussian(levels, V), Noise(keys, (4096,))).double().numpy()
        slope, variance = exact_law(levels, k, 1.0, V)
        spread = x.var(axis=0, ddof=1).mean()
        assert spread == pytest.approx(variance, rel=4 * math.sqrt(2 / (19 * 4096)))
        assert spread == pytest.approx(V * (1 - rho(levels, k) ** 2), abs=0.055 * V)
        line = np.polyfit(source[0].numpy(), x.mean(axis=0), 1)[0]
        assert line == pytest.approx(slope, abs=4 * math.sqrt(variance / V / 20 / 4096))
        assert line == pytest.approx(rho(levels, k), abs=0.02)
        spreads.append(spread)
        powers.append(1 - levels.abar(k))
    assert (np.diff(powers) > 0).all()
    assert (np.diff(spreads) > 0).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_families_are_one_chain_in_other_units(eta):
    """At equal signal-to-noise VP, VE and flow levels give the same sample of the same denoiser, seen as x / a."""
    vp = respaced(ABAR, spaced(1000, 50))
    sigma = vp.s[1:] / vp.a[1:]
    samples = []
    for levels in (vp, variance_exploding(sigma), flow(sigma / (1 + sigma))):
        predict = lambda x, k, a=levels.a: torch.tanh(x.roll(1, -1) / float(a[k] * (1 + sigma[k - 1])))  # noqa: E731
        samples.append(boomerang(images(0), 30, levels, predict, Noise(KEYS, (3, 8, 8)), eta))
    assert torch.allclose(samples[0], samples[1], atol=2e-5)
    assert torch.allclose(samples[0], samples[2], atol=2e-5)


# ------------------------------------------------------------------------------------- the ends of the chain, noise


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_t_boom_0_is_the_identity(family, eta):
    """The input itself comes back; no noise is drawn, no network asked."""

    def never(*_):
        raise AssertionError("t_boom = 0 asks for nothing")

    x0 = images(0)
    bits = x0.numpy().tobytes()
    assert boomerang(x0, 0, FAMILIES[family](20), never, never, eta) is x0
    assert x0.numpy().tobytes() == bits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_t_boom_1_forgets_the_source(family, eta):
    """Level S is purely synthetic, bit for bit, though abar_S is not 0; level S - 1 still knows its source."""
    levels = FAMILIES[family](20)
    run = lambda seed, k: boomerang(images(seed), k, levels, curved(levels), Noise(KEYS, (3, 8, 8)), eta)  # noqa: E731
    assert torch.equal(run(1, 20), run(2, 20))
    assert not torch.equal(run(1, 19), run(2, 19))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_noise_does_not_depend_on_t_boom(family, eta):
    """The forward noise is one for every t_boom, z of a level is one for every chain through it, and the last step
    draws none. So a sweep over t_boom shows the effect of t_boom alone."""
    levels = FAMILIES[family](20)
    eps = Noise(KEYS, (3, 8, 8))(Stream.FORWARD, 0)
    for k in range(1, 21):
        noise = Noise(KEYS, (3, 8, 8))
        states = []

        def watched(x, t, states=states, levels=levels):
            states.append(x)
            return curved(levels)(x, t)

        last = boomerang(images(0), k, levels, watched, noise, eta)
        assert len(states) == k
        assert noise.asked == [(Stream.FORWARD, 0), *((Stream.STEP, u) for u in range(k - 1, 0, -1) if eta)]
        signal = float(levels.a[k]) * images(0) if k < 20 else 0
        assert torch.allclose((states[0] - signal) / float(levels.s[k]), eps, rtol=1e-5, atol=1e-4)
        assert torch.equal(last, curved(levels)(states[-1], 1)), "the last state is the predicted clean one"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_equation_3(family):
    """x_k = a_k x0 + s_k eps, computed here in float64."""
    levels, noise = FAMILIES[family](20), Noise(KEYS, (3, 8, 8))
    x0, eps = images(0).double().numpy(), noise(Stream.FORWARD, 0).double().numpy()
    for k in range(1, 20):
        x_k = forward(images(0), k, levels, noise)
        assert x_k.dtype == torch.float32
        assert np.allclose(x_k.numpy(), levels.a[k] * x0 + levels.s[k] * eps, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------- neighbour independence


@pytest.fixture(scope="module", params=[(torch.float32, 32), (torch.bfloat16, 8)], ids=["fp32", "bf16"])
def rows_of(request):
    """Run the named rows, where None is padding, as one batch of a real network in fp32 or bf16."""
    dtype, size = request.param
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = unet.eval().to(dtype)
    levels = respaced(ABAR, spaced(1000, 10))
    shape = (3, size, size)
    sources = images(5, 4, shape)

    def eps(x, t):
        with torch.inference_mode():
            return unet(x.to(dtype), torch.tensor(float(t))).sample.float()

    def run(rows):
        x0 = torch.stack([torch.zeros(shape) if row is None else sources[row] for row in rows])
        keys = [bytes(16) if row is None else KEYS[row] for row in rows]
        return boomerang(x0, 4, levels, predictor(eps, levels, clip=True), Noise(keys, shape))

    return run


ROWS = {  # a batch of each size, and others of that size which hold row 2 alone, moved, repeated
    3: ([0, 1, 2], [2, None, None], [1, 2, 0], [None, 2, 2]),
    4: ([0, 1, 2, 3], [2, 0, 3, 1], [2, None, None, None], [None, None, None, 2], [2, 2, 1, None]),
    6: ([0, 1, 2, 3, 1, 0], [2, None, None, None, None, None], [3, 0, 1, None, 2, 2]),
}


@pytest.mark.parametrize(("threads", "batch"), [(1, 3), (1, 4), (1, 6), (2, 4)])
def test_a_row_does_not_depend_on_its_neighbours(rows_of, threads, batch):
    """At one batch shape, alone in a padded batch, in a full one, moved, repeated: the same bits. The state stays
    fp32 around a half-precision network."""
    torch.set_num_threads(threads)
    seen = {}
    for rows in ROWS[batch]:
        result = rows_of(rows)
        assert result.dtype == torch.float32
        for row, image in zip(rows, result, strict=True):
            seen.setdefault(row, []).append(image.numpy().tobytes())
    assert all(len(set(images)) == 1 for row, images in seen.items() if row is not None)
    assert len({images[0] for images in seen.values()}) == len(seen), "different rows differ"


def test_threads_change_little(rows_of):
    """What does hold for any number of threads: the samples are the same to 1e-3 after four steps."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(rows_of([0, 1, 2, 3]))
    assert max((result - results[0]).abs().max() for result in results) < 1e-3
