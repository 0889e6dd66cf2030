import pytest
import torch
from numerics import assert_twice_as_good, relative_error

import stn_fast as stn
from stn_fast.ops import gated_conv2d as operation

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("a", init=0.0), stn.Hyperparameter("b", low=0.0, init=1.0)])
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2)),
    dict(kernel_size=3, padding="valid", bias=False),
    *(
        dict(kernel_size=(3, 4), padding=padding, padding_mode=mode)
        for padding in ((2, 1), "same")
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    dict(kernel_size=3, padding="same", groups=2),
    dict(kernel_size=3, padding=1, relu=True),
]


def sampled(batch, step=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=0, step=step)


def layer_of(inputs=4, outputs=6, num_hyperparameters=2, **options):
    torch.manual_seed(0)
    return stn.HyperConv2d(inputs, outputs, num_hyperparameters=num_hyperparameters, **options)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_every_example_has_the_convolution_of_its_own_filters(options):
    """Against torch.nn.Conv2d with each example's folded filters, by the 2x rule to the same in float64."""
    layer, hyper, x = layer_of(**options), sampled(3), torch.randn(3, 4, 9, 8)
    double = layer_of(**options).double()
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    plain, exact = (
        torch.cat([of.fold(hyper.response[b])(x[b : b + 1].to(of.weight)) for b in range(3)]) for of in (layer, double)
    )
    assert_twice_as_good(layer(x, hyper), plain, exact)


def test_parameters_are_named_and_shaped_as_in_torch():
    layer, plain = layer_of(kernel_size=(3, 2), groups=2), torch.nn.Conv2d(4, 6, (3, 2), groups=2)
    assert not layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randn(3, 4, 9, 8)
    assert relative_error(layer(x, torch.zeros(3, 2)), plain(x)) < 1e-6
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == dict(
        weight=(6, 2, 3, 2), response_weight=(6, 2, 3, 2), weight_gate=(6, 2), bias=(6,), response_bias=(6,),
        bias_gate=(6, 2),
    )  # fmt: skip
    assert {n for n, _ in layer_of(kernel_size=3, bias=False).named_parameters()} == {
        "weight", "response_weight", "weight_gate",
    }  # fmt: skip


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_fold_gives_the_same_plain_layer(options):
    layer, x = layer_of(**options).double(), torch.randn(3, 4, 9, 8, dtype=torch.float64)
    response = torch.tensor([0.3, -0.2], dtype=torch.float64)
    plain = layer.fold(response)
    assert type(plain) is (torch.nn.Sequential if layer.relu else torch.nn.Conv2d)
    assert relative_error(plain(x), layer(x, response.expand(3, 2))) < 1e-14
    assert not any(p.is_meta for p in plain.parameters())


def test_shared_hyperparameters_run_folded_with_half_the_arithmetic():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = layer_of(8, 16, kernel_size=3, relu=True), torch.randn(10, 8, 9, 9)
    shared = SPACE.at(SPACE.initial_state()[0] + 0.5, batch_size=10)
    assert relative_error(layer(x, shared), layer(x, shared.response.clone())) < 1e-6
    with FlopCounterMode(display=False) as counter:
        layer(x, shared)
    assert counter.get_total_flops() < 1.1 * 2 * 10 * 49 * 16 * 8 * 9


def test_weight_decay_is_that_of_each_examples_effective_filters():
    layer, hyper, decay = layer_of(kernel_size=3), sampled(3), torch.rand(3)
    want = sum(0.5 * decay[b] * layer.fold(hyper.response[b]).weight.square().sum() for b in range(3))
    assert relative_error(layer.weight_decay_penalty(hyper, decay), want / 3) < 1e-6


def test_channels_last_stays_channels_last():
    layer = layer_of(kernel_size=3, padding_mode="reflect", padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    y = layer(x, sampled(3))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, layer(x.contiguous(), sampled(3))) < 1e-6


def test_relu_is_that_of_the_layer_without_it():
    with_relu, without = layer_of(kernel_size=3, relu=True), layer_of(kernel_size=3)
    x, hyper = torch.randn(3, 4, 9, 8), sampled(3)
    assert torch.equal(with_relu(x, hyper), without(x, hyper).relu())
    assert relative_error(without(x, hyper), operation.reference(x, without.gated_parameters, hyper.response)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(in_channels=0), "in_channels must be an int >= 1.*got 0"),
        (dict(out_channels=-1), "out_channels must be an int >= 1.*got -1"),
        (dict(num_hyperparameters=0), "num_hyperparameters must be an int >= 1.*got 0"),
        (dict(groups=3), "in_channels must be divisible by groups=3, got 4"),
        (dict(groups=4), "out_channels must be divisible by groups=4, got 6"),
        (dict(kernel_size=3.0), "kernel_size as an int or a pair of them, at least 1; got 3.0"),
        (dict(kernel_size=0), "kernel_size as an int or a pair of them, at least 1; got 0"),
        (dict(stride=(1, 2, 3)), r"stride as an int or a pair of them, at least 1; got \(1, 2, 3\)"),
        (dict(padding=-1), "padding as an int or a pair of them, at least 0; got -1"),
        (dict(padding="full"), "padding must be numbers, 'same' or 'valid', got 'full'"),
        (dict(padding="same", stride=2), "padding='same' requires stride 1, as in torch, got stride=2"),
        (dict(padding_mode="mirror"), "padding_mode must be one of .*'reflect'.*, got 'mirror'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        stn.HyperConv2d(**(dict(in_channels=4, out_channels=6, kernel_size=3, num_hyperparameters=2) | change))


def test_wrong_arguments_are_named_in_the_error():
    layer = layer_of(kernel_size=3)
    for hyper in (sampled(3), SPACE.at(SPACE.initial_state()[0], batch_size=3)):
        with pytest.raises(ValueError, match=r"HyperBatch has 3 examples, but x \(4, 4, 9, 9\) has 4"):
            layer(torch.randn(4, 4, 9, 9), hyper)
    with pytest.raises(ValueError, match=r"HyperConv2d has num_hyperparameters=2, but hyper has 3"):
        layer(torch.randn(4, 4, 9, 9), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, I, H, W\) with I = in_channels=4, got \(4, 5, 9, 9\)"):
        layer(torch.randn(4, 5, 9, 9), sampled(4))
    with pytest.raises(ValueError, match=r"response must have shape \(2,\), got \(3,\)"):
        layer.fold(torch.zeros(3))
