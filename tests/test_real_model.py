"""What Boomerang promises, on the embedded model and real Fashion-MNIST: outputs are realistic, keep their label, stay
near their source at a small t_boom and leave it as t_boom grows. The figures to compare with are in the README of the
model; they were measured with another classifier and other noise.
"""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from boomgen import env, images, manifest, models
from boomgen.boomerang import boomerang, forward
from boomgen.job import Job, Launch
from boomgen.models.chain import levels as levels_of
from boomgen.models.conditions import Conditions, of_classes
from boomgen.models.denoiser import Denoiser, Pixels
from boomgen.models.network import build
from boomgen.noise import normal
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.shard import PART
from boomgen.worker import Worker
from tests.conftest import write_idx

KNOWN_AGREEMENT = 0.902  # README of the model, t_boom = 0.4, 1,000 test images
BATCH = 128


class Labelled(NamedTuple):
    """Images (N, 28, 28) uint8 and their labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass
class Outputs:
    """The rows of a run, in the order of their sources: pixels (N, 28, 28) uint8 and what the manifest says."""

    files: list[bytes]
    pixels: np.ndarray
    sources: np.ndarray
    source_labels: np.ndarray
    noise_keys: list[bytes]


def read(folder: Path, prefix: str) -> Labelled:
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / f"{prefix}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=start)
        for kind, start in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return Labelled(pixels.reshape(-1, 28, 28), labels.astype(np.int64))


@pytest.fixture(scope="session")
def test_split(fashion_mnist: Path) -> Labelled:
    return read(fashion_mnist, "t10k")


@pytest.fixture(scope="session")
def outputs(real_run: RunDir) -> Outputs:
    table = manifest.read(real_run.manifest).sort_by("source_row")
    files: dict[str, bytes] = {}
    for path in sorted((real_run.dataset / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            files |= {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
    pngs = [files[f"{key}.png"] for key in table.column("key").to_pylist()]
    return Outputs(
        files=pngs,
        pixels=np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]),
        sources=table.column("source_row").to_numpy(),
        source_labels=table.column("source_label").to_numpy(),
        noise_keys=[bytes.fromhex(key) for key in table.column("noise_key").to_pylist()],
    )


def use_all_cores() -> None:
    """As many threads as there are cores, but one where pytest-xdist has filled them with processes."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else env.cores())


