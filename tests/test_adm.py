"""Original checkpoints of guided-diffusion (ADM) become folders that boomgen runs, equal to azula's denoiser."""

import re
import sys
from pathlib import Path

import pytest
import torch

from boomgen.cli import main
from boomgen.models import adm, chain, conditions, inspect, network
from boomgen.models.denoiser import Denoiser, Pixels

from .families import ablated
from .families.folders import guided_diffusion
from .test_pesser import HOLDS, Evil

NAMES = [
    "imagenet_64x64_cond",
    "imagenet_128x128_cond",
    "imagenet_256x256",
    "imagenet_256x256_cond",
    "imagenet_512x512_cond",
    "ffhq_256x256",
]


def folder(card, place):
    guided_diffusion(card, place)
    return inspect(str(place))


@pytest.fixture(params=ablated.CARDS)
def card(request):
    return request.param


@torch.inference_mode()
def test_the_clean_image_is_the_one_that_azula_predicts(card, tmp_path):
    info, azulas = folder(card, tmp_path / "out"), ablated.denoiser(card)
    classes = tuple(range(10)) if card == "classes" else None
    net = network.build(info, torch.float32)
    ours = Denoiser(info, chain.levels(info, 1000), net, Pixels("cpu"), conditions.of_classes(info, classes))
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 7])
    for index in (0, 7, 500, 900):
        mean = azulas(x, torch.tensor(index), label=labels if classes else None).mean
        off = (ours.predict_x0(x, index + 1, ours.prepare(labels)) - mean).abs().max()
        assert off < 1e-5 / ours.levels.a[index + 1], "eps, equal within rounding, is divided by a"
        assert mean.std() > 0.1


def test_what_is_recognised(card, tmp_path):
    info = folder(card, tmp_path / "out")
    assert (info.family, info.kind, info.state) == ("pixel-unet", "GuidedDiffusionUNet", (3, 16, 16))
    assert (info.prediction, info.clip, info.variance, info.guidance) == ("epsilon", True, "adm", 1)
    assert (info.class_count, info.null_class) == (10 if card == "classes" else 0, None)
    assert info.why == ("unet/ is a GuidedDiffusionUNet of 3 channels", "scheduler/ is a DDPMScheduler: epsilon")


@torch.inference_mode()
def test_half_precision_and_export(card, tmp_path):
    """In bfloat16 what is told of t and class stays in fp32, as in guided-diffusion; and the network exports."""
    info = folder(card, tmp_path / "out")
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([7.0, 900.0]), torch.tensor([3, 7])
    whole, half = (network.build(info, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, weight in half.named_parameters():
        told = any(part in name for part in ("time_embed", "label_emb", "emb_layers"))
        assert weight.dtype == (torch.float32 if told else torch.bfloat16)
    exported = torch.export.export(whole, inputs).module()
    assert torch.equal(exported(*inputs), whole(*inputs))
    assert 0 < (half(*inputs) - whole(*inputs)).abs().max() < 0.1


def test_each_published_network_is_none_of_the_others():
    known = adm.cards()
    states = {name: adm.network_of(config).unet.state_dict() for name, config in known.items()}
    assert list(states) == NAMES
    assert [adm.card_of(state, known) for state in states.values()] == NAMES
    assert "input_blocks.20.1.qkv.weight" in states["imagenet_512x512_cond"], "attention at 8x8, of 512x512"


@pytest.fixture(scope="module")
def hollow():
    """Names and shapes of a published network, in a file of a few kilobytes."""
    state = adm.network_of(adm.cards()["imagenet_64x64_cond"]).unet.state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


NEAREST = "a network of another shape: nearest is imagenet_64x64_cond, but for {}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out.2.bias": None}, NEAREST.format("out.2.bias")),
        ({"lonely": torch.zeros(3)}, NEAREST.format("lonely")),
        ({"label_emb.weight": torch.zeros(10, 768)}, NEAREST.format("label_emb.weight")),
        ({}, "a network of another shape: time_embed.0.weight is (768, 192), more than was saved"),
        ({"more": Evil()}, "no tensors as torch.save writes them"),
    ],
)
def test_what_is_none_of_them(complaint, tmp_path, hollow, changed, said):
    state = {name: value for name, value in (hollow | changed).items() if value is not None}
    torch.save(state, tmp_path / "model.ckpt")
    assert complaint("models", "import", "model.ckpt") == HOLDS.format(said)


def test_no_other_size(complaint, tmp_path, hollow):
    torch.save(hollow, tmp_path / "model.ckpt")
    said = "--size 128; expected none: imagenet_64x64_cond has images of 64 pixels"
    assert complaint("models", "import", "model.ckpt", "--size", 128) == said


def test_without_azula(complaint, tmp_path, hollow, monkeypatch):
    place = tmp_path / "out"
    info = folder("classes", place)
    torch.save(hollow, tmp_path / "model.ckpt")
    monkeypatch.setitem(sys.modules, "azula.plugins", None)
    said = "networks of guided-diffusion need azula, which is not installed; pip install 'boomgen[adm]'"
    assert complaint("models", "import", "model.ckpt") == said
    with pytest.raises(adm.UsageError, match=re.escape(said)):
        network.build(info, torch.float32)


def test_import_and_show_tell_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adm, "cards", lambda: ablated.CARDS)
    torch.save(ablated.denoiser("classes").backbone.state_dict(), "tiny.pt")
    assert main(["models", "import", "tiny.pt"]) == 0
    imported = capsys.readouterr().out.splitlines()
    assert main(["models", "show", "tiny"]) == 0
    assert imported == [imported[0], *capsys.readouterr().out.splitlines()]
    assert Path("tiny/boomgen.yaml").read_text() == "title: classes of guided-diffusion\n"
