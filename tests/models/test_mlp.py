import pytest
import torch

import stn_fast as stn
from stn_fast.models import mlp

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("input_dropout", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("hidden_dropout_2", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("input_noise", low=0.0, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-3),
    ]
)


def test_regularisers_are_those_the_space_names_and_draw_from_streams_of_their_own():
    full = mlp(SPACE)
    streams = [m.stream for m in full.modules() if isinstance(m, stn.PerExampleDropout | stn.PerExampleNoise)]
    assert len(set(streams)) == len(streams) == 4
    bare = mlp(stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)]))
    assert not any(isinstance(m, stn.PerExampleDropout | stn.PerExampleNoise) for m in bare.modules())


def test_at_its_initial_hyperparameters_it_is_a_plain_mlp():
    model, x = mlp(SPACE, (8, 16, 4)).eval(), torch.randn(5, 8)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    for linear, gated in zip((plain[0], plain[2]), model.layers, strict=True):
        linear.weight, linear.bias = gated.weight, gated.bias
    location, _ = SPACE.initial_state()
    assert torch.allclose(model(x, SPACE.at(location, batch_size=5)), plain(x), atol=1e-6)


@pytest.mark.parametrize("k", range(5))
def test_every_hyperparameter_gets_a_validation_gradient(k):
    torch.manual_seed(0)
    model = mlp(SPACE).eval().requires_grad_(False)
    location, raw_scale = (t.requires_grad_() for t in SPACE.initial_state())
    hyper = SPACE.sample(location, raw_scale, batch_size=20, seed=0, step=0)
    model(torch.randn(20, 64), hyper).square().mean().backward()
    assert location.grad[k] != 0
    assert raw_scale.grad[k] != 0


def test_too_few_sizes_are_refused():
    with pytest.raises(ValueError, match=r"sizes must have at least two.*got \(5,\)"):
        mlp(SPACE, (5,))