def as_state(pixels: np.ndarray) -> Tensor:
    """Images (N, 28, 28) uint8 as (N, 1, 28, 28) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)[:, None]


class Classifier(nn.Module):
    """Three convolutions; `features` (N, 128) are what sets of images are compared by."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *self.block(1, 16), nn.MaxPool2d(2), *self.block(16, 32), nn.MaxPool2d(2), *self.block(32, 64)
        )
        self.hidden, self.head = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, 10)

    @staticmethod
    def block(given: int, made: int) -> list[nn.Module]:
        return [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.hidden(self.body(x.contiguous(memory_format=torch.channels_last)).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def labels(self, pixels: np.ndarray) -> np.ndarray:
        return torch.cat([self(x).argmax(1) for x in as_state(pixels).split(500)]).numpy()


@pytest.fixture(scope="session")
def classifier(fashion_mnist: Path) -> Classifier:
    """Trained on 30,000 real training images, three times over; most of a minute on one core."""
    use_all_cores()
    torch.manual_seed(0)
    pixels, labels = read(fashion_mnist, "train")
    x, y = as_state(pixels[:30_000]), torch.from_numpy(labels[:30_000])
    net = Classifier().to(memory_format=torch.channels_last)
    steps = 3 * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            batches = torch.randperm(len(x)).split(BATCH)
        chosen = batches[step % (len(x) // BATCH)]
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def kid(one: Tensor, other: Tensor) -> float:
    """Kernel inception distance (Binkowski et al. 2018) on given features: the unbiased estimate of the squared MMD
    with the kernel (x.y / d + 1)^3."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> float:
        k = kernel(a, a)
        return float((k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1)))

    one, other = one.double(), other.double()
    return within(one) + within(other) - 2 * float(kernel(one, other).mean())


def rms(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distance of each pair of images, pixels in [-1, 1]: shape (N,)."""
    difference = (one.astype(np.float64) - other) / 127.5
    return np.sqrt(np.square(difference).mean(axis=(1, 2)))


def padded(pixels: np.ndarray) -> np.ndarray:
    """Images as the model sees them, (N, 32, 32, 1)."""
    return np.stack([images.fit(each[..., None], 32, "pad")[0] for each in pixels])


def test_the_classifier_knows_real_images(classifier: Classifier, test_split: Labelled) -> None:
    accuracy = np.mean(classifier.labels(test_split.pixels) == test_split.labels)
    print(f"accuracy on 10,000 real test images: {accuracy:.2%}")
    assert accuracy >= 0.90


def test_outputs_keep_their_label(outputs: Outputs, classifier: Classifier, test_split: Labelled) -> None:
    assert sorted(outputs.sources) == list(range(1000))
    assert np.array_equal(outputs.source_labels, test_split.labels[outputs.sources])
    real = np.mean(classifier.labels(test_split.pixels[:1000]) == test_split.labels[:1000])
    agreement = np.mean(classifier.labels(outputs.pixels) == outputs.source_labels)
    print(f"agreement on outputs {agreement:.1%} (model's README {KNOWN_AGREEMENT:.1%}), on their sources {real:.1%}")
    assert abs(agreement - KNOWN_AGREEMENT) <= 0.02


def test_outputs_look_more_real_than_the_noised_inputs(
    outputs: Outputs, real_run: RunDir, classifier: Classifier, test_split: Labelled
) -> None:
    plan = real_run.plan
    x0 = torch.from_numpy(padded(test_split.pixels[outputs.sources])).permute(0, 3, 1, 2) / 127.5 - 1
    noise = lambda stream, step: torch.from_numpy(normal(outputs.noise_keys, stream, step, (1, 32, 32)))  # noqa: E731
    x_t = forward(x0, plan.chain.level, plan.chain.levels, noise)
    noised = ((x_t.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0, 2:30, 2:30]
    with torch.no_grad():
        real, made, noisy, sources = (
            torch.cat([classifier.features(x) for x in as_state(pixels).split(500)])
            for pixels in (test_split.pixels[1000:], outputs.pixels, noised, test_split.pixels[:1000])
        )
    distance = {"sources": kid(sources, real), "outputs": kid(made, real), "noised inputs": kid(noisy, real)}
    print("KID against 9,000 other real images:", ", ".join(f"{name} {d:.4f}" for name, d in distance.items()))
    assert distance["outputs"] < distance["noised inputs"] / 4


def test_an_output_lies_nearest_to_its_own_source(outputs: Outputs, test_split: Labelled) -> None:
    """The link in the manifest is true, and t_boom = 0.4 hides little."""
    sources = test_split.pixels[:1000].reshape(1000, -1).astype(np.float64)
    made = outputs.pixels.reshape(1000, -1).astype(np.float64)
    distance = (made**2).sum(1)[:, None] + (sources**2).sum(1) - 2 * made @ sources.T
    own = np.mean(distance.argmin(1) == outputs.sources)
    print(f"nearest of 1,000 sources is the own one for {own:.1%} of the outputs")
    assert own > 0.9
    assert (rms(outputs.pixels, test_split.pixels[outputs.sources]) > 0).all()


def test_outputs_are_grey_and_of_the_size_of_their_sources(outputs: Outputs) -> None:
    for png in outputs.files:
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))


def test_black_margins_stay_black(outputs: Outputs, test_split: Labelled) -> None:
    """Three columns left and right of narrow things: inside the image, so only the model can keep them black."""
    margin = np.r_[0:3, 25:28]
    sources = test_split.pixels[outputs.sources]
    narrow = ~sources[:, :, margin].any(axis=(1, 2))
    made = outputs.pixels[narrow][:, :, margin]
    print(
        f"{narrow.sum()} narrow things; of the pixels of their margins {np.mean(made <= 10):.2%} are 10 of 255 or less"
    )
    assert narrow.sum() > 50
    assert np.mean(made <= 10) > 0.99


def test_the_distance_to_the_source_grows_with_t_boom(classifier: Classifier, test_split: Labelled) -> None:
    """Same 16 images, same noise, ancestral steps; chains of 20 levels."""
    use_all_cores()
    count, info = 16, models.inspect("fashion-patched-ddpm")
    levels = levels_of(info, 20)
    told = of_classes(info, tuple(range(10)))
    unet = Denoiser(info, levels, build(info, torch.float32), Pixels("cpu"), told)
    pixels, labels = test_split.pixels[:count], test_split.labels[:count]
    condition = unet.prepare(torch.from_numpy(labels))
    x0 = unet.encode(torch.from_numpy(padded(pixels)))
    keys = [number.to_bytes(16, "little") for number in range(count)]
    noise = lambda stream, step: torch.from_numpy(normal(keys, stream, step, (1, 32, 32)))  # noqa: E731
    distances = []
    print("\nt_boom   abar    rms  agreement")
    for tenth in range(1, 10):
        level = levels.level(Fraction(tenth, 10))
        with torch.inference_mode():
            x = boomerang(x0, level, levels, partial(predict, unet, condition), noise)
        made = unet.decode(x).numpy()[:, 2:30, 2:30, 0]
        agreement = np.mean(classifier.labels(made) == labels)
        distances.append(rms(made, pixels).mean())
        print(f"{tenth / 10:6.1f} {levels.abar(level):6.3f} {distances[-1]:6.3f} {agreement:9.1%}")
    assert (np.diff(distances) > 0).all()


def predict(unet: Denoiser, condition: Conditions, x: Tensor, k: int) -> Tensor:
    return unet.predict_x0(x, k, condition)


MakeReal = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make(tmp_path: Path, secret_file: Path) -> MakeReal:
    """The manifest rows of 64 images through the embedded model, in the order of their sources. Same keys and labels
    for the same labels and secret, whatever the pixels."""

    def made(source: Labelled, name: str, **changes: Any) -> list[dict[str, Any]]:
        folder = write_idx(tmp_path / name / "source", source.pixels, source.labels)
        job = Job(**({"mode": "anonymize", "dataset": "fashion-mnist", "data_dir": str(folder), "steps": 5} | changes))
        secret = str(secret_file) if job.mode == "anonymize" else None
        run = prepare(job, Launch(out=str(tmp_path / name / "run"), device="cpu", secret_file=secret))
        worker = Worker(run)
        for shard in range(run.plan.shards):
            worker.make_shard(shard)
        rows = [row for part in sorted(run.shards.glob(f"*/{PART}")) for row in pq.read_table(part).to_pylist()]
        return sorted(rows, key=lambda row: row["source_row"])

    return made


def first(split: Labelled, count: int) -> Labelled:
    return Labelled(split.pixels[:count], split.labels[:count])


def outcomes(rows: list[dict[str, Any]], name: str = "pixel_sha256") -> list[Any]:
    assert {row["status"] for row in rows} == {"ok"}
    return [row[name] for row in rows]


def test_t_boom_0_returns_the_source(make: MakeReal, test_split: Labelled) -> None:
    source = first(test_split, 64)
    expected = [hashlib.sha256(each.tobytes()).hexdigest() for each in source.pixels]
    assert outcomes(make(source, "nothing", mode="augment", t_boom="0")) == expected


def test_at_t_boom_1_nothing_is_left_of_the_source(make: MakeReal, test_split: Labelled) -> None:
    source = first(test_split, 64)
    other = Labelled(255 - source.pixels, source.labels)
    assert outcomes(make(source, "one", t_boom="1")) == outcomes(make(other, "other", t_boom="1"))
    near, far = make(source, "near", t_boom="0.8"), make(other, "far", t_boom="0.8")
    assert not set(outcomes(near)) & set(outcomes(far))
    assert outcomes(near, "noise_key") == outcomes(far, "noise_key")


def test_shared_noise_makes_equal_outputs_of_equal_sources(make: MakeReal, test_split: Labelled) -> None:
    half = first(test_split, 32)
    twice = Labelled(np.concatenate([half.pixels, half.pixels]), np.concatenate([half.labels, half.labels]))
    shared = make(twice, "shared", t_boom="0.4", noise="shared")
    assert len(set(outcomes(shared, "noise_key"))) == 1
    assert outcomes(shared)[:32] == outcomes(shared)[32:]
    assert len(set(outcomes(shared))) == 32
    independent = make(twice, "independent", t_boom="0.4")
    assert len(set(outcomes(independent, "noise_key"))) == len(set(outcomes(independent))) == 64
