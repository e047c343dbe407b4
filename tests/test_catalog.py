"""Named data sets and models."""

import gzip
import json
from fractions import Fraction

import pytest
from pydantic import ValidationError

from boomgen import catalog
from boomgen.catalog import DataSet, dataset, datasets, models, shipped, suggest
from boomgen.levels import parse_t_boom
from boomgen.models import ModelInfo
from boomgen.models.chain import levels

NAMES = [
    *("bloodmnist", "breastmnist", "celeba-hq", "chestmnist", "cifar10", "cifar100", "dermamnist", "fashion-mnist"),
    *("fashion-sample", "ffhq", "imagenet", "imagenet-200", "imagenet-r-200", "lfw", "octmnist", "organamnist"),
    *("organcmnist", "organsmnist", "pathmnist", "pneumoniamnist", "retinamnist", "tiny-imagenet", "tissuemnist"),
]


def test_every_named_data_set_is_there_and_models_are_not_taken_for_one():
    assert list(datasets()) == NAMES
    assert dataset("cifar-10") is None


@pytest.mark.parametrize("name", NAMES)
def test_defaults_can_be_used(name):
    found = datasets()[name]
    t_boom, _ = parse_t_boom(str(found.t_boom))
    assert Fraction(0) < t_boom < 1
    assert found.title
    assert found.licence != "not stated"
    assert "/" in str(found.model) or found.model in models()
    assert len(set(found.classes)) == len(found.classes)
    assert found.hub or found.builtin or "--data-dir" in (found.note or "")
    assert found.builtin is None or catalog.asset(found.builtin).is_dir()


@pytest.mark.parametrize(
    ("name", "model", "t_boom", "hub"),
    [
        ("fashion-sample", "fashion-patched-ddpm", "0.4", None),
        ("fashion-mnist", "fashion-patched-ddpm", "0.4", "zalando-datasets/fashion_mnist"),
        ("cifar10", "google/ddpm-cifar10-32", "40/100", "uoft-cs/cifar10"),
        ("imagenet", "facebook/DiT-XL-2-256", "75/250", "ILSVRC/imagenet-1k"),
    ],
)
def test_what_a_name_means(name, model, t_boom, hub):
    found = datasets()[name]
    assert (found.model, found.t_boom, found.hub and found.hub.id) == (model, t_boom, hub)


def test_labels_that_are_people_are_marked():
    assert {name for name, found in datasets().items() if found.label_is_identity} == {"lfw", "celeba-hq"}


@pytest.mark.parametrize(
    ("name", "count"), [("imagenet", 1000), ("imagenet-200", 200), ("tiny-imagenet", 200), ("imagenet-r-200", 200)]
)
def test_the_classes_of_imagenet_and_their_place_among_the_1000(name, count):
    timm = pytest.importorskip("timm.data")
    info, found = timm.ImageNetInfo("imagenet-1k"), datasets()[name]
    assert len(found.folders) == len(set(found.classes)) == count
    assert list(found.folders) == sorted(found.folders)
    assert [info.index_to_label_name(i) for i in found.imagenet_classes] == list(found.folders)
    names = [info.label_name_to_description(wnid, detailed=False).split(", ")[0] for wnid in found.folders]
    assert [name.partition(" (n")[0] for name in found.classes] == names


def test_the_two_meanings_of_imagenet_200_and_names_that_are_doubled():
    assert datasets()["tiny-imagenet"].folders == datasets()["imagenet-200"].folders
    assert len({*datasets()["imagenet-200"].folders} & {*datasets()["imagenet-r-200"].folders}) == 62
    doubled = [name for name in datasets()["imagenet"].classes if " (n" in name]
    assert doubled == ["crane (n02012849)", "crane (n03126707)", "maillot (n03710637)", "maillot (n03710721)"]


def test_presets_are_frozen_and_take_no_unknown_field():
    with pytest.raises(ValidationError):
        datasets()["cifar10"].t_boom = "0.5"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="licence_ulr"):
        DataSet.model_validate({**datasets()["cifar10"].model_dump(), "licence_ulr": "x"})


def test_the_models():
    own = models()["fashion-patched-ddpm"]
    assert (own.size, own.channels, own.classes) == (32, 1, 10)
    assert catalog.asset(str(own.builtin)).joinpath("unet/config.json").is_file()
    assert {model.family for model in models().values()} == {"pixel-unet", "latent-unet", "dit", "sd3", "flux"}
    assert {data.model for data in datasets().values()} <= models().keys()


@pytest.mark.parametrize("name", [name for name, model in models().items() if model.noise])
def test_the_noise_of_a_preset_follows_from_its_scheduler(name, tmp_path):
    preset = models()[name]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(preset.scheduler))
    latents = (16, preset.size // 8, preset.size // 8)
    info = ModelInfo(
        name=name,
        path=str(tmp_path),
        sha256="",
        family=preset.family,
        kind="",
        size=preset.size,
        channels=3,
        state=latents,
        prediction=preset.prediction,
        trained_steps=preset.scheduler.get("num_train_timesteps", 1000),
        licence=preset.licence,
        known=preset.known,
    )
    chain = levels(info)
    for tenth, power in enumerate(preset.noise, start=1):
        if power is not None:
            assert 1 - chain.abar(chain.level(Fraction(tenth, 10))) == pytest.approx(power, abs=5e-5)


@pytest.mark.parametrize("name", ["facebook/DiT-XL-2-256", "black-forest-labs/FLUX.1-dev", "google/ddpm-cifar10-32"])
def test_licences_that_forbid_something_are_known(name):
    assert catalog.restricted(models()[name].licence) == (name != "google/ddpm-cifar10-32")


def test_an_installed_wheel_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "boomgen")
    assert shipped("jobs") == tmp_path / "jobs"
    (tmp_path / "boomgen/_shipped/jobs").mkdir(parents=True)
    assert shipped("jobs") == tmp_path / "boomgen/_shipped/jobs"
    assert shipped("manifests") == tmp_path / "manifests"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar-10", ", did you mean cifar10 or cifar100?"),
        ("fashion-minst", ", did you mean fashion-mnist or fashion-sample?"),
        ("zzz", ""),
    ],
)
def test_near_misses(name, said):
    assert suggest(name, datasets()) == said


def test_the_embedded_sample_is_100_of_each_class():
    data = gzip.decompress((catalog.asset("fashion-sample") / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert [data.count(label) for label in range(10)] == [100] * 10
    assert "Zalando" in (catalog.asset("fashion-sample") / "LICENSE").read_text()
