"""What a model is told, and choices that do not fit it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boomgen import models
from boomgen.cli import main
from boomgen.job import Job, Launch
from boomgen.models import conditions
from boomgen.models.describe import described
from boomgen.models.network import build
from boomgen.models.pixel_unet import from_patches, to_patches
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.verify import verify
from boomgen.worker import Worker

from ..conftest import Complaint
from ..source_checks import picture
from .folders import FOLDERS, save


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    for number in range(4):
        (root / "cat").mkdir(exist_ok=True)
        (root / "dog").mkdir(exist_ok=True)
        (root / ("cat", "dog")[number % 2] / f"{number}.png").write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def saved(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else save(name, folder / name)


def planned(source: Path, model: Path, out: Path, **more: Any) -> RunDir:
    job = {"mode": "augment", "dataset": str(source), "model": str(model), "t_boom": "0.5", "steps": 4, "batch_size": 4}
    exact = {"dtype": "float32"}  # on any CPU, as the references it is held to
    return prepare(Job(**(job | exact | more)), Launch(device="cpu", out=str(out)))


def shard(run: RunDir) -> bytes:
    Worker(run).make_shard(0)
    return (run.shard(0) / "data.tar").read_bytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_described(name: str, folder: Path) -> None:
    found = described(str(saved(folder, name)))
    powers = [float(power) for power in str(found["noise power"]).split()]
    assert powers == sorted(powers)
    assert powers[-1] > 0.9
    assert "scheduler/" in found["why"]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("ddpm", "--sampler learned", "--sampler learned with model MODEL, which tells no variance; use ancestral"),
        ("ddpm", "--prompt x", "--prompt with model MODEL, which takes none; drop it"),
        ("ddpm", "--guidance 2", "--guidance 2 with model MODEL, which knows no class for none; drop it"),
        ("ddpm", "--lora x", "--lora x with model MODEL; expected a model that takes prompts"),
        ("ddpm", "--eta 0.5 --sampler dpm++", "--eta 0.5 with --sampler dpm++; only ancestral has an eta"),
        (
            "ddpm",
            "--sampler pndm",
            "--sampler 'pndm': PNDM assumes that it begins at the first level; begun at t_boom, its state "
            "lags a step behind; use ancestral or dpm++",
        ),
        (
            "ddpm",
            "--sampler predictor-corrector",
            "--sampler predictor-corrector with model MODEL; expected a variance-exploding one",
        ),
        (
            "consistency",
            "--sampler ancestral",
            "--sampler ancestral with consistency model MODEL; expected one-call or renoise",
        ),
        ("sd1", "--lora x", "--lora x; expected a .safetensors file on this machine"),
    ],
)
def test_choices_that_do_not_fit(
    model: str, options: str, said: str, source: Path, folder: Path, complaint: Complaint
) -> None:
    place = saved(folder, model)
    command = f"augment --dataset {source} --model {place} --t-boom 0.5 --steps 4 --device cpu {options}"
    assert complaint(*command.split()) == said.replace("MODEL", str(place))


def test_a_prompt_is_filled_with_the_class(source: Path, folder: Path, tmp_path: Path) -> None:
    model = saved(folder, "sd1")
    run = planned(source, model, tmp_path / "default")
    assert run.plan.network.prompts == ("", "a photo of a", "a photo of a cat", "a photo of a dog")
    one = planned(source, model, tmp_path / "one", prompt="an animal")
    assert one.plan.network.prompts == ("", "an animal")
    for made, told in ((run, ["a photo of a cat", "a photo of a dog", "a photo of a"]), (one, ["an animal"] * 3)):
        (text,) = Worker(made).denoiser.prepare(torch.tensor([0, 1, -1]))
        info = made.plan.model
        _, *expected = conditions.encode_prompts(info, ("", *told), "float32", "cpu")[0]
        torch.testing.assert_close(text, torch.stack(expected))
    assert shard(run) != shard(one)


def test_embeddings_are_pinned_by_the_plan(source: Path, folder: Path, tmp_path: Path) -> None:
    run = planned(source, saved(folder, "sd1"), tmp_path / "run")
    run.conditions.write_bytes(run.conditions.read_bytes()[:-1] + b"\0")
    assert f"{run.conditions} is not the planned one" in list(verify(run))


@pytest.mark.parametrize(("name", "part"), [("sd1", "unet"), ("sd3", "transformer"), ("flux_dev", "transformer")])
def test_a_lora_is_added_to_the_weights(name: str, part: str, folder: Path, tmp_path: Path) -> None:
    """Against the weights changed by hand, by a LoRA whose scale is not 1."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = saved(folder, name)
    info = models.inspect(str(model))
    plain = build(info, torch.float32).get_submodule(part)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_v"])
    plain.add_adapter(config)
    state = get_peft_model_state_dict(plain)
    said = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config.to_dict()}
    getattr(diffusers, info.pipeline).save_lora_weights(tmp_path, **said)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    with_it = models.inspect(str(model), lora=str(lora))
    changed = build(with_it, torch.float32).get_submodule(part).state_dict()
    assert changed.keys() == weights.keys()
    for key, weight in weights.items():
        down, up = key.replace(".weight", ".lora_A.weight"), key.replace(".weight", ".lora_B.weight")
        added = 3 * state[up] @ state[down] if down in state else torch.zeros_like(weight)
        torch.testing.assert_close(changed[key], weight + added)
    assert with_it.sha256 != info.sha256
    lora.write_bytes(lora.read_bytes()[:-1] + b"\0")
    assert models.inspect(str(model), lora=str(lora)).sha256 != with_it.sha256


def test_a_file_without_a_lora_is_refused(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(folder, "sd1")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    command = f"augment --dataset {source} --model {model} --t-boom 0.5 --steps 4 --device cpu --lora {file}"
    assert main([*command.split(), "--out", str(tmp_path / "run")]) != 0
    assert "does not load" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["c p1 p2", "p1 p2 c"])
def test_patches_are_in_the_order_that_a_network_was_trained_with(order: str) -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    folded = to_patches(x, 2, order)
    for channel in range(3):
        for p1 in range(2):
            for p2 in range(2):
                place = channel * 4 + p1 * 2 + p2 if order == "c p1 p2" else (p1 * 2 + p2) * 3 + channel
                assert torch.equal(folded[:, place], x[:, channel, p1::2, p2::2])
    assert torch.equal(from_patches(folded, 2, order), x)


def test_zero_terminal_snr_needs_another_prediction_than_epsilon(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From pure noise, the predicted noise says nothing of the image."""
    for name, code in (("sd1", 2), ("sd2", 0)):
        model = save(name, tmp_path / name)
        file = model / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text()) | {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
        file.write_text(json.dumps(config))
        command = f"augment --dataset {source} --model {model} --t-boom 1 --steps 4 --device cpu --workers 1"
        assert main([*command.split(), "--out", str(tmp_path / f"{name}-run")]) == code
    said = capsys.readouterr()
    assert "abar does not fall from 1 to 0" in said.err
    assert RunDir(tmp_path / "sd2-run").plan.chain.levels.abar(4) == 0
    assert np.isfinite(RunDir(tmp_path / "sd2-run").status().ok)
