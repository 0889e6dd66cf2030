import pytest
import torch
from numerics import relative_error

import stn_fast as stn

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("a", init=0.0), stn.Hyperparameter("b", low=0.0, init=1.0)])


def sampled(batch, step=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=0, step=step)


def layer_of(features=5, dtype=torch.float64, **options):
    """A layer whose parameters and statistics are all other than they start."""
    torch.manual_seed(0)
    layer = stn.HyperBatchNorm2d(features, num_hyperparameters=2, dtype=dtype, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def images(batch=4, features=5):
    return torch.randn(batch, features, 6, 7, dtype=torch.float64) * 3 + 1


def written_out(layer, x, response):
    """The formula of section 2.1 on activations normalised here."""
    if layer.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, variance = layer.running_mean, layer.running_var
    normal = (x - mean[:, None, None]) / (variance + layer.eps).sqrt()[:, None, None]
    scale = layer.weight + (response @ layer.weight_gate.T) * layer.response_weight
    shift = layer.bias + (response @ layer.bias_gate.T) * layer.response_bias
    return normal * scale[:, :, None, None] + shift[:, :, None, None]


@pytest.mark.parametrize("training", [True, False])
def test_computes_the_formula_and_all_its_gradients(training):
    layer, x, response = layer_of().train(training), images().requires_grad_(), torch.randn(4, 2, dtype=torch.float64)
    response.requires_grad_()
    leaves = [x, response, *layer.parameters()]
    want, dy = written_out(layer, x, response), images()
    expected = torch.autograd.grad(want, leaves, dy)
    y = layer(x, response)
    assert relative_error(y, want) < 1e-13
    for got, wish in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert relative_error(got, wish) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_shared_hyperparameters_give_the_plain_layer(training):
    layer, x = layer_of().train(training), images()
    shared = SPACE.at(SPACE.initial_state()[0] + 0.5, batch_size=4)
    rows = shared.response.double()
    plain = layer.fold(rows[0])
    assert type(plain) is torch.nn.BatchNorm2d
    assert plain.training is training
    want = plain(x)
    assert relative_error(layer(x, shared), want) < 1e-6  # a HyperBatch is float32
    assert relative_error(layer(x, rows[0]), want) < 1e-13
    assert relative_error(layer(x, rows), want) < 1e-13


def test_folded_statistics_are_a_copy():
    layer = layer_of()
    plain, before = layer.fold(torch.zeros(2)), layer.running_mean.clone()
    plain.train()(images())
    assert torch.equal(layer.running_mean, before)
    assert not torch.equal(plain.running_mean, before)


def test_running_statistics_come_only_from_perturbed_training_batches():
    """Behind a layer that responds, each training pass moves them as torch.nn does on the activations it had."""
    torch.manual_seed(0)
    convolution, layer = stn.HyperConv2d(3, 5, 3, num_hyperparameters=2), layer_of(dtype=torch.float32)
    with torch.no_grad():
        convolution.weight_gate.normal_()
    plain = torch.nn.BatchNorm2d(5)
    plain.load_state_dict({name: layer.state_dict()[name].clone() for name in plain.state_dict()})
    for step in range(3):
        x, perturbed = torch.randn(8, 3, 6, 6), sampled(8, step)
        activations = convolution(x, perturbed)
        layer(activations, perturbed)
        plain(activations)
        unperturbed = convolution(x, SPACE.at(SPACE.initial_state()[0], batch_size=8))
        assert relative_error(unperturbed.mean((0, 2, 3)), activations.mean((0, 2, 3))) > 1e-3
    assert layer.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), getattr(plain, name))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()(activations, perturbed)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_plain_checkpoint_loads_into_it_and_starts_as_the_identity():
    plain, layer = torch.nn.BatchNorm2d(5), stn.HyperBatchNorm2d(5, num_hyperparameters=2)
    assert torch.equal(layer.weight, torch.ones(5))
    assert torch.equal(layer.bias, torch.zeros(5))
    plain.running_mean.normal_()
    assert not layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = images().float()
    assert relative_error(layer.eval()(x, torch.zeros(4, 2)), plain.eval()(x)) < 1e-6


def test_momentum_and_eps_are_those_of_torch():
    layer, plain = layer_of(momentum=0.3, eps=0.1), torch.nn.BatchNorm2d(5, 0.1, 0.3, dtype=torch.float64)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    x, zero = images(), torch.zeros(4, 2, dtype=torch.float64)
    assert relative_error(layer(x, zero), plain(x)) < 1e-13
    assert torch.equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_16_bit_activations_keep_their_dtype(training):
    layer, x, response = layer_of(dtype=torch.float32).train(training), images().float(), torch.randn(4, 2)
    want = written_out(layer, x, response)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16(), response)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, want) < 2**-6


