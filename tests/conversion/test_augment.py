"""Augment: a plain layer that normalises, which convert makes one of augmentation with tuned strengths."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast import functional

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
STRENGTHS = dict(rotation=8.0, brightness=0.3, cutout_length=2, cutout_holes=1, input_noise=0.2)


def augment(**options):
    return stn.Augment(**(dict(mean=MEAN, std=STD, flip=0.5, crop_padding=1, image_size=5) | STRENGTHS | options))


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(augment(**options), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(64, 3))


def images(examples=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (examples, 3, 5, 5), dtype=torch.uint8, generator=generator)


def normalised(x):
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (x / 255 - mean) / std


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_one_normalises_in_both_modes(training):
    torch.testing.assert_close(augment().train(training)(images()), normalised(images()))


def test_the_strengths_join_the_space_with_their_ranges():
    space = stn.suggest_space(network(hue=0.1, shear=3.0, input_dropout=0.2))
    bounds = {one.name: (one.high, one.init, one.integer) for one in space}
    assert bounds == {
        "rotation": (None, 8.0, False),
        "brightness": (None, 0.3, False),
        "cutout_length": (5, 2, True),
        "cutout_holes": (24.0, 1, True),
        "input_noise": (None, 0.2, False),
        "hue": (0.5, 0.1, False),
        "shear": (80.0, 3.0, False),
        "input_dropout": (0.95, 0.2, False),
        "weight_decay": (None, 1e-4, False),
    }
    assert all(one.low == 0 and one.scale == 1 for one in space)
    tuned = stn.convert(network(), [stn.Dropout("1")], quiet=True)
    assert tuned.tuned_hyperparameters.space.names == (*STRENGTHS, "weight_decay", "dropout_1")


def test_in_training_every_image_is_augmented_with_its_own_strengths():
    tuned, x = converted(network()), images()
    hyper = sampled(tuned, step=6)
    with tuned.tuned_hyperparameters.using(hyper):
        y = tuned[0](x)
        assert torch.equal(tuned.eval()[0](x), network()[0](x))
    strengths = {name: hyper[name] for name in STRENGTHS}
    where = dict(seed=0, step=6, stream=tuned[0].layer.stream, flip=0.5, crop_padding=1)
    assert torch.equal(y, functional.augment(x, strengths, mean=MEAN, std=STD, **where))
    assert relative_error(y, normalised(x)) > 0.1
    with pytest.raises(RuntimeError, match=r"0 \(Augment\) is in training mode"):
        tuned.train()(x)


def test_its_stream_is_its_own():
    tuned = stn.convert(nn.Sequential(augment(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(75, 2)), quiet=True)
    assert (tuned[0].layer.stream, tuned[2].stream) == (1, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_states(copied):
    tuned = converted(network())
    twin, x = copied(tuned), images()
    with tuned.tuned_hyperparameters.using(sampled(tuned)), twin.tuned_hyperparameters.using(sampled(twin)):
        assert torch.equal(twin(x), tuned(x))
    assert not [name for name in tuned.state_dict() if name.startswith("0.")]


def test_folding_gives_it_back():
    tuned, x = converted(network()), images()
    plain, original = stn.fold(tuned), network()
    for module, wanted in zip(plain.modules(), original.modules(), strict=True):
        assert type(module) is type(wanted)
        assert module.__dict__.keys() == wanted.__dict__.keys()
    torch.testing.assert_close(plain.eval()(x), tuned.eval()(x))
    stn.convert(plain, quiet=True)


def test_a_compiled_model_augments_the_same_without_a_graph_break():
    tuned, x = converted(nn.Sequential(augment(), nn.Flatten(), nn.Linear(75, 3))), images()
    torch._dynamo.reset()
    compiled, found = torch.compile(tuned, fullgraph=True, backend="eager"), []
    for model in (compiled, tuned):
        with tuned.tuned_hyperparameters.using(sampled(tuned)):
            found.append(model(x))
    torch.testing.assert_close(*found)
    tuned.eval()
    torch.testing.assert_close(compiled(x), tuned(x))
    torch._dynamo.reset()


def test_steps_train_on_augmented_images_and_tune_the_strengths():
    tuned, x, y = converted(network()), images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(tuned)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 1.0), F.cross_entropy, clip=None, antithetic=False,
        tune_scales=False, hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, 1.0))  # fmt: skip
    loss = tuner.train_step((x, y))
    own = before.tuned_hyperparameters
    hyper = own.space.sample(own.location, own.raw_scale, batch_size=6, seed=0, step=0)
    strengths = {name: hyper[name] for name in STRENGTHS}
    seen = functional.augment(x, strengths, mean=MEAN, std=STD, seed=0, step=0, stream=1, flip=0.5, crop_padding=1)
    with own.using(hyper):
        want = F.cross_entropy(before[1:4](seen), y)
    want = want + sum(before[k].weight_decay_penalty(hyper, hyper["weight_decay"]) for k in (1, 3))
    torch.testing.assert_close(loss, want.detach())
    own = tuned.tuned_hyperparameters
    location, plain = own.location.clone().requires_grad_(), copy.deepcopy(tuned).eval()
    with plain.tuned_hyperparameters.using(own.space.at(location, batch_size=6)):
        (wanted,) = torch.autograd.grad(F.cross_entropy(plain[1:4](normalised(x)), y), location)
    tuner.valid_step((x, y))
    assert wanted.all()
    assert relative_error(location.detach() - own.location, wanted) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rotate=3.0), "^Augment has no strength 'rotate'"),
        (dict(rotation=0.0), "'rotation': init=0.0 must be strictly inside"),
        (dict(hue=0.5), "'hue': init=0.5 must be strictly inside"),
        (dict(std=(0.0, 1.0, 1.0)), "^Augment: std must be > 0"),
        (dict(image_size=None), "cutout needs cutout_length, cutout_holes and image_size.*image_size=None"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        augment(**options)
    with pytest.raises(ValueError, match="got cutout_holes and image_size=5"):
        stn.Augment(mean=MEAN, std=STD, image_size=5, cutout_holes=2)


def test_wrong_models_and_spaces_are_refused():
    space = stn.HyperparameterSpace([one for one in stn.suggest_space(network()) if one.name != "rotation"])
    model = network()
    with pytest.raises(ValueError, match=r"the space lacks rotation, which stn\.Augment needs"):
        stn.convert(model, space)
    assert type(model[0]) is stn.Augment
    with pytest.raises(ValueError, match=r"a model can have one stn\.Augment, got 0, 1"):
        stn.convert(nn.Sequential(augment(), augment(), nn.Linear(5, 5)))
    tuned = stn.convert(model, exclude="0", quiet=True)
    assert tuned.tuned_hyperparameters.space.names == ("weight_decay",)
    with pytest.raises(ValueError, match=r"^Augment: x must be uint8 images"):
        model[0](torch.rand(2, 3, 5, 5))
