"""Tiny random models of every family, as diffusers itself saves them, or imported."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDE = 8  # of the latents; their VAEs halve, so images have 16
FOLDERS: dict[str, Callable[[Path], None]] = {}


def folder(build: Callable[[Path], None]) -> Callable[[Path], None]:
    FOLDERS[build.__name__] = build
    return build


def save(name: str, place: Path) -> Path:
    """The folder of that name, saved anew."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FOLDERS[name](place)
    return place


def vae(channels: int = 4, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=2 * SIDE,
        **more,
    )


def clip(place: Path, hidden: int = 16, projection: int | None = None) -> tuple[Any, Any]:
    """A text encoder and a tokenizer that knows single letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    place.mkdir(parents=True, exist_ok=True)
    (place / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or hidden,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer


def t5(hidden: int = 16) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((chr(c), -1.0 - c / 100) for c in range(97, 123))]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    config = T5Config(vocab_size=64, d_model=hidden, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def conditional_unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**(options | more))


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable(place: Path, scheduler: Any, kind: str = "StableDiffusionPipeline", **unet: Any) -> None:
    import diffusers

    text_encoder, tokenizer = clip(place / "tokenizer")
    more = {"feature_extractor": None, "safety_checker": None, "requires_safety_checker": False}
    getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=conditional_unet(**unet),
        scheduler=scheduler,
        **more,
    ).save_pretrained(place)


@folder
def sd1(place: Path) -> None:
    from diffusers import PNDMScheduler

    stable(place, PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1))


@folder
def sd2(place: Path) -> None:
    from diffusers import DDIMScheduler

    stable(place, DDIMScheduler(**STABLE, prediction_type="v_prediction", steps_offset=1))


@folder
def sd_turbo(place: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    stable(place, EulerDiscreteScheduler(**STABLE, timestep_spacing="trailing"))
    (place / "boomgen.yaml").write_text("known: [249, 499, 749, 999]\n")


@folder
def lcm(place: Path) -> None:
    from diffusers import LCMScheduler

    stable(place, LCMScheduler(**STABLE), "LatentConsistencyModelPipeline", time_cond_proj_dim=8)


@folder
def sdxl(place: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, tokenizer = clip(place / "tokenizer", hidden=8)
    second, tokenizer_2 = clip(place / "tokenizer_2", hidden=8, projection=12)
    unet = conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    StableDiffusionXLPipeline(
        vae=vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.9, 1.1, 1.2, 0.8], scaling_factor=0.13),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**STABLE),
    ).save_pretrained(place)


@folder
def dit(place: Path) -> None:
    dit_of(place, [f"class {number}, kind of" for number in range(10)])


def dit_of(place: Path, names: list[str]) -> None:
    """A DiT of these classes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=len(names),
    )
    shaken(net)
    DiTPipeline(net, vae(), DDIMScheduler(), id2label=dict(enumerate(names))).save_pretrained(place)
    index = place / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": dict(enumerate(names))}))


def shaken(net: Any) -> None:
    """Random where a fresh transformer is zero, or it would not see its input."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


@folder
def sd3(place: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, tokenizer = clip(place / "tokenizer", hidden=8, projection=8)
    second, tokenizer_2 = clip(place / "tokenizer_2", hidden=8, projection=8)
    third, tokenizer_3 = t5()
    net = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=SIDE,
    )
    shaken(net)
    StableDiffusion3Pipeline(
        net,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(shift_factor=0.06, scaling_factor=1.5),
        first,
        tokenizer,
        second,
        tokenizer_2,
        third,
        tokenizer_3,
    ).save_pretrained(place)


def flux_of(place: Path, guidance_embeds: bool, **scheduler: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    first, tokenizer = clip(place / "tokenizer", hidden=8)
    second, tokenizer_2 = t5()
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )
    shaken(net)
    schedule = FlowMatchEulerDiscreteScheduler(**scheduler)
    FluxPipeline(
        schedule, vae(shift_factor=0.1, scaling_factor=0.36), first, tokenizer, second, tokenizer_2, net
    ).save_pretrained(place)


@folder
def flux_dev(place: Path) -> None:
    flux_of(place, True, shift=3.0, use_dynamic_shifting=True)


@folder
def flux_schnell(place: Path) -> None:
    flux_of(place, False, shift=1.0)


def unet(**more: Any) -> Any:
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "sample_size": 2 * SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(options | more))


@folder
def ddpm(place: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(place)


@folder
def adm(place: Path) -> None:
    from diffusers import DDPMScheduler

    unet(out_channels=6, num_class_embeds=11).save_pretrained(place / "unet")
    DDPMScheduler(variance_type="learned_range").save_pretrained(place / "scheduler")
    (place / "boomgen.yaml").write_text("null_class: 10\n")


@folder
def patched(place: Path) -> None:
    from diffusers import DDPMScheduler

    unet(sample_size=SIDE, in_channels=12, out_channels=24, num_class_embeds=11).save_pretrained(place / "unet")
    DDPMScheduler(prediction_type="sample", variance_type="learned_range").save_pretrained(place / "scheduler")
    (place / "boomgen.yaml").write_text("null_class: 10\npatch: 2\npatch_order: p1 p2 c\nvariance: patched\n")


@folder
def ncsnpp(place: Path) -> None:
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

    net = unet(
        time_embedding_type="fourier",
        center_input_sample=True,
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
    )
    ScoreSdeVePipeline(net, ScoreSdeVeScheduler(num_train_timesteps=10, sigma_max=50.0)).save_pretrained(place)


@folder
def consistency(place: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    net = unet(num_class_embeds=10)
    ConsistencyModelPipeline(net, CMStochasticIterativeScheduler()).save_pretrained(place)


def guided_diffusion(card: str, place: Path) -> None:
    """An original state dict of azula's network, imported."""
    from boomgen.models import adm, checkpoints

    from . import ablated

    state = ablated.denoiser(card).backbone.state_dict()
    checkpoints.write(adm.convert(state, known=ablated.CARDS), place)


@folder
def ablated_classes(place: Path) -> None:
    guided_diffusion("classes", place)


@folder
def ablated_cosine(place: Path) -> None:
    guided_diffusion("cosine", place)
