"""Boomerang local sampling: Algorithm 1 of Luzi et al., "Boomerang: Local sampling on image manifolds using
diffusion models" (TMLR 2024), for every family of levels.

An image is noised to level t_boom of the forward process, then the reverse process is run back to level 0. A small
t_boom returns nearly the same image; at t_boom = 1 nothing of it is left.
"""

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from boomgen.levels import Levels
from boomgen.noise import Stream

PredictX0 = Callable[[Tensor, int], Tensor]
"""(x_k, k) -> the predicted clean state, of the same shape."""
Noise = Callable[[Stream, int], Tensor]
"""(stream, step) -> standard normal noise of the state's shape."""


def forward(x0: Tensor, k: int, levels: Levels, noise: Noise) -> Tensor:
    """x_k = a_k x0 + s_k eps (eq. 3). At the last level the source's term is dropped: however small, it would leak."""
    eps = noise(Stream.FORWARD, 0)
    if k == levels.count:
        return float(levels.s[k]) * eps
    return float(levels.a[k]) * x0 + float(levels.s[k]) * eps


def step(x_t: Tensor, x0h: Tensor, t: int, u: int, levels: Levels, eta: float, noise: Noise) -> Tensor:
    """From level t to level u < t, given the predicted clean state x0h.

    eta = 1 is the paper's reverse step (variance beta-tilde), eta = 0 is DDIM, between them FastDPM's kappa.
    """
    a, s = levels.a, levels.s
    if u == 0:
        return x0h
    tau = 1 - float(a[t] * s[u] / (a[u] * s[t])) ** 2
    e = (x_t - float(a[t]) * x0h) / float(s[t])
    x_u = float(a[u]) * x0h + float(s[u]) * math.sqrt(1 - eta**2 * tau) * e
    if eta:
        x_u = x_u + float(s[u]) * eta * math.sqrt(tau) * noise(Stream.STEP, u)
    return x_u


def chain(
    x0: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0
) -> Iterator[Tensor]:
    """The states x_k, x_{k-1}, ..., x_0 of one Boomerang run, shape (B, ...), fp32. k = 0 gives x0 itself."""
    x = forward(x0, k, levels, noise) if k else x0
    yield x
    for t in range(k, 0, -1):
        x = step(x, predict_x0(x, t), t, t - 1, levels, eta, noise)
        yield x


def boomerang(x0: Tensor, k: int, levels: Levels, predict_x0: PredictX0, noise: Noise, eta: float = 1.0) -> Tensor:
    """A sample near x0, shape (B, ...): noised to level k of 0..S and brought back (Algorithm 1)."""
    for x in chain(x0, k, levels, predict_x0, noise, eta):  # noqa: B007 - the last state is the sample
        pass
    return x
