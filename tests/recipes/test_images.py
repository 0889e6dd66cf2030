"""The image recipes: the papers' settings, light to import, and tasks that train on a stand-in for the data."""

import math
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from stn_fast.data import Images, Split, cifar10, fashion_mnist
from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.recipes import images as recipes
from stn_fast.training.build import build_method
from stn_fast.training.layering import resolve, to_yaml
from stn_fast.training.run import checked_task, run
from stn_fast.training.spaces import build_space

# (low, high, the value it starts at, integer), as in the papers' tables.
RATE = (0.0, 0.9, 0.05, False)
UNIT = (0.0, 1.0, 0.05, False)
DELTA_RATE = (0.0, 0.95, 0.05, False)
PUBLISHED = {
    "cifar10": {
        **{f"conv_dropout_{i}": RATE for i in (1, 2, 3, 4, 5)},
        **{f"fc_dropout_{i}": RATE for i in (1, 2)},
        "input_dropout": (0.0, 0.99, 0.05, False),
        "input_scale": (0.0, 0.3, 0.05, False),
        "hue": (0.0, 0.5, 0.05, False),
        **dict.fromkeys(("contrast", "saturation", "brightness"), UNIT),
        "cutout_length": (0.0, 24.0, 4, True),
        "cutout_holes": (0.0, 4.0, 1, True),
    },
    "fashion-mnist": {
        **dict.fromkeys(("input_dropout", "conv_dropout_1", "conv_dropout_2", "last_dropout"), DELTA_RATE),
        "cutout_length": (2.0, 24.0, 4, True),
        "cutout_holes": (0.0, 5.0, 1, True),
        "weight_decay": (0.0, None, 1e-4, False),
    },
    "fashion-mnist-small": {
        **dict.fromkeys(("input_dropout", "conv_dropout", "last_dropout"), DELTA_RATE),
        "weight_decay": (0.0, None, 1e-4, False),
        "cutout_length": (0.0, 14.0, 2, True),
        "cutout_holes": (0.0, 4.0, 1, True),
    },
}
SETTINGS = {
    "cifar10": {
        "method": {"train_steps": 2, "valid_steps": 1, "warmup_epochs": 5, "tune_scales": True, "entropy_weight": 1e-3},
        "optimizer": {
            "learning_rate": 0.01, "momentum": 0.9, "decay_factor": 0.1, "decay_patience": 60, "min_learning_rate": 1e-5
        },
        "hyper_optimizer": {"name": "adam", "learning_rate": 3e-3},
        "schedule": {"batch_size": 128, "patience": 75},
    },
    "fashion-mnist": {
        "method": {"train_steps": 5, "valid_steps": 1, "warmup_epochs": 5, "tune_scales": True, "entropy_weight": 1e-3},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.9, "decay_factor": 1.0},
        "hyper_optimizer": {"name": "rmsprop", "learning_rate": 1e-2},
        "schedule": {"batch_size": 128, "patience": None},
    },
    "fashion-mnist-small": {
        "method": {"train_steps": 2, "valid_steps": 1, "warmup_epochs": 2, "tune_scales": True, "entropy_weight": 1e-3},
        "optimizer": {"learning_rate": 0.03, "momentum": 0.9, "decay_factor": 1.0},
        "hyper_optimizer": {"name": "adam", "learning_rate": 3e-2},
        "schedule": {"batch_size": 128, "epochs": 40},
    },
}  # fmt: skip
SCALES = {"cifar10": 0.5, "fashion-mnist": 1.0, "fashion-mnist-small": 0.5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tuned_hyperparameters_are_the_papers(name):
    config = recipe(name).config()
    enabled = config.enabled
    start = {key: math.floor(entry.init) if entry.integer else entry.init for key, entry in enabled.items()}
    found = {key: (entry.low, entry.high, start[key], entry.integer) for key, entry in enabled.items()}
    assert found == PUBLISHED[name]
    assert {entry.scale for entry in enabled.values()} == {SCALES[name]}
    space = build_space(config)
    assert space.values(space.initial_state()[0]) == pytest.approx(start, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_the_papers(name):
    config = recipe(name).config()
    for section, settings in SETTINGS[name].items():
        assert {key: getattr(getattr(config, section), key) for key in settings} == settings
    assert config.recipe == name


def test_importing_every_recipe_loads_nothing_heavy():
    code = (
        "import sys\nfrom stn_fast.recipes import RECIPES, recipe\n"
        "for name in RECIPES: recipe(name).config()\n"
        "heavy = {'torch', 'triton', 'numpy', 'matplotlib', 'sklearn', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def stand_in(channels, side, train, test):
    """Images that say something about their label, so that a network can learn."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        targets = torch.randint(10, (count,), generator=generator)
        noise = torch.randint(120, (count, channels, side, side), generator=generator)
        return Split((noise + 13 * targets.view(-1, 1, 1, 1)).to(torch.uint8), targets)

    return Images(split(train), split(test), (0.5,) * channels, (0.25,) * channels)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """short(recipe name, "key=value", ...): its configuration, on few images that stand in for the data."""

    def short(name, *pairs):
        module = recipe(name)
        images = stand_in(3, 32, 96, 16) if name == "cifar10" else stand_in(1, 28, 96, 16)
        monkeypatch.setattr(cifar10 if name == "cifar10" else fashion_mnist, "load", lambda root=None: images)
        monkeypatch.setitem(recipes.VALID_SIZES, name, 32)
        monkeypatch.setattr(import_module("stn_fast.models.alexnet"), "HIDDEN", (64, 64))  # small checkpoints
        small = ("schedule.batch_size=8", "schedule.valid_batch_size=8", "schedule.epochs=1", "method.warmup_epochs=0")
        return replace(resolve(module.config(), None, [*small, *pairs]), run_dir=str(tmp_path / name))

    return short


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_short_run_trains_and_tunes(short, name):
    config = short(name)
    result = run(config, recipe(name).build)
    cycle = config.method.train_steps
    assert result["steps"] == 64 // 8 + 64 // 8 // cycle
    assert set(result["hyperparameters"]) == set(config.enabled)
    assert all(math.isfinite(value) for value in result["hyperparameters_end"].values())
    moved = [
        key for key in config.enabled if result["hyperparameters_end"][key] != result["hyperparameters_start"][key]
    ]
    assert set(moved) >= {key for key, entry in config.enabled.items() if not entry.integer}


def test_a_share_of_the_training_images_is_trained_on(short):
    config = short("fashion-mnist", "train_fraction=0.5")
    data = recipe("fashion-mnist").build(config).data
    assert [len(split.inputs) for split in data] == [32, 32, 16]


def test_the_small_recipe_trains_on_5000_images(short, monkeypatch):
    config, small = short("fashion-mnist-small"), recipe("fashion-mnist-small")
    assert (recipes.SMALL_TRAIN_SIZE, small.config().schedule.epochs) == (5000, 40)
    monkeypatch.setattr(recipes, "SMALL_TRAIN_SIZE", 24)
    assert [len(split.inputs) for split in small.build(config).data] == [24, 32, 16]


def test_every_seed_uses_the_same_validation_images(short):
    first, second = (recipe("fashion-mnist").build(short("fashion-mnist", f"seed={seed}")) for seed in (0, 1))
    assert torch.equal(first.data.valid.inputs, second.data.valid.inputs)
    same = (
        torch.equal(one, other) for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )
    assert not all(same)


def test_all_fifteen_hyperparameters_of_cifar10_receive_gradients(short):
    config = short("cifar10")
    task = checked_task(config, recipe("cifar10").build)
    method = build_method(config, task)
    train, valid, _ = task.data
    for step in range(2):
        method.train_step(Split(*(part[8 * step :][:8] for part in train)), step)
    method.valid_step(Split(*(part[:16] for part in valid)), 2)
    assert len(task.space) == 15
    for gradient in (method.location.grad, method.raw_scale.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.all()


def test_a_strength_may_start_anywhere_in_its_range(short):
    task = checked_task(short("cifar10", "hyperparameters.input_dropout.init=0.97"), recipe("cifar10").build)
    assert task.model.tuned_hyperparameters.values()["input_dropout"] == pytest.approx(0.97)


def penalty(short, name, *pairs):
    """The training objective less the bare loss, in eval mode, and the task."""
    config = short(name, *pairs)
    task = recipe(name).build(config)
    task.model.eval()
    location, raw_scale = task.space.initial_state()
    batch = Split(*(part[:8] for part in task.data.train))
    hyper = task.space.sample(location, raw_scale, batch_size=8, seed=0, step=0)
    difference = task.training_objective(task.model, batch, hyper) - task.validation_objective(task.model, batch, hyper)
    return difference.item(), task


def test_weight_decay_of_cifar10_is_off_and_one_key_turns_it_on(short):
    off, task = penalty(short, "cifar10")
    assert off == 0
    assert "weight_decay" not in task.space.names
    on, task = penalty(
        short, "cifar10", "hyperparameters.weight_decay.enabled=true", "hyperparameters.weight_decay.init=1"
    )
    assert len(task.space) == 16
    weights = [tensor for name, tensor in task.model.named_parameters() if name.endswith(".weight")]
    assert len(weights) == 8
    # At softplus(λ₀ + ε/2), about 1, and gates near zero, where the weights are nearly W.
    assert on == pytest.approx(0.5 * sum(tensor.square().sum().item() for tensor in weights), rel=0.3)


def test_one_key_drops_a_hyperparameter_and_what_it_regulates(short):
    decay, task = penalty(short, "fashion-mnist-small", "hyperparameters.weight_decay.enabled=false")
    assert decay == 0
    assert len(task.space) == 5
    dropped = "hyperparameters.conv_dropout.enabled=false"
    network = recipe("fashion-mnist-small").build(short("fashion-mnist-small", dropped)).model.network
    for dropout in (network.conv_dropout_1, network.conv_dropout_2):
        assert (type(dropout), dropout.p) == (torch.nn.Dropout2d, 0.0)
    assert network.last_dropout.name == "last_dropout"


def test_a_disabled_hyperparameter_stays_disabled_in_the_saved_configuration(short, tmp_path):
    config = short("fashion-mnist", "hyperparameters.cutout_holes.enabled=false")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(recipe("fashion-mnist").config(), str(file)).enabled == config.enabled


def test_cutout_with_only_one_of_its_hyperparameters_is_refused(short):
    with pytest.raises(UserError, match=r"cutout_holes"):
        checked_task(
            short("fashion-mnist", "hyperparameters.cutout_holes.enabled=false"), recipe("fashion-mnist").build
        )


def test_every_name_in_the_registry_is_its_recipe_s():
    assert all(recipe(name).config().recipe == name for name in RECIPES)
