"""Dropout that the code of a network calls as a function is listed, because it is not tuned."""

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from torch import nn
from torch.nn.functional import dropout as drop

import stn_fast as stn


class Calling(nn.Module):
    """Calls what it is tested with on the output of its layer."""

    def __init__(self, p=0.3, bias=False):
        super().__init__()
        self.linear, self.p, self.settings = nn.Linear(6, 6), p, {}
        self.inner, self.rates = nn.Dropout(0.2), nn.Identity()
        if bias:
            self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return self.after(self.linear(x))

    def after(self, x):
        return x


class Attribute(Calling):
    def after(self, x):
        return F.dropout(x, self.p, self.training)


class Number(Calling):
    def after(self, x):
        return nn.functional.dropout(x, 0.2, training=self.training)


class Default(Calling):
    def after(self, x):
        return drop(x, training=self.training)


class OfTorch(Calling):
    def after(self, x):
        return torch.dropout(x, 0.25, self.training)


class Alpha(Calling):
    def after(self, x):
        return F.alpha_dropout(x, p=self.p, training=self.training)


class Attention(Calling):
    def after(self, x):
        rate = float(self.p) if self.training else 0.0
        return F.scaled_dot_product_attention(x, x, x, dropout_p=rate)


class Computed(Calling):
    def after(self, x):
        return F.dropout(x, 0.1 * len(x), self.training)


class Named(Calling):
    def after(self, x):
        function = F.dropout if self.training else F.dropout1d
        return function(x, self.p)


class InAFunction(Calling):
    def after(self, x):
        def inner(y):
            return F.dropout2d(y, self.p, self.training)

        return inner(x)


class Inherited(Attribute):
    pass


class Extended(Attribute):
    def after(self, x):
        return 2 * super().after(x)


LISTED = {
    Attribute: "dropout at self.p = 0.3",
    Number: "dropout at 0.2",
    Default: "dropout at 0.5",
    OfTorch: "dropout at 0.25",
    Alpha: "alpha_dropout at self.p = 0.3",
    Attention: "scaled_dot_product_attention at self.p = 0.3",
    Computed: "dropout at 0.1 * len(x), a rate that it computes",
    Named: "dropout at a rate that it computes, dropout1d at a rate that it computes",
    InAFunction: "dropout2d at self.p = 0.3",
    Inherited: "dropout at self.p = 0.3",
    Extended: "dropout at self.p = 0.3",
}


class Off(Calling):
    def after(self, x):
        return F.dropout(x, self.p, training=False) + F.dropout(x, 0.0) + F.scaled_dot_product_attention(x, x, x)


class Module(Calling):
    def after(self, x):
        return F.dropout(self.inner(x), self.rates.p if self.training else 0.0)


class Overridden(Attribute):
    def after(self, x):
        return 2 * x


def reasons(model, **options):
    return {one.name: one.reason for one in stn.convert(model, quiet=True, **options).tuned_hyperparameters.report}


@pytest.mark.parametrize("kind", LISTED)
def test_a_function_that_drops_activations_is_listed_with_its_rate(kind):
    want = f"its code calls {LISTED[kind]}, which stays the same for all examples"
    assert reasons(nn.Sequential(kind()))["0"] == want
    assert reasons(kind())[""] == want
    with pytest.raises(ValueError, match=rf"strict=True.*\n  0 \({kind.__name__}\): its code calls"):
        stn.convert(nn.Sequential(kind()), strict=True, quiet=True)


@pytest.mark.parametrize("kind", [Off, Module, Overridden, Calling])
def test_what_drops_nothing_and_what_modules_drop_is_not_listed(kind):
    assert "0" not in reasons(nn.Sequential(kind()), strict=True)


@pytest.mark.parametrize("kind", [Attribute, Attention, Alpha, InAFunction])
def test_a_rate_of_zero_is_not_listed(kind):
    assert "0" not in reasons(nn.Sequential(kind(p=0.0)), strict=True)


def test_a_module_with_parameters_is_listed_for_both_reasons():
    reason = reasons(nn.Sequential(Attribute(bias=True)))["0"]
    assert reason.startswith("there is no rule for its class")
    assert reason.endswith("; its code calls dropout at self.p = 0.3, which stays the same for all examples")


def test_code_without_source_is_listed_too():
    names = {"nn": nn, "F": F, "Calling": Calling}
    exec("class Typed(Calling):\n    def after(self, x):\n        return F.dropout(x, self.p, self.training)", names)
    assert "dropout at a rate that it computes" in reasons(nn.Sequential(names["Typed"]()))["0"]


def test_a_class_with_a_rule_is_not_listed(monkeypatch):
    monkeypatch.setitem(stn.conversion.rules.RULES, Attribute, lambda module, context: None)
    assert reasons(nn.Sequential(Attribute(), nn.Linear(6, 4)))["0"] is None


def test_modules_of_torch_are_not_listed():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Dropout2d(0.1), nn.LSTM(8, 8, 2))
    assert set(reasons(model, strict=True).values()) == {None}


def test_rates_that_modules_of_timm_pass_on_are_listed_once():
    timm = library("timm")
    options = dict(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, attn_drop_rate=0.1, proj_drop_rate=0.1
    )
    found = reasons(timm.create_model("vit_tiny_patch16_224", **options))
    assert [name for name, reason in found.items() if reason and "rate" in reason] == ["blocks.0.attn.attn_drop"]
