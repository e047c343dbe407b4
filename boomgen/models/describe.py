"""What a model is, for people: what was recognised and why, and how much noise each t_boom means."""

from fractions import Fraction
from typing import Any

from boomgen.models import chain, inspect


def described(name: str) -> dict[str, Any]:
    """All that is known of a preset, a folder or a hub id.

    Raises:
        UsageError: as `inspect`.
    """
    info = inspect(name, allow_pickle=True)  # it runs nothing
    levels = chain.levels(info)
    tenths = [n for n in range(1, 10) if n * levels.steps >= 5]  # a short chain has no level so near to the source
    noise = {n: 1 - levels.abar(levels.level(Fraction(n, 10))) for n in tenths}
    return {
        "family": info.family,
        "size": f"{info.size}x{info.size}",
        "channels": info.channels,
        "state": "x".join(map(str, info.state)),
        "prediction": info.prediction,
        "sampler": info.sampler,
        "told": "prompts" if info.text else f"{info.class_count} classes" if info.class_count else "nothing",
        "guidance": f"{info.guidance:g}" if info.guidance != 1 else "none",
        "levels": ", ".join(map(str, info.known)) or f"all {info.trained_steps}",
        "licence": info.licence,
        "sha256": info.sha256,
        "why": "; ".join(info.why),
        "t_boom": "  ".join(f"{n / 10:<6}" for n in noise).rstrip(),
        "noise power": "  ".join(f"{power:.4f}" for power in noise.values()),
    }
