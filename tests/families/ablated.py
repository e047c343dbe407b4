"""ADM's networks as azula itself builds them, tiny and random."""

from typing import Any

import torch

from .folders import SIDE, shaken

SHARED: dict[str, Any] = {
    "image_size": 2 * SIDE,
    "num_channels": 32,
    "channel_mult": [1, 2],
    "attention_resolutions": [SIDE],
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "discrete_steps": 1000,
}
CARDS: dict[str, dict[str, Any]] = {
    "classes": SHARED | {"num_classes": 10, "discrete_schedule": "linear"},
    "cosine": SHARED | {"num_classes": None, "discrete_schedule": "cosine", "use_new_attention_order": True},
}


def denoiser(card: str) -> Any:
    """azula's AblatedDenoiser, whose time is the trained index."""
    from azula.plugins import adm
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    made = adm.make_model(**CARDS[card]).eval().requires_grad_(False)
    shaken(made.backbone)

    betas = "squaredcos_cap_v2" if card == "cosine" else "linear"
    abar = (1 - DDPMScheduler(beta_schedule=betas, beta_end=0.02).betas.double()).cumprod(0)
    made.schedule = lambda t: (abar[t.long()].sqrt(), (1 - abar[t.long()]).sqrt())
    made.sigmas = made.sigmas.double() * (1 + 1e-6)  # it looks for the first not less than sigma, and is rounded
    return made
