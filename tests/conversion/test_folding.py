"""fold: plain modules that compute what the converted network does in evaluation mode."""

import warnings

import pytest
import torch
from converted_networks import NETWORKS, Text, converted, inputs, plain
from numerics import relative_error
from torch import nn

import stn_fast as stn


def folded(tuned):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a tied weight, which has a test of its own
        return stn.fold(tuned)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("response_rank", ["auto", None])
def test_the_plain_network_computes_the_same(kind, response_rank):
    tuned, x = converted(plain(kind, 0.3), response_rank=response_rank), inputs(kind)
    result = folded(tuned)
    original = plain(kind, 0.3)
    assert [type(module) for module in result.modules()] == [type(module) for module in original.modules()]
    assert result.state_dict().keys() == original.state_dict().keys()
    assert result.training
    assert relative_error(result.eval()(x), tuned.eval()(x)) < 1e-12
    assert relative_error(result(x), original.eval()(x)) > 1e-3


@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_of_the_conversion_is_left(kind):
    result, original = folded(converted(plain(kind, 0.3))), plain(kind, 0.3)
    for module, wanted in zip(result.modules(), original.modules(), strict=True):
        assert module.__dict__.keys() == wanted.__dict__.keys()
        assert module._parameters.keys() == wanted._parameters.keys()
    stn.convert(result, quiet=True)  # and so it can be converted again


def test_dropout_modules_have_the_tuned_rate():
    tuned = stn.convert(nn.ModuleList([nn.Dropout(0.2), nn.LSTM(2, 2, 2, dropout=0.4), nn.Dropout2d(0.3)]), quiet=True)
    own = tuned.tuned_hyperparameters
    own.location.add_(0.7)
    result = stn.fold(tuned)
    assert (result[0].p, result[1].dropout, result[2].p) == tuple(list(own.values().values())[:3])


def test_the_converted_network_is_unchanged_and_modes_are_kept():
    tuned = converted(plain("cnn", 0.3))
    tuned[1].eval()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    result = stn.fold(tuned)
    assert [module.training for module in result] == [True, False, *[True] * 7]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    result[0].weight.data.zero_()
    assert tuned[0].weight.any()


def test_tied_weights_with_different_values_are_separated_with_a_warning():
    tuned = converted(Text().double())
    with pytest.warns(UserWarning, match=r"fold: embed\.weight, decoder\.weight were one parameter"):
        result = stn.fold(tuned)
    assert result.embed.weight is not result.decoder.weight


def test_tied_weights_with_the_same_values_stay_tied():
    tuned = stn.convert(Text(), quiet=True)  # no response yet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = stn.fold(tuned)
    assert result.embed.weight is result.decoder.weight


def test_a_weight_tied_to_a_module_that_was_left_out_is_separated_too():
    model = Text().double()
    want = model.decoder.weight.clone()
    tuned = converted(model, exclude="decoder")
    with pytest.warns(UserWarning, match="were one parameter"):
        result = stn.fold(tuned)
    assert torch.equal(result.decoder.weight, want)
    assert not torch.equal(result.embed.weight, want)


def test_a_module_that_is_used_twice_is_folded_once():
    layer = nn.Linear(3, 3)
    tuned = converted(nn.Sequential(layer, nn.ReLU(), layer).double()).eval()
    x = torch.randn(4, 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = stn.fold(tuned)
    assert result[0] is result[2]
    assert relative_error(result(x), tuned(x)) < 1e-12


def test_a_single_layer_can_be_converted_and_folded():
    tuned, x = converted(nn.Linear(3, 2).double()).eval(), torch.randn(4, 3).double()
    result = stn.fold(tuned)
    assert type(result) is nn.Linear
    assert relative_error(result(x), tuned(x)) < 1e-12


def test_a_plain_network_is_refused():
    with pytest.raises(TypeError, match=r"fold: model must be one that stn\.convert has converted, got Linear"):
        stn.fold(nn.Linear(2, 2))
