"""The image networks: they are the plain ones at their initial hyperparameters, and respond everywhere else."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import stn_fast as stn
from stn_fast.models import ImageClassifier, alexnet, fashion_cnn, resnet18, vgg16, wide_resnet
from stn_fast.models.convnet import channels_last
from stn_fast.training.methods import check_streams

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


def build(name, space=None, **options):
    """The network, its space and four images."""
    torch.manual_seed(0)
    space = space or SPACES[name]
    images = torch.randn(4, 1 if name == "fashion_cnn" else 3, SIDES[name], SIDES[name])
    return NETWORKS[name](space, **options), space, images


def sampled(space, **kwargs):
    return space.sample(*space.initial_state(), batch_size=4, seed=0, step=0, **kwargs)


@pytest.mark.parametrize("rank", [None, 2])
def test_every_parameter_learns_from_a_training_step(name, rank):
    model, space, images = build(name, response_rank=rank)
    layers = [module for module in model.modules() if getattr(module, "response_rank", None)]
    assert bool(layers) == bool(rank)
    assert all(layer.response_rank == rank for layer in layers)
    logits = model(images, sampled(space))
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
    F.cross_entropy(model(images, hyper), torch.arange(4)).backward()
    for gradient in (location.grad, raw_scale.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.all()


def test_folded_weights_give_what_one_row_for_each_example_gives(name):
    model, space, images = build(name)
    location, _ = space.initial_state()
    hyper = space.at(location + 1, batch_size=4)
    with torch.no_grad():
        model.eval()
        folded, rows = model(images, hyper), model(images, replace(hyper, shared=False))
        unresponsive = model(images, space.at(location, batch_size=4))
    error = (folded - rows).norm() / rows.norm()
    assert error < 1e-5
    assert (unresponsive - rows).norm() / rows.norm() > 1e-2


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
    with torch.device("meta"):
        for n in (1, 15):
            model = make(rates(*(f"rate_{k}" for k in range(n))))
            assert sum(parameter.numel() for parameter in model.parameters()) == fixed + each * n
    documented = (make.func if isinstance(make, partial) else make).__doc__
    assert f"{fixed:,} + {each:,}·n" in documented
    responding = sum(
        tensor.numel()
        for parameter, tensor in model.named_parameters()
        if parameter.rpartition(".")[2] in ("weight", "bias")
    )
    assert responding == fixed // 2


# The plain networks, written from their papers' tables on the weights of the gated ones, in the order of their layers.


def plain_alexnet(w, x):
    for i, (stride, pool) in enumerate(((2, True), (1, True), (1, False), (1, False), (1, True))):
        x = F.relu(F.conv2d(x, *w(f"blocks.{i}.conv"), stride, 1))
        x = F.max_pool2d(x, 2) if pool else x
    return plain_head(w, x.flatten(1), 3)


def plain_fashion_cnn(w, x):
    for i in range(2):
        x = F.relu(F.max_pool2d(F.conv2d(x, *w(f"blocks.{i}.conv"), 1, 2), 2))
    return plain_head(w, x.flatten(1), 2)


def plain_vgg16(w, x):
    for i in range(13):
        x = F.conv2d(x, w(f"blocks.{i}.conv")[0], padding=1)
        x = F.relu(normed(w, f"blocks.{i}.norm", x))
        x = F.max_pool2d(x, 2) if i in (1, 3, 6, 9, 12) else x
    return plain_head(w, x.flatten(1), 3)


def plain_resnet18(w, x):
    x = F.relu(normed(w, "first_norm", F.conv2d(x, w("conv")[0], padding=1)))
    for i in range(8):
        stride = 2 if i in (2, 4, 6) else 1
        y = F.relu(normed(w, f"blocks.{i}.norm1", F.conv2d(x, w(f"blocks.{i}.conv1")[0], None, stride, 1)))
        y = normed(w, f"blocks.{i}.norm2", F.conv2d(y, w(f"blocks.{i}.conv2")[0], padding=1))
        if stride == 2:
            x = normed(w, f"blocks.{i}.projection_norm", F.conv2d(x, w(f"blocks.{i}.projection")[0], None, 2))
        x = F.relu(x + y)
    return plain_head(w, x.mean((2, 3)), 1)


def plain_wide_resnet(w, x):
    x = F.conv2d(x, w("conv")[0], padding=1)
    for i in range(3):
        stride = 2 if i else 1
        active = F.relu(normed(w, f"blocks.{i}.norm1", x))
        y = F.relu(normed(w, f"blocks.{i}.norm2", F.conv2d(active, w(f"blocks.{i}.conv1")[0], None, stride, 1)))
        x = F.conv2d(active, w(f"blocks.{i}.projection")[0], None, stride)
        x = x + F.conv2d(y, w(f"blocks.{i}.conv2")[0], padding=1)
    return plain_head(w, F.relu(normed(w, "last_norm", x)).mean((2, 3)), 1)


def plain_head(w, x, layers):
    for i in range(layers):
        x = F.linear(F.relu(x) if i else x, *w(f"head.layers.{i}"))
    return x


def normed(w, layer, x):
    weight, bias = w(layer)
    return F.batch_norm(x, None, None, weight, bias, training=True)


def test_at_its_initial_hyperparameters_it_is_the_plain_network(name):
    # No layer is regularised by it, so that training mode, in which batch norm is compared, drops nothing.
    model, space, images = build(name, rates("weight_decay"))

    def weights(layer):
        return tuple(dict(model.get_submodule(layer).named_parameters()).get(part) for part in ("weight", "bias"))

    location, _ = space.initial_state()
    with torch.no_grad():
        found = model(images, space.at(location, batch_size=4))
        expected = globals()[f"plain_{name}"](weights, images)
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_dropouts_are_those_that_the_space_names_each_with_a_stream_of_its_own(name):
    model, space, _ = build(name)
    found = {m.name for m in model.modules() if isinstance(m, stn.PerExampleDropout)}
    assert found == set(space.names)
    check_streams(model)
    with torch.device("meta"):
        bare = NETWORKS[name](rates("weight_decay"))
    assert not any(isinstance(m, stn.PerExampleDropout) for m in bare.modules())


def test_a_specific_dropout_name_takes_precedence_over_the_shared_one():
    with torch.device("meta"):
        model = vgg16(SPACES["vgg16"])
        alone = alexnet(SPACES["alexnet"])
    names = [block.dropout.name for block in model.blocks]
    assert names == ["conv_dropout_1"] + ["conv_dropout"] * 12
    assert [block.dropout and block.dropout.name for block in alone.blocks] == [
        "conv_dropout_1", None, None, None, "conv_dropout_5",
    ]  # fmt: skip


def test_a_place_draws_the_same_numbers_whatever_other_rates_there_are():
    with torch.device("meta"):
        some, all_ = alexnet(rates("fc_dropout_2")), alexnet(rates("conv_dropout", "fc_dropout_1", "fc_dropout_2"))
    assert some.head.dropouts[1].stream == all_.head.dropouts[1].stream


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
        make(rates("last_dropout"))


def test_the_smallest_images_fit():
    space = rates("last_dropout")
    location, _ = space.initial_state()
    for make, side in ((alexnet, 15), (fashion_cnn, 4)):
        model = make(space, in_channels=2, image_size=side, classes=3).eval()
        assert model(torch.randn(2, 2, side, side), space.at(location, batch_size=2)).shape == (2, 3)


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
    model = ImageClassifier(space, fashion_cnn(space), mean=(0.5,), std=(0.25,), image_size=28)
    assert model.augmentation.names == ("input_dropout",)
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    hyper = sampled(space)
    check_streams(model)
    assert not torch.equal(model(images, hyper), model.eval()(images, hyper))
    expected = model.network((images / 255 - 0.5) / 0.25, hyper)
    assert torch.allclose(model(images, hyper), expected, atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        model(images.float(), hyper)


class Layout(torch.nn.Module):
    """Keeps the strides of what it is given."""

    def forward(self, x, hyper):
        self.seen = x.stride()
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_get_channels_last_images_on_every_device(device, channels, training):
    """CUDA included, where nothing but the fused convolution shows it: the meta device stands for one without it."""
    space = rates("conv_dropout")
    for where in (device, "meta"):
        model = ImageClassifier(space, Layout(), mean=[0.5] * channels, std=[0.5] * channels).to(where).train(training)
        images = torch.zeros(2, channels, 5, 6, dtype=torch.uint8, device=where)
        model(images, space.at(space.initial_state(where)[0], batch_size=2))
        assert model.network.seen == (30 * channels, 1, 6 * channels, channels)
