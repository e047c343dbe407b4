"""What tests of the chain share: families of levels, keyed noise, and denoisers in closed form."""

import math

import numpy as np
import torch

from boomgen.keys import noise_key
from boomgen.levels import Levels, flow, respaced, spaced, variance_exploding
from boomgen.noise import normal

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
FAMILIES = {
    "vp": lambda steps: respaced(ABAR, spaced(1000, steps)),
    "ve": lambda steps: variance_exploding(np.geomspace(0.01, 50, steps)),
    "flow": lambda steps: flow(np.linspace(0, 1, steps + 1)[1:]),
}
KEYS = [noise_key(b"boomerang" + bytes(23), f"image {i}", 0) for i in range(4)]


class Noise:
    """The package's keyed noise for a batch, which remembers the addresses that were asked for."""

    def __init__(self, keys, shape):
        self.keys, self.shape, self.asked = keys, shape, []

    def __call__(self, stream, step):
        self.asked.append((stream, step))
        return torch.from_numpy(normal(self.keys, stream, step, self.shape))


def curved(levels: Levels):
    """A fixed denoiser that is not linear, mixes the pixels of an image and knows its level."""

    def predict_x0(x, k):
        scale = float(levels.a[k] + levels.s[k])
        return torch.tanh(x.roll(1, -1) / scale + 0.3 * x / scale + 0.1 * math.sin(k))

    return predict_x0


def images(seed, batch=4, shape=(3, 8, 8)):
    return torch.rand((batch, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predictor(net, levels, clip):
    def predict_x0(x, k):
        x0h = (x - float(levels.s[k]) * net(x, levels.t[k])) / float(levels.a[k])
        return x0h.clamp(-1, 1) if clip else x0h

    return predict_x0
