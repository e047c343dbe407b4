"""The levels of a model: what its scheduler's config says of the chain it was trained on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError
from boomgen.levels import Levels, flow, respaced, spaced, variance_exploding
from boomgen.models import VARIANCE_PRESERVING, ModelInfo
from boomgen.models.folder import SCHEDULER
from boomgen.untrusted import read_json

STEPS = 100


@contextlib.contextmanager
def loading(info: ModelInfo, part: str) -> Iterator[None]:
    """diffusers and torch fail with a dozen exception types on a folder whose files do not fit each other."""
    try:
        yield
    except (MemoryError, UsageError):  # another machine may have the memory
        raise
    except Exception as err:
        if isinstance(err, OSError) and err.errno is not None:  # the disk's; diffusers uses OSError for its own too
            raise
        raise UsageError(
            f"model {info.name}: its {part} does not load ({' '.join(str(err).split())[:200]}); fetch it again"
        ) from err


def levels(info: ModelInfo, steps: int | None = None, spacing: str = "even") -> Levels:
    """The chain of `steps` levels (default: 100, or all that a distilled model knows)."""
    with loading(info, "scheduler"):
        if info.prediction in VARIANCE_PRESERVING:
            known = info.known or range(info.trained_steps)
            return respaced(trained_abar(info), [known[i] for i in _spaced(len(known), steps, spacing)])
        if info.prediction == "velocity":
            return flow(_shifted(info, _spaced(info.trained_steps, steps, "even")))
        sigmas, told = _trained_sigmas(info)
        chosen = _spaced(len(sigmas), steps, spacing)
        return variance_exploding(2 * sigmas[chosen] if info.prediction == "score" else sigmas[chosen], told[chosen])


def _spaced(trained: int, steps: int | None, spacing: str) -> list[int]:
    return spaced(trained, min(STEPS, trained) if steps is None else steps, spacing)


def _scheduler(info: ModelInfo) -> Any:
    import diffusers

    folder = info.root / "scheduler" if (info.root / "scheduler").is_dir() else info.root
    kind = str(read_json((folder / SCHEDULER).read_text(encoding="utf-8")).get("_class_name"))
    if not kind.endswith("Scheduler") or not hasattr(diffusers, kind):
        raise ValueError(f"diffusers has no {kind}")
    return getattr(diffusers, kind).from_pretrained(folder)


def trained_abar(info: ModelInfo) -> NDArray[np.float64]:
    """abar of every trained index, shape (T,), from the betas of the folder's scheduler, in float64.

    Any scheduler of diffusers that has betas will do: which solver it is matters to samplers, not to the chain.
    """
    abar = np.cumprod(1 - _scheduler(info).betas.double().numpy())
    least = 0 if info.prediction == "epsilon" else -1  # from pure noise, a predicted eps says nothing of the image
    if not (abar.shape == (info.trained_steps,) and abar[-1] > least and (np.diff(abar) < 0).all() and abar[0] < 1):
        raise ValueError(f"abar does not fall from 1 to 0 in {info.trained_steps} steps")
    return abar


def _trained_sigmas(info: ModelInfo) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sigma of every trained index, ascending, and what the network is told: sigma, or a quarter of 1000 log sigma.

    Score models (Song et al. 2021) work on [0, 1]; boomgen's states are in [-1, 1], where the same noise is twice
    that. Consistency models (Song et al. 2023) have the levels of Karras et al. 2022.
    """
    config = _scheduler(info).config
    low, high, count = config.sigma_min, config.sigma_max, info.trained_steps
    if info.prediction == "score":
        sigmas = np.geomspace(low, high, count)
        return sigmas, sigmas
    ramp = np.linspace(low ** (1 / config.rho), high ** (1 / config.rho), count) ** config.rho
    return ramp, 250 * np.log(ramp + 1e-44)


def _shifted(info: ModelInfo, indices: list[int]) -> NDArray[np.float64]:
    """sigma of evenly spaced steps i / S of a flow model, shifted towards noise as its scheduler says."""
    config, count = _scheduler(info).config, len(indices)
    even = np.arange(1, count + 1) / count
    if config.get("use_dynamic_shifting"):
        tokens = info.state[1] * info.state[2] // 4
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        shift = np.exp(slope * (tokens - config.base_image_seq_len) + config.base_shift)
        return np.asarray(shift / (shift + (1 / even - 1)))
    return np.asarray(config.shift * even / (1 + (config.shift - 1) * even))