@pytest.mark.parametrize("training", [True, False])
def test_the_tangent_is_right_and_does_not_change_the_statistics(training):
    before = {name: value.clone() for name, value in layer_of().state_dict().items()}
    layer, x, response = layer_of().train(training), images(), torch.randn(4, 2, dtype=torch.float64)
    direction = torch.randn_like(response)
    _, got = torch.func.jvp(lambda h: layer(x, h), (response,), (direction,))
    _, want = torch.func.jvp(lambda h: written_out(layer, x, h), (response,), (direction,))
    assert relative_error(got, want) < 1e-12
    direction = torch.randn_like(x)
    _, got = torch.func.jvp(lambda x_: layer(x_, response), (x,), (direction,))
    _, want = torch.func.jvp(lambda x_: written_out(layer, x_, response), (x,), (direction,))
    assert relative_error(got, want) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_channels_last_stays_channels_last():
    layer, x = layer_of(), images().contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        y = layer.train(training)(x, torch.zeros(4, 2, dtype=torch.float64))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_scale_and_shift_are_not_decayed():
    penalty = layer_of(dtype=torch.float32).weight_decay_penalty(sampled(4), torch.ones(4))
    assert penalty.shape == ()
    assert penalty == 0


def test_statistics_of_a_batch_of_one_are_refused():
    layer = layer_of()
    for batch in (0, 1):
        with pytest.raises(ValueError, match=rf"at least 2 examples in training mode, got {batch} \(use a larger"):
            layer(images(batch), torch.zeros(batch, 2, dtype=torch.float64))
    assert layer.num_batches_tracked == 0
    layer.eval()(images(1), torch.zeros(1, 2, dtype=torch.float64))


def test_wrong_arguments_are_named_in_the_error():
    layer = layer_of(dtype=torch.float32)
    x = images().float()
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) with C = num_features=5, got \(4, 3, 6, 7\)"):
        layer(images(features=3).float(), sampled(4))
    for wrong in (x.double(), x.to(torch.uint8)):
        for training in (True, False):
            with pytest.raises(ValueError, match=rf"has torch.float32 parameters, but x is {wrong.dtype}; cast one"):
                layer.train(training)(wrong, sampled(4))
    with pytest.raises(ValueError, match=r"has torch.float64 parameters, but x is torch.float32; cast one"):
        layer_of()(x, sampled(4))
    layer.train()
    with pytest.raises(ValueError, match=r"HyperBatch has 3 examples, but x \(4, 5, 6, 7\) has 4"):
        layer(x, sampled(3))
    with pytest.raises(ValueError, match=r"h must be \(B, n\) or \(n,\) for x \(4, 5, 6, 7\), got \(3, 2\)"):
        layer(x, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"num_hyperparameters=2, but hyper has 3"):
        layer(x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"num_features must be an int >= 1.*got 0"):
        stn.HyperBatchNorm2d(0, num_hyperparameters=2)


def test_without_a_momentum_the_statistics_are_the_average_over_all_batches():
    """As torch.nn.BatchNorm2d(momentum=None) has them, in evaluation and after a checkpoint too."""
    layer, plain = layer_of(momentum=None), torch.nn.BatchNorm2d(5, momentum=None, dtype=torch.float64)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    zero, batches = torch.zeros(4, 2, dtype=torch.float64), [images() for _ in range(4)]
    for x in batches[:3]:
        assert relative_error(layer(x, zero), plain(x)) < 1e-13
    assert relative_error(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches[:3]]).mean(0)) < 1e-13
    again = stn.HyperBatchNorm2d(5, momentum=None, num_hyperparameters=2, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert relative_error(again(batches[3], zero), plain(batches[3])) < 1e-13
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(again, name), getattr(plain, name))
    assert relative_error(again.eval()(batches[0], zero), plain.eval()(batches[0])) < 1e-13
    assert again.fold(torch.zeros(2)).momentum is None


def test_without_a_momentum_a_transform_leaves_the_statistics_alone():
    layer, response = layer_of(momentum=None), torch.zeros(4, 2, dtype=torch.float64)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.func.jvp(lambda h: layer(images(), h), (response,), (response,))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 10, "0.1", float("nan"), True])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="HyperBatchNorm2d: momentum must be"):
        stn.HyperBatchNorm2d(5, momentum=momentum, num_hyperparameters=2)
    for edge in (0, 1, 0.0, 1.0):
        stn.HyperBatchNorm2d(5, momentum=edge, num_hyperparameters=2)(images().float(), sampled(4))


@pytest.mark.parametrize("eps", [-1e-5, "0", None])
def test_a_negative_eps_is_refused(eps):
    with pytest.raises(ValueError, match="HyperBatchNorm2d: eps must be"):
        stn.HyperBatchNorm2d(5, eps=eps, num_hyperparameters=2)


def test_conversion_to_sync_batch_norm_leaves_the_layer_working():
    layer, x = layer_of(), images()
    model = torch.nn.ModuleList([layer, torch.nn.BatchNorm2d(5)])
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0] is layer
    assert isinstance(converted[1], torch.nn.SyncBatchNorm)
    response = torch.randn(4, 2, dtype=torch.float64)
    assert relative_error(converted[0](x, response), written_out(layer, x, response)) < 1e-13


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_autocast_around_either_pass_changes_nothing_of_float32(training, shared):
    """torch.nn.BatchNorm2d stays in float32 under autocast, and so does what makes scale and shift."""
    layer, x = layer_of(dtype=torch.float32).train(training), images().float().requires_grad_()
    response = torch.randn(2) if shared else torch.randn(4, 2)
    response.requires_grad_()
    leaves, dy = [x, response, *layer.parameters()], images().float()

    def results(forward, backward):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
            y = layer(x, response)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
            return y, *torch.autograd.grad(y, leaves, dy)

    want = results(False, False)
    for forward, backward in ((True, False), (False, True), (True, True)):
        assert all(map(torch.equal, results(forward, backward), want))
