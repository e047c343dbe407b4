"""The denoiser: a model on given levels, between images and what Boomerang works on."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from boomgen.levels import Levels
from boomgen.models import ModelInfo
from boomgen.models.conditions import LABELLED, NULL, UNLABELLED, Conditions
from boomgen.models.network import NetworkCall

SIGMA_DATA = 0.5  # of consistency models (Song et al. 2023, appendix C)


class Coder(Protocol):
    """Between images, uint8 (B, H, W, C), and the state in which noise is added, fp32 (B, ...)."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, state: Tensor) -> Tensor: ...


class Pixels:
    """The state of pixel-space models: the image itself, in [-1, 1]."""

    def __init__(self, device: str) -> None:
        self.device = device

    def encode(self, images: Tensor) -> Tensor:
        return images.to(self.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()

    def decode(self, state: Tensor) -> Tensor:
        return state


class Predicted(NamedTuple):
    """What a network says of x_k. `share` is where the reverse step's variance lies between beta-tilde (0) and beta (1)
    on a log scale; None where the network does not tell it."""

    x0: Tensor
    share: Tensor | None


class Denoiser:
    """A model as Boomerang needs it. States are fp32, shape (B, *info.state)."""

    def __init__(
        self,
        info: ModelInfo,
        levels: Levels,
        network: NetworkCall,
        coder: Coder,
        conditions: Conditions,
        guidance: float = 1.0,
    ) -> None:
        self.info, self.levels, self.network, self.coder = info, levels, network, coder
        self.conditions, self.guidance = conditions, guidance

    def encode(self, images: Tensor) -> Tensor:
        """Images, uint8 (B, H, W, C), to the state in which noise is added."""
        return self.coder.encode(images)

    def decode(self, state: Tensor) -> Tensor:
        """A state to images, uint8 (B, H, W, C)."""
        pixels = self.coder.decode(state).clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def prepare(self, labels: Tensor) -> Conditions:
        """Labels of the data set, int64 (B,), -1 for none, to the condition that `predict_x0` takes."""
        told = len(self.conditions[0]) > LABELLED
        rows = torch.where((labels < 0) | (not told), UNLABELLED, labels + LABELLED)
        return tuple(table[rows] for table in self.conditions)

    def predict_x0(self, x: Tensor, k: int, condition: Conditions) -> Tensor:
        """The predicted clean state at level k, clipped where the model clips."""
        return self.predict(x, k, condition).x0

    def predict(self, x: Tensor, k: int, condition: Conditions) -> Predicted:
        """The same, with what the network says of the variance of the step from k."""
        t = torch.full((len(x),), float(self.levels.t[k]), device=x.device)
        out, share = self._guided(self._input(x, k), t, condition).tensor_split([x.shape[1]], dim=1)
        x0 = self._x0(x, k, out)
        return Predicted(x0.clamp(-1, 1) if self.info.clip else x0, self._share(share))

    def _guided(self, x: Tensor, t: Tensor, condition: Conditions) -> Tensor:
        """The network's output, moved away from that for the null condition; its variance stays the conditional one."""
        out = self.network(x, t, *condition)
        if self.guidance == 1:
            return out
        null = self.network(x, t, *(table[NULL].expand(len(x), *table.shape[1:]) for table in self.conditions))
        channels = self.info.state[0]
        guided = null[:, :channels] + self.guidance * (out - null)[:, :channels]
        return torch.cat([guided, out[:, channels:]], dim=1)

    def _input(self, x: Tensor, k: int) -> Tensor:
        if self.info.prediction == "score":
            return (x + 1) / 2
        if self.info.prediction == "consistency":
            return x / math.hypot(float(self.levels.s[k]), SIGMA_DATA)
        return x

    def _x0(self, x: Tensor, k: int, out: Tensor) -> Tensor:
        a, s = float(self.levels.a[k]), float(self.levels.s[k])
        match self.info.prediction:
            case "epsilon":
                return (x - s * out) / a
            case "v_prediction":
                return a * x - s * out
            case "velocity":
                return x - s * out
            case "score":  # of x on [0, 1], whose noise is s / 2
                return x + s * s / 2 * out
            case "consistency":
                least = self.info.sigma_min or 0.0
                skip = SIGMA_DATA**2 / ((s - least) ** 2 + SIGMA_DATA**2)
                return skip * x + (s - least) * SIGMA_DATA / math.hypot(s, SIGMA_DATA) * out
            case _:
                return out

    def _share(self, out: Tensor) -> Tensor | None:
        match self.info.variance:
            case "adm":
                return (out + 1) / 2
            case "patched":
                return 1 - out.sigmoid()
            case _:
                return None
