"""What a model is told of an image: a class, or a prompt as its text encoders give it.

Conditions are tables, one per input of the network, with a row per condition: row NULL is what guidance steers away
from, row UNLABELLED is for images without a label, the rest are the data set's labels in order. Prompts with captions
have no table: their rows are encoded batch by batch.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boomgen.errors import UsageError
from boomgen.models import ModelInfo
from boomgen.models.chain import loading

NULL, UNLABELLED, LABELLED = 0, 1, 2
Conditions = tuple[Tensor, ...]
Encode = Callable[[list[str]], tuple[Conditions, Conditions]]
"""Prompts -> what no prompt is to the network, and what each of them is: a row per prompt."""
BATCH = 16  # prompts per call of the text encoders
PARTS = re.compile(r"\{(class|caption)\}")
CAPTION = "{caption}"


def of_classes(info: ModelInfo, classes: tuple[int, ...] | None) -> Conditions:
    """The table of a model that is told classes, or nothing. `classes`: the model's class of each label."""
    none = info.null_class if info.null_class is not None else 0
    return (torch.tensor([none, none, *(classes or ())], dtype=torch.int64),)


def prompt_of(template: str, class_name: str = "", caption: str = "") -> str:
    """'a {class}: {caption}' with class and caption, or cut before the first that is not there."""
    known = {"class": class_name, "caption": caption}
    parts = PARTS.split(template)
    lacking = next((i for i in range(1, len(parts), 2) if not known[parts[i]]), len(parts))
    told = [known[part] if i % 2 else part for i, part in enumerate(parts[:lacking])]
    return "".join(told).strip() if lacking < len(parts) else "".join(told)


def prompts_of(template: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The prompt of each row of the tables."""
    each = classes if "{class}" in template and CAPTION not in template else ()
    return ("", prompt_of(template), *(prompt_of(template, name) for name in each))


def encode_prompts(info: ModelInfo, prompts: tuple[str, ...], dtype: str, device: str) -> Conditions:
    """The tables of these prompts. The text encoders are dropped afterwards."""
    encode = text_encoder(info, dtype, device)
    rows = [encode(list(prompts[i : i + BATCH])) for i in range(1, len(prompts), BATCH)]
    null = rows[0][0]
    tables = [torch.cat([null[i][:1], *(row[1][i] for row in rows)]).cpu() for i in range(len(null))]
    return tuple(table.contiguous() for table in tables)


def text_encoder(info: ModelInfo, dtype: str, device: str) -> Encode:
    """The model's text encoders, as its own diffusers pipeline calls them; on a CPU in fp32. Results have the dtype of
    the network."""
    import diffusers

    kept = getattr(torch, dtype)

    kind = getattr(diffusers, info.pipeline)
    unused = dict.fromkeys(("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder"))
    accepted = kind._get_signature_types()
    with loading(info, "text encoder"):
        pipeline = kind.from_pretrained(
            info.root,
            torch_dtype=torch.float32 if device == "cpu" else kept,
            use_safetensors=not info.pickled,
            variant=info.variant,
            **{name: None for name in unused if name in accepted},
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def encode(prompts: list[str]) -> tuple[Conditions, Conditions]:
        null, told = _encoded(info, pipeline, prompts, device)
        return tuple(table.to(kept) for table in null), tuple(table.to(kept) for table in told)

    return encode


def _encoded(info: ModelInfo, pipeline: Any, prompts: list[str], device: str) -> tuple[Conditions, Conditions]:
    """Embeddings of no prompt and of the prompts: the hidden states, and the pooled ones where a model takes them."""
    if info.family == "flux":
        text, pooled, _ = pipeline.encode_prompt(prompts, prompts, device=device)
        return (torch.zeros_like(text), torch.zeros_like(pooled)), (text, pooled)
    options: dict[str, Any] = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if info.pipeline in ("StableDiffusionXLPipeline",):
        text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, **options)
        return (null, null_pooled), (text, pooled)
    if info.family == "sd3":
        text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, **options)
        return (null, null_pooled), (text, pooled)
    text, null = pipeline.encode_prompt(prompts, **options)
    return (null,), (text,)


def save(conditions: Conditions, path: Path) -> None:
    """Freeze the tables beside the plan, so that no worker needs a text encoder."""
    from safetensors.torch import save_file

    save_file({str(number): table for number, table in enumerate(conditions)}, path)


def load(path: Path) -> Conditions:
    """What `save` wrote."""
    from safetensors.torch import load_file

    found = load_file(path)
    return tuple(found[str(number)] for number in range(len(found)))


def check_guidance(info: ModelInfo, guidance: float) -> None:
    """Refuse guidance where a model has nothing to steer away from."""
    if guidance != 1 and not (info.text or info.null_class is not None):
        raise UsageError(f"--guidance {guidance:g} with model {info.name}, which knows no class for none; drop it")
