"""Keyed Gaussian noise: every number is addressed by (key, draw, stream, step), never by the order of calls.

Philox-4x64 (Salmon et al. 2011) has a 128-bit key and a 256-bit counter. The key is the row's; the three upper counter
words are step, stream and draw, and the lowest word counts blocks within one draw. Two addresses therefore share
numbers only if they are equal. torch's CPU generator is no alternative: it keeps 32 bits of its seed.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
Key = bytes


class Stream(IntEnum):
    """What a draw is for. A new use takes a new number; numbers are never given a second meaning."""

    FORWARD = 0  # eps of the forward process; its step is 0, so it is the same at every t_boom
    STEP = 1  # z of the reverse step that arrives at level `step`
    CORRECT = 2  # z of the Langevin step at level `step`


def address(key: Key, draw: int, stream: int, step: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Philox key (2 words) and counter (4 words) at which the numbers of one address begin."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a noise key of {len(key)} bytes, expected {KEY_BYTES}")
    return np.frombuffer(key, "<u8").astype(np.uint64), np.array([0, step, stream, draw], np.uint64)


class _Generator(threading.local):
    """One Philox per thread, re-addressed for each draw: ten times cheaper than a new one."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.normal = np.random.Generator(self.bits).standard_normal
        self.state = self.bits.state

    def fill(self, out: NDArray[np.float32], key: Key, draw: int, stream: int, step: int) -> None:
        inner = self.state["state"]
        inner["key"], inner["counter"] = address(key, draw, stream, step)
        self.bits.state = self.state
        self.normal(dtype=np.float32, out=out)


_generator = _Generator()


def normal(
    keys: Sequence[Key], stream: Stream, step: int, shape: tuple[int, ...], draw: int = 0
) -> NDArray[np.float32]:
    """Standard normal noise of shape (len(keys), *shape): row i depends on keys[i] and the address alone."""
    out = np.empty((len(keys), *shape), np.float32)
    for row, key in zip(out, keys, strict=True):
        _generator.fill(row, key, draw, stream, step)
    return out
