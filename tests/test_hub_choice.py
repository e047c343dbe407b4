"""Which files of a model's repository are fetched, and what its card says; no request is made."""

from pathlib import Path

import pytest

from boomgen import hub

UNET, FP16 = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
PICKLED = "unet/diffusion_pytorch_model.bin"
SHARDS = [f"unet/diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
SHARDS16 = [f"unet/diffusion_pytorch_model.fp16-0000{part}-of-00002.safetensors" for part in (1, 2)]
CONFIGS = [
    "model_index.json",
    "boomgen.yaml",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "text_encoder/model.safetensors.index.json",
]
NEVER = [
    ".gitattributes",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "sd_xl_base_1.0.safetensors",
    "flax_model.msgpack",
    "unet/model.onnx",
    "unet/diffusion_flax_model.msgpack",
    "unet/openvino_model.bin",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "checkpoint-500/unet/diffusion_pytorch_model.safetensors",
    "train.py",
    "samples/a.png",
]


@pytest.mark.parametrize(
    ("weights", "chosen", "with_pickles"),
    [
        ([UNET], [UNET], [UNET]),
        ([UNET, FP16, PICKLED], [UNET], [UNET]),
        ([FP16, PICKLED], [FP16], [FP16]),
        ([PICKLED], [], [PICKLED]),
        ([PICKLED, "unet/diffusion_pytorch_model.fp16.bin"], [], [PICKLED]),
        ([*SHARDS, *SHARDS16], SHARDS, SHARDS),
        ([*SHARDS16, PICKLED], SHARDS16, SHARDS16),
        (["unet/diffusion_pytorch_model.non_ema.safetensors", UNET], [UNET], [UNET]),
        (["diffusion_pytorch_model.bin"], [], ["diffusion_pytorch_model.bin"]),  # google/ddpm-cat-256
        ([UNET, "vae/diffusion_pytorch_model.bin"], [UNET], [UNET, "vae/diffusion_pytorch_model.bin"]),
        (["text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin"],
         ["text_encoder/model.safetensors"], ["text_encoder/model.safetensors"]),
    ],
)  # fmt: skip
def test_configs_and_each_component_s_weights_once(
    weights: list[str], chosen: list[str], with_pickles: list[str]
) -> None:
    everything = [*CONFIGS, *NEVER, *weights]
    assert hub.wanted(everything, allow_pickle=False) == CONFIGS + chosen
    assert hub.wanted(everything, allow_pickle=True) == CONFIGS + with_pickles


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A", "mit"),
        ("---\r\nlicense: [mit, cc-by-4.0]\r\n---\r\n", "mit, cc-by-4.0"),
        ("---\ntags: [a]\nlicense: other\nlicense_name: own-nc\n---", "other (own-nc)"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("# no front matter\n---\nlicense: mit\n---\n", None),
        ("---\na: &a [x]\nlicense: *a\n---\n", None),  # an alias
        ("---\n[\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_card_says(card: str | None, licence: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    assert hub.licence(tmp_path) == licence


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("own/name", ("own/name", None)),
        ("own/name@v1.0", ("own/name", "v1.0")),
        ("own/name@refs/pr/3", ("own/name", "refs/pr/3")),
        ("own/name@", None),
        ("own/name@../x", None),
        ("name", None),
        ("own/name/more", None),
    ],
)
def test_a_name_may_carry_a_revision(name: str, repo: tuple[str, str | None] | None) -> None:
    assert bool(hub.ID.fullmatch(name)) == (repo is not None)
    assert repo is None or hub.parsed(name) == repo
