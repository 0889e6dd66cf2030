import pytest
import torch
from flops import flops_of
from numerics import relative_error

import stn_fast as stn
from stn_fast.ops import gated_linear

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("a", init=0.0), stn.Hyperparameter("b", low=0.0, init=1.0)])


def sampled(batch, step=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=0, step=step)


@pytest.mark.parametrize("bias", [True, False])
def test_computes_the_formula_with_its_own_parameters(bias):
    layer, hyper, x = stn.HyperLinear(5, 7, bias, num_hyperparameters=2), sampled(4), torch.randn(4, 5)
    assert relative_error(layer(x, hyper), gated_linear.reference(x, layer.gated_parameters, hyper.response)) < 1e-6
    assert torch.equal(layer(x, hyper.response), layer(x, hyper))
    names = {"weight", "response_weight", "weight_gate"} | ({"bias", "response_bias", "bias_gate"} if bias else set())
    assert set(dict(layer.named_parameters())) == names


def test_a_plain_checkpoint_loads_into_it():
    plain, layer = torch.nn.Linear(5, 7), stn.HyperLinear(5, 7, num_hyperparameters=2)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    x = torch.randn(3, 5)
    assert relative_error(layer(x, torch.zeros(3, 2)), plain(x)) < 1e-6


def test_fold_gives_the_same_plain_layer():
    layer, x = stn.HyperLinear(5, 7, num_hyperparameters=2).double(), torch.randn(4, 5, dtype=torch.float64)
    response = torch.tensor([0.3, -0.2], dtype=torch.float64)
    plain = layer.fold(response)
    assert type(plain) is torch.nn.Linear
    assert relative_error(plain(x), layer(x, response.expand(4, 2))) < 1e-14
    assert stn.HyperLinear(5, 7, False, num_hyperparameters=2).fold(torch.zeros(2)).bias is None


def test_shared_hyperparameters_run_folded_with_half_the_arithmetic(monkeypatch):
    layer, x = stn.HyperLinear(50, 70, num_hyperparameters=2), torch.randn(40, 50)
    location = SPACE.initial_state()[0] + 0.5
    shared = SPACE.at(location, batch_size=40)
    assert relative_error(layer(x, shared), layer(x, shared.response.clone())) < 1e-6
    assert 0 < flops_of(lambda: layer(x, shared)) < 1.1 * 2 * 40 * 50 * 70
    monkeypatch.setattr(gated_linear, "linear", lambda *operands: pytest.fail("rows of their own are not folded"))
    layer(x, shared.response.clone())


def test_a_sequence_uses_one_row_of_h_per_example():
    layer, hyper = stn.HyperLinear(5, 7, num_hyperparameters=2), sampled(4)
    x = torch.randn(4, 6, 5)
    time_first = layer(x.transpose(0, 1), hyper, example_dim=1)
    assert torch.allclose(layer(x, hyper), time_first.transpose(0, 1), atol=1e-6)


def test_double_precision_layer_takes_a_hyperbatch():
    layer = stn.HyperLinear(5, 7, num_hyperparameters=2, dtype=torch.float64)
    assert layer(torch.randn(4, 5, dtype=torch.float64), sampled(4)).dtype == torch.float64


def test_weight_decay_is_that_of_each_examples_effective_weights():
    layer, hyper, decay = stn.HyperLinear(5, 7, num_hyperparameters=2), sampled(3), torch.rand(3)
    want = sum(
        0.5
        * decay[b]
        * (layer.weight + (layer.weight_gate @ hyper.response[b])[:, None] * layer.response_weight).square().sum()
        for b in range(3)
    )
    assert relative_error(layer.weight_decay_penalty(hyper, decay), want / 3) < 1e-6


@pytest.mark.parametrize("change", [dict(in_features=0), dict(out_features=-1), dict(num_hyperparameters=0)])
def test_sizes_below_one_are_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1.*got {change[name]}"):
        stn.HyperLinear(**(dict(in_features=2, out_features=2, num_hyperparameters=2) | change))


def test_wrong_arguments_are_named_in_the_error():
    layer = stn.HyperLinear(5, 7, num_hyperparameters=2)
    for hyper in (sampled(3), SPACE.at(SPACE.initial_state()[0], batch_size=3)):
        with pytest.raises(ValueError, match=r"HyperBatch has 3 examples, but x \(4, 5\) has 4"):
            layer(torch.randn(4, 5), hyper)
    with pytest.raises(ValueError, match=r"num_hyperparameters=2, but hyper has 3"):
        layer(torch.randn(4, 5), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"I = in_features=5, got \(4, 6\)"):
        layer(torch.randn(4, 6), sampled(4))
    with pytest.raises(ValueError, match=r"response must have shape \(2,\), got \(3,\)"):
        layer.fold(torch.zeros(3))
