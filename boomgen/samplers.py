"""Ways back from level k to the clean state. The first is Algorithm 1's; the others change how near a sample is to its
source, so a plan names its sampler.

A deterministic way back keeps more of the source than Algorithm 1: for Gaussian data the correlation is sqrt(rho)
where Algorithm 1's is rho.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from boomgen.boomerang import Noise, PredictX0, Sampler, ancestral, step
from boomgen.levels import Levels
from boomgen.noise import Stream

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
Gradient = Callable[[Tensor, int], Tensor]
"""(x_k, k) -> gradient of log p(class | x_k) with respect to x_k, of the same shape."""
SNR = 0.16
"""Signal-to-noise ratio of the Langevin corrector, as DLSM (Chao et al. 2022) has it; other models state their own."""


def learned(x: Tensor, k: int, levels: Levels, predict: Predict, noise: Noise, eta: float = 1.0) -> Tensor:
    """Algorithm 1 with the variance that the network tells (Nichol & Dhariwal 2021, eq. 15)."""
    for t in range(k, 0, -1):
        x0h, share = predict(x, t)
        x = step(x, x0h, t, levels, eta, noise, share)
    return x


def renoise(x: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0) -> Tensor:
    """Every step noises its predicted clean state anew: multistep sampling of (latent) consistency models."""
    for t in range(k, 0, -1):
        x = predict_x0(x, t)
        if t > 1:
            x = float(levels.a[t - 1]) * x + float(levels.s[t - 1]) * noise(Stream.STEP, t - 1)
    return x


def one_call(x: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0) -> Tensor:
    """The clean state that the network predicts at once: the last step of a consistency model."""
    return predict_x0(x, k)


def dpm(x: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic; its last step is of first order."""
    before: tuple[float, Tensor] | None = None
    for t in range(k, 1, -1):
        x0h = predict_x0(x, t)
        a_t, s_t, a_u, s_u = (float(value) for value in (levels.a[t], levels.s[t], levels.a[t - 1], levels.s[t - 1]))
        h = math.log(a_u * s_t / (s_u * a_t)) if a_t else math.inf
        data = x0h if before is None else x0h + h / (2 * before[0]) * (x0h - before[1])
        x = s_u / s_t * x - a_u * math.expm1(-h) * data
        before = (h, x0h)
    return predict_x0(x, 1)


def predictor_corrector(
    x: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0, snr: float = SNR
) -> Tensor:
    """One Langevin step at each level, then one of reverse diffusion (Song et al. 2021, algorithms 2 and 4).

    Variance-exploding levels only. The Langevin step's size follows from the norms of each sample, not from their mean
    over a batch: a sample must not depend on its neighbours.
    """
    mean = x
    for t in range(k, 0, -1):
        z = noise(Stream.CORRECT, t)
        score = (predict_x0(x, t) - x) / float(levels.s[t]) ** 2
        size = 2 * (snr * _norm(z) / _norm(score)) ** 2
        x = x + size * score + (2 * size).sqrt() * z
        gap = float(levels.s[t]) ** 2 - float(levels.s[t - 1]) ** 2
        mean = x + gap * (predict_x0(x, t) - x) / float(levels.s[t]) ** 2
        x = mean + math.sqrt(gap) * noise(Stream.STEP, t - 1) if t > 1 else mean
    return mean


def guided(predict_x0: PredictX0, gradient: Gradient, levels: Levels, scale: float = 1.0) -> PredictX0:
    """Classifier guidance (Dhariwal & Nichol 2021): the score plus `scale` times a classifier's gradient."""

    def predict(x: Tensor, k: int) -> Tensor:
        if not levels.a[k]:  # pure noise tells no class
            return predict_x0(x, k)
        return predict_x0(x, k) + scale * float(levels.s[k]) ** 2 / float(levels.a[k]) * gradient(x, k)

    return predict


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return norm


SAMPLERS: dict[str, Sampler] = {
    "ancestral": ancestral,
    "learned": learned,
    "renoise": renoise,
    "one-call": one_call,
    "dpm++": dpm,
    "predictor-corrector": predictor_corrector,
}
"""All but `learned` take a predict_x0; that takes a predict, which tells the variance too."""


def sampler_of(name: str, snr: float | None = None) -> Sampler:
    """The way back that a plan names."""
    if name == "predictor-corrector" and snr is not None:
        return functools.partial(predictor_corrector, snr=snr)
    return SAMPLERS[name]
