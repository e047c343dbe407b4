"""ADM, the pixel-space UNets of guided-diffusion (Dhariwal & Nichol 2021): azula's network, under diffusers' names.

`pixel_unet` recognises and calls it. A checkpoint tells neither the schedule nor the heads of attention, so it must be
one of the published networks, which azula lists; no two of them have weights of equal names and shapes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from boomgen.errors import UsageError
from boomgen.models.checkpoints import Imported, State, plain

MARK = "time_embed.0.weight"
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LICENCE = "MIT, if these are OpenAI's weights"
Cards = Mapping[str, dict[str, Any]]


class GuidedDiffusionUNet(ModelMixin, ConfigMixin):
    """(x (B, 3, H, W), t (B,), class (B,) int64 or None) -> eps, with the share of the variance in [-1, 1] behind it.

    `network`: what azula's card of it says beside the size and the number of classes. What is told of t and class stays
    in fp32 at any precision, as in guided-diffusion.
    """

    _keep_in_fp32_modules = ["time_embed", "emb_layers", "label_emb"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int,
        num_class_embeds: int | None,
        network: dict[str, Any],
        in_channels: int = 3,
        out_channels: int = 6,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        made = _azula().make_model(
            image_size=sample_size,
            num_classes=num_class_embeds,
            image_channels=in_channels,
            learn_var=out_channels > in_channels,
            **network,
        )
        self.unet = made.backbone

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool = False) -> tuple[Tensor]:
        return (self.unet(x, t, y=class_labels),)


def _azula() -> Any:
    try:
        from azula.plugins import adm
    except ImportError as err:
        raise UsageError(
            "networks of guided-diffusion need azula, which is not installed; pip install 'boomgen[adm]'"
        ) from err
    return adm


def cards() -> Cards:
    """What azula knows of each published network, by its name for it."""
    plugin = _azula()
    from azula.plugins.utils import load_cards

    found = {name: card.config for name, card in load_cards(plugin).items()}
    # guided-diffusion's own flags are --image_size 512; azula's 256 puts the attention elsewhere than the weights do
    found["imagenet_512x512_cond"]["image_size"] = 512
    return found


def network_of(config: dict[str, Any]) -> GuidedDiffusionUNet:
    """The network of a card, with shapes for weights."""
    apart = ("image_size", "num_classes", "discrete_schedule", "discrete_steps")
    rest = {name: value for name, value in config.items() if name not in apart}
    with torch.device("meta"):
        network: GuidedDiffusionUNet = GuidedDiffusionUNet(config["image_size"], config["num_classes"], rest)
    return network


def card_of(state: State, known: Cards) -> str:
    """The name of the one card whose network has weights of these names and shapes.

    Raises:
        ValueError: none has, or several.
    """
    found = _shapes(state)
    odd = {name: found ^ _shapes(network_of(config).unet.state_dict()) for name, config in known.items()}
    fitting = [name for name in odd if not odd[name]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{' and '.join(fitting)} are alike in it")
    nearest = min(odd, key=lambda name: len(odd[name]))
    raise ValueError(f"nearest is {nearest}, but for {', '.join(sorted({name for name, _ in odd[nearest]}))}")


def _shapes(state: State) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in state.items()}


def convert(state: State, size: int | None = None, known: Cards | None = None) -> Imported:
    """The network of an original state dict; `known`: by default azula's cards.

    Raises:
        ValueError: it is none of the known networks.
        UsageError: `size` is given and not the side of its images, or azula is not installed.
    """
    known = known or cards()
    name = card_of(state, known)
    config = known[name]
    if size not in (None, config["image_size"]):
        raise UsageError(f"--size {size}; expected none: {name} has images of {config['image_size']} pixels")
    network = network_of(config)
    network.unet.load_state_dict({name: plain(name, tensor) for name, tensor in state.items()}, assign=True)
    scheduler = DDPMScheduler(
        num_train_timesteps=config["discrete_steps"],
        beta_end=0.02,
        beta_schedule=BETAS[config["discrete_schedule"]],
        variance_type="learned_range",
    )
    licence = {"licence": LICENCE} if name.startswith("imagenet") else {}
    return Imported(network, scheduler, {"title": f"{name} of guided-diffusion", **licence})
