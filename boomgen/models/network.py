"""The network of a model: built in its precision, compiled ahead of time, counted."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boomgen.models import ModelInfo
from boomgen.models.chain import loading

NetworkCall = Callable[..., Tensor]
"""(x (B, C, H, W) fp32, t (B,) fp32, *condition) -> prediction (B, C or 2 C, H, W) fp32."""


def build(info: ModelInfo, dtype: torch.dtype, guidance: float = 1.0, weights: bool = True) -> torch.nn.Module:
    """The network with its patching and precision. Without weights its tensors have shapes only."""
    from boomgen.models import dit, flow, latent_unet, pixel_unet

    with loading(info, "network"):
        net = (_loaded(info, dtype) if weights else _shapes(info)).eval().requires_grad_(False)
        if info.family == "pixel-unet":
            return pixel_unet.Network(info, net, dtype)
        if info.family == "dit":
            return dit.Network(info, net, dtype)
        if info.family == "sd3":
            return flow.SD3Network(info, net, dtype)
        return (flow.FluxNetwork if info.family == "flux" else latent_unet.Network)(info, net, dtype, guidance)


def _folder(info: ModelInfo) -> Path:
    for part in ("unet", "transformer"):
        if (info.root / part).is_dir():
            return info.root / part
    return info.root


def _loaded(info: ModelInfo, dtype: torch.dtype) -> torch.nn.Module:
    net: torch.nn.Module = _class(info.kind).from_pretrained(
        _folder(info), torch_dtype=dtype, use_safetensors=not info.pickled, variant=info.variant
    )
    if info.lora:
        _fuse(info, net)
    return net


def _class(kind: str) -> Any:
    """The network's class in diffusers, or boomgen's own."""
    import diffusers

    if hasattr(diffusers, kind):
        return getattr(diffusers, kind)
    from boomgen.models import adm  # only where it is needed: workers wait for imports

    return getattr(adm, kind)


def _fuse(info: ModelInfo, net: Any) -> None:
    """Add a LoRA to the network's weights. Its parts for text encoders, if any, are not used."""
    import diffusers

    pipeline, part = getattr(diffusers, info.pipeline), "unet" if info.family == "latent-unet" else "transformer"
    asked = {"return_alphas": True} if info.family == "flux" else {}
    state, *alphas, metadata = pipeline.lora_state_dict(info.lora, return_lora_metadata=True, **asked)
    more = {"network_alphas": alphas[0]} if alphas else {}
    getattr(pipeline, f"load_lora_into_{part}")(state, metadata=metadata, **{part: net}, **more)
    if not net.peft_config:
        raise ValueError(f"{info.lora} holds no LoRA for the {part}")
    net.fuse_lora()
    net.unload_lora()


def _shapes(info: ModelInfo) -> torch.nn.Module:
    kind = _class(info.kind)
    with torch.device("meta"):
        net: torch.nn.Module = kind.from_config(kind.load_config(_folder(info)))
    return net


def example_inputs(info: ModelInfo, batch: int, conditions: tuple[Tensor, ...], device: str = "cpu") -> tuple[Any, ...]:
    """Inputs of the one planned shape. `conditions`: one tensor per input, a row per condition."""
    x = torch.zeros((batch, *info.state), device=device)
    first = [table[:1].expand(batch, *table.shape[1:]).contiguous().to(device) for table in conditions]
    return x, torch.ones(batch, device=device), *first


def compile_network(network: torch.nn.Module, inputs: tuple[Any, ...], package: Path) -> None:
    """Compile the network for the one planned batch shape, ahead of time, into a file that loads in milliseconds."""
    from torch._inductor import aoti_compile_and_package

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA is no news on a CPU
    with torch.no_grad():
        aoti_compile_and_package(torch.export.export(network, inputs), package_path=str(package))


def load_compiled(package: Path) -> NetworkCall:
    """The compiled network; needs no diffusers."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(package))


def flops(info: ModelInfo, conditions: tuple[Tensor, ...]) -> int:
    """Floating-point operations of the network for one image.

    Pixel-space networks are loaded and run for it, which tells at once whether they can be; the others, which may not
    fit this machine, are counted on shapes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = "meta" if info.latent else "cpu"
    network = build(info, torch.float32, weights=not info.latent).to(device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*example_inputs(info, 1, conditions, device))
    return int(counter.get_total_flops())
