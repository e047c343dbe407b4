"""Checkpoints of the DDPM networks of pytorch_diffusion (P. Esser) and FastDPM, as networks of diffusers.

Both name and shape the weights of Ho et al. 2020 alike, and so do DDIM's checkpoints. The network follows from the
shapes; only the side of its images cannot be told by them.
"""

from itertools import count
from typing import Any

import torch
from torch import Tensor

from boomgen.errors import UsageError
from boomgen.models.checkpoints import Imported, State, plain

MARK = "conv_in.weight"
SIZES = {4: 32, 5: 64, 6: 256}
"""Side of the images by number of resolutions: CIFAR-10; CelebA; LSUN and CelebA-HQ."""
RENAMED = {
    ".temb.dense.0.": ".time_embedding.linear_1.",
    ".temb.dense.1.": ".time_embedding.linear_2.",
    ".norm_out.": ".conv_norm_out.",
    ".down.": ".down_blocks.",
    ".up.": ".up_blocks.",
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.attn_1.": ".mid_block.attentions.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".block.": ".resnets.",
    ".attn.": ".attentions.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".temb_proj.": ".time_emb_proj.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm.": ".group_norm.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".proj_out.": ".to_out.0.",
}


def convert(state: State, size: int | None = None) -> Imported:
    """The UNet2DModel of an original state dict.

    `size`: side of the images, pixels; by default what the original networks of as many resolutions had.

    Raises:
        KeyError: a weight is missing that tells the shape of the network.
        UsageError: the size is not known, or cannot be halved as often as the network does it.
    """
    import diffusers

    depth = _number(state, "down.{}.block.0.conv1.weight")
    widths = [len(state[f"down.{level}.block.0.conv1.weight"]) for level in range(depth)]
    attended = [f"down.{level}.attn.0.q.weight" in state for level in range(depth)]
    config = {
        "sample_size": _size(size, depth),
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": len(state["conv_out.weight"]),
        "block_out_channels": widths,
        "layers_per_block": _number(state, "down.0.block.{}.conv1.weight"),
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "attention_head_dim": None,  # one head
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,  # and so one column and one row of zeros at the far sides
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    weights = {_renamed(name, depth): _weight(name, tensor) for name, tensor in state.items()}
    with torch.device("meta"):  # nothing is drawn that the weights replace at once
        network: Any = diffusers.UNet2DModel(**config)
    network.load_state_dict(weights, assign=True)
    scheduler: Any = diffusers.DDPMScheduler(beta_end=0.02, variance_type="fixed_small", clip_sample=False)
    return Imported(network, scheduler, {})


def _number(state: State, name: str) -> int:
    """How many weights there are of this name, counted from 0; at least one is needed."""
    found = next(i for i in count() if name.format(i) not in state)
    if not found:
        raise KeyError(name.format(0))
    return found


def _size(size: int | None, depth: int) -> int:
    known = SIZES.get(depth) if size is None else size
    if known is None:
        raise UsageError(f"a network of {depth} resolutions does not tell the side of its images; give it by --size")
    if known < 1 or known % 2 ** (depth - 1):
        raise UsageError(
            f"--size {known}; expected a multiple of {2 ** (depth - 1)}: the network has {depth} resolutions"
        )
    return known


def _renamed(name: str, depth: int) -> str:
    if name.startswith("up."):  # the original counts from the finest resolution, diffusers from the coarsest
        _, level, rest = name.split(".", 2)
        name = f"up.{depth - 1 - int(level)}.{rest}"
    name = f".{name}"
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name[1:]


def _weight(name: str, tensor: Tensor) -> Tensor:
    """In attention, convolutions of 1x1 are matrices."""
    tensor = plain(name, tensor)
    return tensor.flatten(1) if ".attn" in name and tensor.dim() == 4 else tensor
