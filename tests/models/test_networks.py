"""The image networks: they are the plain ones at their initial hyperparameters, and respond everywhere else."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from random_response import respond

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.models import ImageClassifier, alexnet, fashion_cnn, resnet18, tuned, vgg16, wide_resnet
from stn_fast.models.classifier import channels_last
from stn_fast.training.methods import SelfTuning, check_streams
from stn_fast.training.task import classification_loss, outputs

wrn10 = partial(wide_resnet, depth=10, width=2)


def rates(*names):
    return stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, high=0.9, init=0.3) for name in names])


SPACES = {
    "alexnet": rates("conv_dropout_1", "conv_dropout_5", "fc_dropout_1", "fc_dropout_2"),
    "fashion_cnn": rates("conv_dropout", "last_dropout"),
    "vgg16": rates("conv_dropout_1", "conv_dropout", "fc_dropout_1", "fc_dropout_2", "last_dropout"),
    "resnet18": rates("block_dropout_1", "block_dropout", "last_dropout"),
    "wide_resnet": rates("block_dropout", "last_dropout"),
}
NETWORKS = {"alexnet": alexnet, "fashion_cnn": fashion_cnn, "vgg16": vgg16, "resnet18": resnet18, "wide_resnet": wrn10}
SIDES = {"alexnet": 32, "fashion_cnn": 28, "vgg16": 32, "resnet18": 16, "wide_resnet": 16}


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def images_for(name):
    return torch.randn(4, 1 if name == "fashion_cnn" else 3, SIDES[name], SIDES[name])


def build(name, rank=None):
    """The network with a response, its space and four images."""
    torch.manual_seed(0)
    space = SPACES[name]
    return respond(tuned(NETWORKS[name](), space, rank)), space, images_for(name)


def undrawn(make, space):
    """A tuned network whose weights are not drawn, which takes long."""
    with torch.device("meta"):
        network = make()
    return tuned(network.to_empty(device="cpu"), space)


def sampled(space, **kwargs):
    return space.sample(*space.initial_state(), batch_size=4, seed=0, step=0, **kwargs)


@pytest.mark.parametrize("rank", [None, 2])
def test_every_parameter_learns_from_a_training_step(name, rank):
    model, space, images = build(name, rank)
    layers = [module for module in model.modules() if isinstance(module, Converted) and hasattr(module, "weight")]
    norms = [layer for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(layer.response_rank == (None if layer in norms else rank) for layer in layers)
    assert len(layers) > len(norms)
    logits = outputs(model, sampled(space), images)
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter
        assert tensor.grad.any(), parameter


def test_every_hyperparameter_gets_a_validation_gradient(name):
    model, space, images = build(name)
    model.eval().requires_grad_(False)
    location, raw_scale = (t.requires_grad_() for t in space.initial_state())
    hyper = space.sample(location, raw_scale, batch_size=4, seed=0, step=0)
    F.cross_entropy(outputs(model, hyper, images), torch.arange(4)).backward()
    for gradient in (location.grad, raw_scale.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.all()


def test_folded_weights_give_what_one_row_for_each_example_gives(name):
    model, space, images = build(name)
    location, _ = space.initial_state()
    hyper = space.at(location + 1, batch_size=4)
    with torch.no_grad():
        model.eval()
        folded, rows = outputs(model, hyper, images), outputs(model, replace(hyper, shared=False), images)
        unresponsive = outputs(model, space.at(location, batch_size=4), images)
    assert relative_error(folded, rows) < 1e-5
    assert relative_error(unresponsive, rows) > 1e-2


def test_every_example_has_the_plain_network_of_its_own_hyperparameters(name):
    model, space, images = build(name)
    hyper, own = sampled(space), model.eval().tuned_hyperparameters
    with torch.no_grad():
        rows, found = outputs(model, hyper, images), []
        for b in (1, 2):
            own.location.copy_(space.initial_state()[0] + hyper.response[b])
            folded = stn.fold(model)
            assert not any(isinstance(module, Converted) for module in folded.modules())
            assert relative_error(folded(images[b : b + 1])[0], rows[b]) < 1e-5
            found.append(folded(images))
    assert relative_error(*found) > 1e-2


@pytest.mark.parametrize(
    ("make", "fixed", "each"),
    [
        (alexnet, 46_544_532, 18_708),
        (fashion_cnn, 4_978_260, 3_252),
        (partial(fashion_cnn, hidden=256), 834_964, 628),
        (vgg16, 30_498_708, 14_740),
        (resnet18, 22_347_924, 14_420),
        (wide_resnet, 72_958_388, 28_068),
    ],
)
def test_the_number_of_parameters_is_the_documented_one(make, fixed, each):
    for n in (1, 15):
        model = undrawn(make, rates(*(f"rate_{k}" for k in range(n))))
        assert sum(parameter.numel() for parameter in model.parameters()) == fixed + each * n
    documented = (make.func if isinstance(make, partial) else make).__doc__
    assert f"{fixed:,} + {each:,}·n" in " ".join(documented.split())
    responding = sum(
        tensor.numel()
        for parameter, tensor in model.named_parameters()
        if parameter.rpartition(".")[2] in ("weight", "bias")
    )
    assert responding == fixed // 2


# The plain networks, written from their papers' tables on the weights of the modules, in the order of their layers.


def plain_alexnet(w, x):
    for i, (stride, pool) in enumerate(((2, True), (1, True), (1, False), (1, False), (1, True)), start=1):
        x = F.relu(F.conv2d(x, *w(f"conv_{i}"), stride, 1))
        x = F.max_pool2d(x, 2) if pool else x
    return plain_head(w, x.flatten(1), 3)


def plain_fashion_cnn(w, x):
    for i in (1, 2):
        x = F.relu(F.max_pool2d(F.conv2d(x, *w(f"conv_{i}"), 1, 2), 2))
    return plain_head(w, x.flatten(1), 2)


def plain_vgg16(w, x):
    for i in range(1, 14):
        x = F.conv2d(x, w(f"conv_{i}.0")[0], padding=1)
        x = F.relu(normed(w, f"conv_{i}.1", x))
        x = F.max_pool2d(x, 2) if i in (2, 4, 7, 10, 13) else x
    return plain_head(w, x.flatten(1), 3)


def plain_resnet18(w, x):
    x = F.relu(normed(w, "first.1", F.conv2d(x, w("first.0")[0], padding=1)))
    for i in range(8):
        stride, block = 2 if i in (2, 4, 6) else 1, f"blocks.{i}.residual"
        y = F.relu(normed(w, f"{block}.norm_1", F.conv2d(x, w(f"{block}.conv_1")[0], None, stride, 1)))
        y = normed(w, f"{block}.norm_2", F.conv2d(y, w(f"{block}.conv_2")[0], padding=1))
        if stride == 2:
            x = normed(w, f"blocks.{i}.shortcut.1", F.conv2d(x, w(f"blocks.{i}.shortcut.0")[0], None, 2))
        x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), *w("linear"))


def plain_wide_resnet(w, x):
    x = F.conv2d(x, w("first.0")[0], padding=1)
    for i in range(3):
        stride, block = 2 if i else 1, f"blocks.{i}.residual"
        active = F.relu(normed(w, f"blocks.{i}.active.0", x))
        y = F.relu(normed(w, f"{block}.norm_2", F.conv2d(active, w(f"{block}.conv_1")[0], None, stride, 1)))
        x = F.conv2d(active, w(f"blocks.{i}.projection")[0], None, stride)
        x = x + F.conv2d(y, w(f"{block}.conv_2")[0], padding=1)
    return F.linear(F.relu(normed(w, "last.0", x)).mean((2, 3)), *w("linear"))


def plain_head(w, x, layers):
    for i in range(1, layers + 1):
        x = F.linear(F.relu(x) if i > 1 else x, *w(f"linear_{i}"))
    return x


def normed(w, layer, x):
    weight, bias = w(layer)
    return F.batch_norm(x, None, None, weight, bias, training=True)


def test_at_its_initial_hyperparameters_it_is_the_plain_network(name):
    # No layer is regularised by it, so that training mode, in which batch norm is compared, drops nothing.
    space = rates("weight_decay")
    torch.manual_seed(0)
    model, images = NETWORKS[name](), images_for(name)

    def weights(layer):
        return tuple(dict(model.get_submodule(layer).named_parameters()).get(part) for part in ("weight", "bias"))

    location, _ = space.initial_state()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, which would all be the same
                parameter.add_(torch.rand_like(parameter))
        expected = globals()[f"plain_{name}"](weights, images)
        assert relative_error(model(images), expected) < 1e-4
        found = outputs(respond(tuned(model, space)), space.at(location, batch_size=4), images)
    assert relative_error(found, expected) < 1e-4


def test_dropouts_are_those_that_the_space_names_each_with_a_stream_of_its_own(name):
    model = undrawn(NETWORKS[name], SPACES[name])
    found = {m.name for m in model.modules() if isinstance(m, stn.PerExampleDropout)}
    assert found == set(SPACES[name].names)
    check_streams(model)
    bare = undrawn(NETWORKS[name], rates("weight_decay"))
    assert not any(isinstance(m, stn.PerExampleDropout) for m in bare.modules())
    assert {m.p for m in bare.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)} == {0.0}


def test_a_specific_dropout_name_takes_precedence_over_the_shared_one():
    def names(model, count):
        return [getattr(model.get_submodule(f"conv_dropout_{i}"), "name", None) for i in range(1, count + 1)]

    assert names(undrawn(vgg16, SPACES["vgg16"]), 13) == ["conv_dropout_1"] + ["conv_dropout"] * 12
    assert names(undrawn(alexnet, SPACES["alexnet"]), 5) == ["conv_dropout_1", None, None, None, "conv_dropout_5"]


def test_a_place_draws_the_same_numbers_whatever_other_rates_there_are():
    some, every = rates("fc_dropout_2"), rates("conv_dropout", "fc_dropout_1", "fc_dropout_2")
    streams = [undrawn(alexnet, space).fc_dropout_2.stream for space in (some, every)]
    assert streams[0] == streams[1]


def test_a_rate_without_a_hyperparameter_is_kept():
    network = fashion_cnn(hidden=8)
    network.conv_dropout_2.p = 0.4
    model = tuned(network, rates("conv_dropout_1"))
    assert (type(model.conv_dropout_2), model.conv_dropout_2.p) == (torch.nn.Dropout2d, 0.4)


@pytest.mark.parametrize("wrong", ["hidden_dropout_1", "conv_dropout_3", "fc_dropout_3"])
def test_a_hyperparameter_that_nothing_uses_is_refused_at_the_first_step(wrong):
    space, batch = rates("conv_dropout_1", wrong), (images_for("fashion_cnn"), torch.arange(4))
    method = SelfTuning(tuned(fashion_cnn(hidden=8), space), space, classification_loss, classification_loss)
    with pytest.raises(ValueError, match=rf"nothing uses '{wrong}':"):
        method.train_step(batch, 0)


def test_a_space_whose_names_are_all_misspelt_is_refused_with_the_names_of_the_network():
    space, batch = rates("conv_droput_1", "hidden_dropout"), (images_for("fashion_cnn"), torch.arange(4))
    method = SelfTuning(tuned(fashion_cnn(hidden=8), space), space, classification_loss, classification_loss)
    offered = "conv_dropout_1, conv_dropout_2, fc_dropout_1, last_dropout"
    says = f"nothing uses 'conv_droput_1', 'hidden_dropout': .* Modules whose rate is no hyperparameter: {offered}."
    with pytest.raises(ValueError, match=says):
        method.train_step(batch, 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (partial(alexnet, image_size=14), "image_size must be >= 15.*got 14"),
        (partial(fashion_cnn, image_size=3), "image_size must be >= 4.*got 3"),
        (partial(vgg16, image_size=31), "image_size must be >= 32.*got 31"),
        (partial(wide_resnet, depth=27), "depth must be 6·k \\+ 4.*got 27"),
        (partial(wide_resnet, depth=4), "got 4"),
        (partial(wide_resnet, width=0), "width must be >= 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_smallest_images_fit():
    for make, side in ((alexnet, 15), (fashion_cnn, 4)):
        model = make(in_channels=2, image_size=side, classes=3)
        assert model(torch.randn(2, 2, side, side)).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_is_a_layout_that_torch_recognises(channels):
    x = torch.randn(2, channels, 6, 5)
    y = channels_last(x)
    assert torch.equal(x, y)
    plain = torch.nn.Conv2d(channels, 4, 3)
    assert plain(y).is_contiguous(memory_format=torch.channels_last)
    gated = stn.HyperConv2d(channels, 4, 3, num_hyperparameters=2)
    assert gated(y, torch.randn(2, 2)).is_contiguous(memory_format=torch.channels_last)
    assert gated(x, torch.randn(2, 2)).is_contiguous()


def test_an_image_classifier_takes_uint8_images_and_augments_by_the_strengths_in_its_space():
    space = rates("input_dropout", "last_dropout")
    model = ImageClassifier(space, fashion_cnn(), mean=(0.5,), std=(0.25,), image_size=28)
    assert model.augmentation.layer.names == ("input_dropout",)
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    normalised = (images / 255 - 0.5) / 0.25
    assert torch.allclose(model(images), model.network(normalised), atol=1e-5)
    model, hyper = respond(tuned(model, space)), sampled(space)
    assert (model.tuned_hyperparameters.space, model.network.last_dropout.name) == (space, "last_dropout")
    check_streams(model)
    seen, settings = [], dict(mean=(0.5,), std=(0.25,), stream=1)
    model.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    outputs(model, hyper, images)
    assert torch.equal(seen[0], stn.PerExampleAugmentation(["input_dropout"], **settings)(images, sampled(space)))
    assert not torch.allclose(seen[0], normalised, atol=1e-5)
    with model.eval().tuned_hyperparameters.using(hyper):
        assert torch.allclose(model(images), model.network(normalised), atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        outputs(model, hyper, images.float())


class Layout(torch.nn.Module):
    """Keeps the strides of what it is given."""

    def forward(self, x):
        self.seen = x.stride()
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_get_channels_last_images_on_every_device(device, channels, training):
    """CUDA included, where nothing but the fused convolution shows it: the meta device stands for one without it."""
    space = rates("weight_decay")
    for where in (device, "meta"):
        model = ImageClassifier(space, Layout(), mean=[0.5] * channels, std=[0.5] * channels)
        model = tuned(model, space).to(where).train(training)
        images = torch.zeros(2, channels, 5, 6, dtype=torch.uint8, device=where)
        outputs(model, space.at(space.initial_state(where)[0], batch_size=2), images)
        assert model.network.seen == (30 * channels, 1, 6 * channels, channels)
