"""The method that a configuration describes: what of its settings reaches it."""

import pytest
import torch

from stn_fast.data import Split
from stn_fast.recipes import digits
from stn_fast.training.build import build_method
from stn_fast.training.layering import resolve
from stn_fast.training.parameters import is_gate


def built(*pairs):
    config = resolve(digits.config(), None, pairs)
    return build_method(config, digits.build(config))


def gates_of(method):
    return torch.cat([p.detach().flatten() for name, p in method.model.named_parameters() if is_gate(name)])


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_number_of_passes_is_the_configured_one(antithetic):
    method = built(f"method.antithetic={str(antithetic).lower()}")
    assert method.antithetic == antithetic
    assert len(method._training_hypers(dict(batch_size=3, seed=0, step=0))) == 1 + antithetic


@pytest.mark.parametrize(("name", "deviation"), [("stn", 0.01), ("delta-stn", 0.0)])
def test_the_published_start_has_the_gates_of_each_paper(name, deviation):
    gates = gates_of(built(f"method.name={name}", "method.response_start=published"))
    assert gates.std().item() == pytest.approx(deviation, rel=0.1)
    assert torch.equal(gates, gates_of(built(f"method.name={name}", "method.response_start=published")))


def test_other_starts_and_fixed_networks_leave_the_layers_as_they_are():
    assert set(gates_of(built("method.response_start=zero")).tolist()) == {0.0, 1.0}
    assert set(gates_of(built("method.name=fixed")).tolist()) == {0.0, 1.0}


def steps_of(method):
    x, y = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    losses = [method.train_step(Split(x, y), step).item() for step in range(3)]
    if method.tunes:
        losses += [method.valid_step(Split(x, y), 3).item()]
    return losses


@pytest.mark.parametrize("name", ["delta-stn", "one-pass", "fixed"])
def test_a_raw_response_is_a_shifted_one_where_it_is_centred_or_has_no_effect(name):
    losses = [steps_of(built(f"method.name={name}", f"method.response={one}")) for one in ("raw", "shifted")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("name", "key"), [("adam", "betas"), ("rmsprop", "alpha")])
def test_beta2_is_the_decay_of_squared_gradients(name, key):
    group = built(f"hyper_optimizer.name={name}", "hyper_optimizer.beta2=0.75").hyper_optimizer.param_groups[0]
    assert (group[key][1] if key == "betas" else group[key]) == 0.75


@pytest.mark.parametrize("rank", ["null", "4"])
def test_a_published_response_is_drawn_apart_from_the_weights(rank):
    """The recipe draws W from the same seed."""
    method = built("method.response_start=published", f"method.response_rank={rank}")
    layers = [layer for layer in method.model if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        pairs = [(layer.weight, layer.response_projection if rank == "4" else layer.response_weight)]
        pairs += [(layer.bias, layer.response_bias)]
        for own, response in pairs:
            size = min(own.numel(), response.numel())
            both = torch.stack([own.detach().flatten()[:size], response.detach().flatten()[:size]])
            assert abs(torch.corrcoef(both)[0, 1]) < 5 / size**0.5
