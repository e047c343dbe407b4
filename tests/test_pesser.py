"""Original DDPM checkpoints (pytorch_diffusion, FastDPM, DDIM) become folders that boomgen runs, with equal outputs."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from boomgen.cli import main
from boomgen.levels import spaced
from boomgen.models import inspect, network
from boomgen.models.checkpoints import import_checkpoint

from .chains import ABAR

GOLDEN = Path(__file__).parent / "golden" / "pesser.npz"
BLOCKS = {
    "down.0.block.0": (32, 32),
    "down.1.block.0": (32, 64),
    "mid.block_1": (64, 64),
    "mid.block_2": (64, 64),
    "up.1.block.0": (128, 64),
    "up.1.block.1": (96, 64),
    "up.0.block.0": (96, 32),
    "up.0.block.1": (64, 32),
}
ATTENTION = ("down.1.attn.0", "mid.attn_1", "up.1.attn.0", "up.1.attn.1")
OTHERS = {
    "temb.dense.0": (128, 32),
    "temb.dense.1": (128, 128),
    "conv_in": (32, 3, 3, 3),
    "down.0.downsample.conv": (32, 32, 3, 3),
    "up.1.upsample.conv": (64, 64, 3, 3),
    "norm_out": (32,),
    "conv_out": (3, 32, 3, 3),
}


def shapes():
    """Of the original network with ch 32, ch_mult (1, 2), one block per resolution, attention at the lower one."""
    weights = dict(OTHERS)
    for block, (old, new) in BLOCKS.items():
        weights |= {f"{block}.norm1": (old,), f"{block}.conv1": (new, old, 3, 3), f"{block}.temb_proj": (new, 128)}
        weights |= {f"{block}.norm2": (new,), f"{block}.conv2": (new, new, 3, 3)}
        weights |= {f"{block}.nin_shortcut": (new, old, 1, 1)} if old != new else {}
    for block in ATTENTION:
        weights |= {f"{block}.norm": (64,)} | {
            f"{block}.{part}": (64, 64, 1, 1) for part in ("q", "k", "v", "proj_out")
        }
    sizes = {f"{name}.weight": shape for name, shape in weights.items()}
    return sizes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def original():
    """Its weights, and the input for which the original network's output is in the golden file, at t = 7 and 999."""
    draws = np.random.RandomState(0)  # numpy keeps its numbers as they are

    def draw(shape):
        return torch.from_numpy(draws.standard_normal(shape).astype(np.float32))

    state = {}
    for name, shape in sorted(shapes().items()):
        one = ".norm" in f".{name}" and name.endswith("weight")
        state[name] = draw(shape) * (0.1 if len(shape) > 1 else 0.3) + one
    return state, draw((2, 3, 8, 8))


STATE, INPUT = original()
WRONG = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
SAVED = {
    "state dict": STATE,
    "of several devices": {f"module.{name}": tensor for name, tensor in STATE.items()},
    "DDIM's list": [WRONG, {"state": {0: {"step": 1}}}, 3, 1000, {f"module.{name}": t for name, t in STATE.items()}],
    "averaged first": {"ema": STATE, "model": WRONG},
    "averaged last": {"model": WRONG, "model_ema": STATE, "step": 5},
    "double": {name: tensor.double() for name, tensor in STATE.items()},
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_the_imported_network_is_the_original(saved, tmp_path):
    """The golden output is the original code's, on the same weights: equal to 1e-5."""
    torch.save(saved, tmp_path / "model.ckpt")
    import_checkpoint(tmp_path / "model.ckpt", tmp_path / "out", 8)
    info = inspect(str(tmp_path / "out"))
    assert (info.family, info.state, info.prediction, info.clip) == ("pixel-unet", (3, 8, 8), "epsilon", False)
    with torch.inference_mode():
        out = network.build(info, torch.float32)(INPUT, torch.tensor([7.0, 999.0]), torch.zeros(2, dtype=torch.int64))
    assert np.allclose(out.numpy(), np.load(GOLDEN)["out"], rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt", "out"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(part):
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(part)}


HOLDS = "model.ckpt holds {}; expected a checkpoint of pytorch_diffusion, FastDPM or guided-diffusion"
SHAPE = HOLDS.split(";")[0].format("a network of another shape: ")
loops = []
loops.append(loops)
HUGE = torch.zeros(1).expand(2**20, 3, 3, 2**10)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (b"", HOLDS.format("no tensors as torch.save writes them")),
        (b"\x89PNG\r\n", HOLDS.format("no tensors as torch.save writes them")),
        (pickle.dumps(Evil()), HOLDS.format("no tensors as torch.save writes them")),
        ({**STATE, "more": Evil()}, HOLDS.format("no tensors as torch.save writes them")),
        ({"weight": torch.zeros(3)}, HOLDS.format("no weights of such a network")),
        (loops, HOLDS.format("no weights of such a network")),
        (without("down"), SHAPE),
        (without("mid.attn_1.q"), SHAPE),
        ({**STATE, "lonely": torch.zeros(3)}, SHAPE),
        ({**STATE, "mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}, SHAPE),
        ({**STATE, "conv_in.weight": HUGE}, SHAPE),
    ],
)
def test_what_is_no_such_checkpoint(complaint, tmp_path, saved, said):
    file = tmp_path / "model.ckpt"
    file.write_bytes(saved) if isinstance(saved, bytes) else torch.save(saved, file)
    line = complaint("models", "import", "model.ckpt", "--size", 8)
    assert line == said if said.startswith("model.ckpt holds no") else line.startswith(said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["import"], "models import; expected list, show MODEL or import FILE"),
        (["list", "x"], "models list x; expected list, show MODEL or import FILE"),
        (["show", "x", "--size", 8], "--out and --size with models show; they are for models import"),
        (
            ["import", "model.ckpt"],
            "a network of 2 resolutions does not tell the side of its images; give it by --size",
        ),
        (
            ["import", "model.ckpt", "--size", 9],
            "--size 9; expected a multiple of 2: the network has 2 resolutions",
        ),
        (["import", "model.ckpt", "--size", 8, "--out", "."], "--out . exists; expected a new folder"),
    ],
)
def test_wrong_use_is_one_line(complaint, tmp_path, args, said):
    torch.save(STATE, tmp_path / "model.ckpt")
    assert complaint("models", *args) == said


def test_a_file_that_is_not_there(complaint):
    said = "No such file or directory: gone.ckpt; mend that and give the same command again"
    assert complaint("models", "import", "gone.ckpt", code=1) == said


def test_import_and_show_tell_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "cat.ckpt")
    assert main(["models", "import", "cat.ckpt", "--size", "8"]) == 0
    imported = capsys.readouterr().out.splitlines()
    assert main(["models", "show", "cat"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert imported == [imported[0], *shown]
    assert imported[0].split() == ["folder", "cat"]
    rows = dict(line.split("  ", 1) for line in shown)
    powers = [f"{1 - ABAR[index]:.4f}" for index in spaced(1000, 100)[9:99:10]]
    assert rows["noise power"].split() == powers, "1 - abar at levels 10, 20, ... 90 of 100"
