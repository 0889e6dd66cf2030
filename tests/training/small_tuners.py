"""Small converted networks with a SelfTuner, for tests of its passes and of Δ-STN."""

from functools import partial

import torch
import torch.nn.functional as F
from random_response import respond
from torch import nn
from torch.utils.checkpoint import checkpoint

import stn_fast as stn

EXAMPLES = 13
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


def batch(seed, examples=EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 6, generator=generator), torch.randint(4, (examples,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 4))


def without_statistics():
    model = network()
    model[1] = nn.Identity()
    return model


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def tuner_of(model=None, loss=F.cross_entropy, make=MOMENTUM, **options):
    """With perturbations so wide that gradients of the response are divided."""
    tuned = respond(stn.convert(model or network(), quiet=True))
    tuned.tuned_hyperparameters.raw_scale.fill_(2.5)
    return stn.SelfTuner(tuned, make(tuned.parameters(), lr=0.05), loss, **options)


def assert_same_model(one, other):
    """Two models have the same state, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same(one, other):
    """Two tuners have the same models, hyperparameters and counts, bit for bit."""
    assert_same_model(one.model, other.model)
    assert (one.draws, one.trained, one.validated) == (other.draws, other.trained, other.validated)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    """The names of the parameters that are not as they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
