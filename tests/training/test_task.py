"""The objectives: the training loss decays what is gated, the validation loss nothing."""

import pytest
import torch
import torch.nn.functional as F
from converted_networks import converted, plain, sampled
from torch import nn

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.training.task import classification_loss, decayed_classification_loss, with_weight_decay


class Network(nn.Module):
    """One gated convolution, one gated norm, one gated layer, and an LSTM that sees its activations in turn."""

    def __init__(self, n):
        super().__init__()
        self.conv = stn.HyperConv2d(2, 3, 3, num_hyperparameters=n)
        self.norm = stn.HyperBatchNorm2d(3, num_hyperparameters=n)
        self.lstm = stn.HyperLSTM(3, 3, num_hyperparameters=n)
        self.linear = stn.HyperLinear(3, 4, num_hyperparameters=n)

    def forward(self, x, hyper):
        pixels = self.norm(self.conv(x, hyper), hyper).flatten(2).permute(2, 0, 1)
        return self.linear(self.lstm(pixels, hyper)[0][-1], hyper)


def setting(*names):
    torch.manual_seed(0)
    space = stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, init=0.5) for name in names])
    model = Network(len(space)).eval()
    for name, parameter in model.named_parameters():
        if "weight_gate" in name:
            nn.init.normal_(parameter)
    hyper = space.sample(*space.initial_state(), batch_size=5, seed=0, step=0)
    return model, Split(torch.randn(5, 2, 6, 6), torch.randint(4, (5,))), hyper


def test_weight_decay_is_the_mean_over_the_weights_of_each_example():
    model, batch, hyper = setting("weight_decay", "input_noise")
    expected = F.cross_entropy(model(batch.inputs, hyper), batch.targets).double()
    for row, decay in zip(hyper.response, hyper["weight_decay"], strict=True):
        for layer, end in ((model.conv, ""), (model.linear, ""), (model.lstm, "_ih_l0"), (model.lstm, "_hh_l0")):
            names = (f"{name}{end}" for name in ("weight", "response_weight", "weight_gate"))
            weight, response, gate = (getattr(layer, name) for name in names)
            own = (weight + (gate @ row).view(-1, *[1] * (weight.ndim - 1)) * response).double()
            expected = expected + 0.5 * decay * own.square().sum() / len(hyper)
    assert decayed_classification_loss(model, batch, hyper).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_the_hyperparameter_weight_decay_nothing_is_decayed():
    model, batch, hyper = setting("input_noise")
    assert decayed_classification_loss(model, batch, hyper) == classification_loss(model, batch, hyper)


def test_a_weight_that_two_layers_share_is_decayed_once():
    tuned = converted(plain("text"))
    hyper = sampled(tuned)
    both = with_weight_decay(torch.zeros(()), tuned, hyper)
    decay = hyper["weight_decay"]
    layers = [tuned.embed, tuned.lstm]
    assert tuned.decoder.weight is tuned.embed.weight
    torch.testing.assert_close(both, sum(layer.weight_decay_penalty(hyper, decay) for layer in layers))
