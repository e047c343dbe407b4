"""Boomerang local sampling: Algorithm 1 of Luzi et al., "Boomerang: Local sampling on image manifolds using
diffusion models" (TMLR 2024), for every family of levels.

An image is noised to level t_boom of the forward process, then the reverse process is run back to level 0. A small
t_boom returns nearly the same image; at t_boom = 1 nothing of it is left.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from boomgen.levels import Levels
from boomgen.noise import Stream

PredictX0 = Callable[[Tensor, int], Tensor]
"""(x_k, k) -> the predicted clean state, of the same shape."""
Noise = Callable[[Stream, int], Tensor]
"""(stream, step) -> standard normal noise of the state's shape."""
Sampler = Callable[[Tensor, int, Levels, Any, Noise, float], Tensor]
"""(x_k, k, levels, predict_x0, noise, eta) -> the clean state at the end of a way back from level k."""


def forward(x0: Tensor, k: int, levels: Levels, noise: Noise) -> Tensor:
    """x_k = a_k x0 + s_k eps (eq. 3). At the last level the source's term is dropped: however small, it would leak."""
    eps = noise(Stream.FORWARD, 0)
    if k == levels.count:
        return float(levels.s[k]) * eps
    return float(levels.a[k]) * x0 + float(levels.s[k]) * eps


def step(
    x_t: Tensor, x0h: Tensor, t: int, levels: Levels, eta: float, noise: Noise, share: Tensor | None = None
) -> Tensor:
    """x_u from x_t for u = t - 1, given the predicted clean state x0h.

    eta = 1 is the paper's reverse step (variance beta-tilde), eta = 0 is DDIM, between them FastDPM's kappa. `share`
    moves the variance from beta-tilde (0) to beta (1) on a log scale, for networks that tell it.
    """
    u = t - 1
    if u == 0:
        return x0h
    a_t, s_t, a_u, s_u = (float(value) for value in (levels.a[t], levels.s[t], levels.a[u], levels.s[u]))
    tau = 1 - (a_t * s_u / (a_u * s_t)) ** 2
    e = (x_t - a_t * x0h) / s_t
    x_u = a_u * x0h + s_u * math.sqrt(1 - eta**2 * tau) * e
    wider = 1.0 if share is None else (s_t / s_u) ** share
    return x_u + s_u * eta * math.sqrt(tau) * wider * noise(Stream.STEP, u) if eta else x_u


def ancestral(x: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0) -> Tensor:
    """The reverse process from level k, one step per level."""
    for t in range(k, 0, -1):
        x = step(x, predict_x0(x, t), t, levels, eta, noise)
    return x


def boomerang(
    x0: Tensor,
    k: int,
    levels: Levels,
    predict_x0: PredictX0,
    noise: Noise,
    eta: float = 1.0,
    sampler: Sampler = ancestral,
) -> Tensor:
    """A sample near x0, shape (B, ...), fp32: noised to level k of 0..S and brought back (Algorithm 1)."""
    if k == 0:
        return x0
    return sampler(forward(x0, k, levels, noise), k, levels, predict_x0, noise, eta)


def cascade(
    x0: Tensor,
    passes: int,
    k: int,
    levels: Levels,
    predict_x0: PredictX0,
    noise_of: Callable[[int], Noise],
    eta: float = 1.0,
    sampler: Sampler = ancestral,
) -> Iterator[Tensor]:
    """The state after each of `passes` Boomerangs, each begun from the last one's state as it is, never rounded.

    Pass p, from 0, takes its noise from noise_of(p), so it does not depend on how many follow.
    """
    for number in range(passes):
        x0 = boomerang(x0, k, levels, predict_x0, noise_of(number), eta, sampler)
        yield x0
