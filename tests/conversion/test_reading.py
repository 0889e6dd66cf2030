"""Rates and parameters that a network reads itself, instead of calling the module that has them."""

import pytest
import torch
import torch.nn.functional as F
from converted_networks import sampled
from torch import nn

import stn_fast as stn
from stn_fast.conversion import check_rows


class Attention(nn.Module):
    """As of timm: one fused operation with a rate, or a softmax and a module."""

    def __init__(self, fused_attn=None):
        super().__init__()
        if fused_attn is not None:
            self.fused_attn = fused_attn
        self.qkv, self.attn_drop, self.proj_drop = nn.Linear(6, 18), nn.Dropout(0.2), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if getattr(self, "fused_attn", True):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            y = self.attn_drop((q @ k.mT).softmax(-1)) @ v
        return self.proj_drop(y)


class Indirect(nn.Module):
    """Reads the rate in a way that its code does not tell."""

    def __init__(self):
        super().__init__()
        self.qkv, self.attn_drop = nn.Linear(6, 18), nn.Dropout(0.2)

    def forward(self, x):
        return F.dropout(self.qkv(x), getattr(self.attn_drop, "p"), self.training)  # noqa: B009


class Bart(nn.Module):
    """As of transformers: rates are numbers; the second one is used elsewhere."""

    def __init__(self):
        super().__init__()
        self.dropout, self.drop_rate, self.activation_dropout, self.linear = 0.1, 0.2, 0.0, nn.Linear(6, 6)

    def forward(self, x):
        return F.dropout(F.dropout(self.linear(x), self.dropout, self.training), self.activation_dropout)


class Reading(nn.Module):
    """Passes the weight of its layer on, unless it is only asked for its dtype."""

    def __init__(self, reading):
        super().__init__()
        self.reading, self.layer = reading, nn.Linear(6, 6)

    def forward(self, x):
        if self.reading == "weight":
            return F.linear(x, self.layer.weight)
        if self.reading == "bias":
            return self.layer(x) + self.layer.bias[None]
        weight = self.layer.weight
        assert isinstance(weight, torch.Tensor)
        return self.layer(x.to(weight.device, weight.dtype).view(-1, weight.shape[1]))


class OwnTable(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = OwnTable(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens))


def reasons(model):
    return {entry.name: entry.reason for entry in model.tuned_hyperparameters.report}


@pytest.mark.parametrize("fused_attn", [None, True])
def test_a_dropout_module_whose_rate_is_passed_on_is_listed_and_not_tuned(fused_attn):
    model = nn.Sequential(Attention(fused_attn))
    assert stn.suggest_space(model).names == ("proj_drop", "weight_decay")
    tuned = stn.convert(model, quiet=True)
    reason = reasons(tuned)["0.attn_drop"]
    assert "Attention reads its rate, self.attn_drop.p, which stays the same for all examples" in reason
    assert ("set fused_attn = False" in reason) == bool(fused_attn)
    assert type(tuned[0].attn_drop) is nn.Dropout
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        tuned(torch.randn(4, 5, 6)).sum().backward()


def test_attention_that_is_not_fused_has_its_rate_tuned():
    tuned = stn.convert(nn.Sequential(Attention(False)), quiet=True)
    assert tuned.tuned_hyperparameters.space.names == ("attn_drop", "proj_drop", "weight_decay")
    hyper = sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        tuned(torch.randn(4, 5, 6))
    assert hyper.used.keys() >= {"attn_drop", "proj_drop"}


def test_the_rate_of_a_converted_dropout_module_cannot_be_read_in_training_or_set():
    tuned = stn.convert(nn.Sequential(Indirect()), quiet=True)
    with (
        tuned.tuned_hyperparameters.using(sampled(tuned)),
        pytest.raises(RuntimeError, match=r"0\.attn_drop \(Dropout\): its p is read in training.*exclude='0\.attn"),
    ):
        tuned(torch.randn(4, 6))
    with pytest.raises(AttributeError, match=r"0\.attn_drop \(Dropout\): p can't be set.*hyperparameter 'attn_drop'"):
        tuned[0].attn_drop.p = 0.0
    tuned.eval()(torch.randn(4, 6))
    assert tuned[0].attn_drop.p == tuned.tuned_hyperparameters.values()["attn_drop"]


def test_rates_that_are_numbers_are_listed():
    tuned = stn.convert(nn.Sequential(Bart()), quiet=True)
    want = "its dropout rate is a number, dropout = 0.1, which stays the same for all examples"
    assert reasons(tuned) == {"0.linear": None, "0": want}
    with pytest.raises(ValueError, match=r"0 \(Bart\): its dropout rate is a number"):
        stn.convert(nn.Sequential(Bart()), strict=True)


@pytest.mark.parametrize(("reading", "function"), [("weight", "linear"), ("bias", "__getitem__")])
def test_a_parameter_that_the_network_computes_with_itself_is_refused(reading, function):
    message = (
        rf"0\.layer \(Linear\) is not called where the model passes its {reading} to {function}.*exclude='0\.layer'"
    )
    with pytest.raises(ValueError, match=message):
        check_rows(stn.convert(nn.Sequential(Reading(reading)), quiet=True), torch.randn(4, 6))
    with pytest.raises(ValueError, match="no module can be converted"):
        stn.convert(nn.Sequential(Reading(reading)), exclude="0.layer")


def test_a_network_may_ask_for_the_shape_dtype_and_device_of_a_parameter():
    check_rows(stn.convert(nn.Sequential(Reading("metadata")), quiet=True), torch.randn(4, 6))


def test_a_plain_layer_may_read_its_parameter_that_is_tied_to_a_converted_one():
    tuned = stn.convert(nn.Sequential(Tied()), quiet=True)
    assert "subclass of Embedding" in reasons(tuned)["0.table"]
    check_rows(tuned, torch.arange(8).view(4, 2))
