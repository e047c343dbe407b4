"""Noise levels: x_k = a[k] x0 + s[k] eps for k = 0..S, with a[0] = 1 and s[0] = 0.

Variance-preserving chains are *respaced*: abar is kept at the chosen indices of the trained chain, so t_boom is an
exact index and no rounding rule is needed. Variance-exploding and flow-matching models are other values of a and s.
All arithmetic is float64; `t` is what the network is told at each level.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Levels:
    """The S levels of one chain.

    `a`, `s`, `t`: shape (S + 1,). `of_step[n]` is the level after n of the asked steps: n itself, except where a
    spacing rule named a trained index twice (FastDPM's quadratic rule does) and the repeats were dropped.
    """

    a: Floats
    s: Floats
    t: Floats
    of_step: tuple[int, ...]

    def __post_init__(self) -> None:
        signal = self.a**2 / (self.a**2 + self.s**2)
        if (self.a[0], self.s[0]) != (1, 0) or not (np.diff(signal) < 0).all():
            raise ValueError("levels must begin at the clean state and lose signal at every step")

    @property
    def count(self) -> int:
        """S, the level of pure noise."""
        return len(self.a) - 1

    @property
    def steps(self) -> int:
        """The length of the chain that was asked for; t_boom is a fraction of it."""
        return len(self.of_step) - 1

    def abar(self, k: int) -> float:
        """Signal power share at level k, a^2 / (a^2 + s^2): comparable across model families."""
        return float(self.a[k] ** 2 / (self.a[k] ** 2 + self.s[k] ** 2))

    def level(self, t_boom: Fraction) -> int:
        """The level of a t_boom in [0, 1]: exact where t_boom * steps is whole, else the nearest (halves go up)."""
        step = math.floor(t_boom * self.steps + Fraction(1, 2))
        if step == 0 and t_boom > 0:
            raise UsageError(
                f"t_boom {float(t_boom):g} of {self.steps} steps is less than half a step; "
                f"expected at least 1/{self.steps}, or more --steps"
            )
        return self.of_step[step]


def parse_t_boom(text: str) -> tuple[Fraction, int | None]:
    """'0.4' is a fraction of the chain; '40/100' is level 40 of 100, as the paper writes it, and fixes the steps.

    Decimals are converted as decimals: 0.29 of 100 steps is 29, which int(0.29 * 100) is not.
    """
    level = re.fullmatch(r"([+-]?\d{1,9})/([+-]?\d{1,9})", text.strip(), re.ASCII)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", text.strip(), re.ASCII | re.IGNORECASE)
    if not (number or (level and int(level[2]))):
        raise UsageError(f"t_boom {text!r} is not a level; expected a number in [0, 1] or a level as 40/100")
    value = Fraction(int(level[1]), int(level[2])) if level else Fraction(Decimal(text.strip()))
    fixed = int(level[2]) if level else None
    if not 0 <= value <= 1 or (fixed is not None and fixed < 1):
        raise UsageError(f"t_boom {text} is outside the chain; expected 0 (the source) to 1 (purely synthetic)")
    return value, fixed


def spaced(trained: int, steps: int, rule: str = "even") -> list[int]:
    """The trained indices (0-based, ascending, possibly repeated) of a chain of `steps` levels.

    even: round(i (T-1) / (S-1)), the spacing of Patched Diffusion's 250-step chains. fastdpm-linear and
    fastdpm-quadratic: the STEP rules of FastDPM (Kong & Ping 2021), floor(i (T-1) / (S-1)) and
    int(linspace(0, sqrt(0.8 T), S)^2).
    """
    if not 1 <= steps <= trained:
        raise UsageError(f"{steps} steps of a chain trained with {trained}; expected 1 to {trained}")
    top, last = trained - 1, max(steps - 1, 1)
    rules: dict[str, Callable[[], list[int]]] = {
        "even": lambda: [round(Fraction(i * top, last)) for i in range(steps)],
        "fastdpm-linear": lambda: [i * top // last for i in range(steps)],
        "fastdpm-quadratic": lambda: [int(root**2) for root in np.linspace(0, math.sqrt(0.8 * trained), steps)],
    }
    if rule not in rules:
        raise UsageError(f"unknown spacing {rule!r}; expected one of {', '.join(rules)}")
    return rules[rule]() if steps > 1 else [top]


def respaced(abar: Sequence[float] | Floats, indices: Sequence[int]) -> Levels:
    """A variance-preserving chain at the given indices of the trained chain (repeats are dropped).

    `abar`: shape (T,), the trained cumulative products (alpha_t of the paper), descending.
    """
    kept = sorted(set(indices))
    chosen = np.asarray(abar, np.float64)[kept]
    rank = {index: level for level, index in enumerate(kept, start=1)}
    return Levels(
        a=np.concatenate([[1.0], np.sqrt(chosen)]),
        s=np.concatenate([[0.0], np.sqrt(1 - chosen)]),
        t=np.concatenate([[0.0], np.array(kept, np.float64)]),
        of_step=(0, *(rank[index] for index in indices)),
    )


def variance_exploding(sigmas: Sequence[float] | Floats, told: Sequence[float] | Floats | None = None) -> Levels:
    """x_k = x0 + sigma_k eps; `sigmas` ascending, the network is told `told` (default: sigma)."""
    s = np.concatenate([[0.0], np.asarray(sigmas, np.float64)])
    t = s if told is None else np.concatenate([[0.0], np.asarray(told, np.float64)])
    return Levels(a=np.ones_like(s), s=s, t=t, of_step=tuple(range(len(s))))


def flow(sigmas: Sequence[float] | Floats) -> Levels:
    """Rectified flow: x_k = (1 - sigma_k) x0 + sigma_k eps; `sigmas` ascending in (0, 1], the network is told sigma."""
    s = np.concatenate([[0.0], np.asarray(sigmas, np.float64)])
    return Levels(a=1 - s, s=s, t=s, of_step=tuple(range(len(s))))
