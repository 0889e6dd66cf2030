"""SelfTuner(method="delta-stn"): its steps, what evaluation and folding use, and its errors."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from small_tuners import assert_same_model, batch, moved, network, snapshot, tuner_of, without_statistics
from torch import nn

import stn_fast as stn
from stn_fast.models import mlp
from stn_fast.training import finite
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.parameters import is_response
from stn_fast.training.task import classification_loss, decayed_classification_loss

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)
delta = partial(tuner_of, method="delta-stn")


def run(tuner, steps):
    return [tuner.step(batch(k), batch(100 + k)) for k in range(steps)]


@pytest.mark.parametrize("options", [{}, dict(antithetic=False, tune_scales=False, seed=5), dict(linearize=False)])
def test_the_numbers_are_those_of_delta_stn_on_the_network_of_gated_layers_bit_for_bit(options):
    hand = respond(mlp(SPACE, (6, 16, 4), response_rank="auto"))
    tuned = stn.convert(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)), SPACE,
        dropouts={"2": "hidden_dropout_1"}, quiet=True,
    )  # fmt: skip
    layers = [tuned[0], tuned[3]]
    for ours, theirs in zip(layers, hand.layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    hand.dropouts[1].stream = tuned[2].stream
    ordered = [dict(ours.named_parameters())[name] for ours, theirs in zip(layers, hand.layers, strict=True)
        for name, _ in theirs.named_parameters()]  # fmt: skip
    both = torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(ordered, lr=0.05, momentum=0.9), F.cross_entropy, method="delta-stn", **options
    )
    method = DeltaSelfTuning(
        hand, SPACE, decayed_classification_loss, classification_loss, optimizer=lambda parameters: both, **options
    )
    for k in range(4):
        assert torch.equal(tuner.train_step(batch(k)), method.train_step(batch(k), 2 * k))
        assert torch.equal(tuner.method.response_loss, method.response_loss)
        assert torch.equal(tuner.valid_step(batch(100 + k)), method.valid_step(batch(100 + k), 2 * k + 1))
    assert torch.equal(tuned.tuned_hyperparameters.location, method.location.detach())
    assert torch.equal(tuned.tuned_hyperparameters.raw_scale, method.raw_scale.detach())
    for ours, theirs in zip(layers, hand.layers, strict=True):
        assert_same_model(ours, theirs)


def test_one_optimizer_steps_the_weights_and_then_the_response():
    tuner = delta(make=partial(torch.optim.AdamW, weight_decay=0))
    names = set(dict(tuner.model.named_parameters()))
    response = {name for name in names if is_response(name)}
    before, given = snapshot(tuner.model), batch(0)
    tuner.method.general_step(given, 0)
    assert moved(before, tuner.model) == names - response
    before, statistics = snapshot(tuner.model), tuner.model[1].running_mean.clone()
    tuner.method.response_step(given, 0)
    assert moved(before, tuner.model) == response
    assert torch.equal(tuner.model[1].running_mean, statistics)
    before = snapshot(tuner.model)
    tuner.valid_step(given)
    assert moved(before, tuner.model) == set()
    assert all(parameter.requires_grad for parameter in tuner.model.parameters())


def test_the_response_may_have_an_optimizer_of_its_own():
    given = []

    def make(parameters):
        given.extend(parameters)
        return torch.optim.Adam(parameters, lr=1e-3)

    # Without a norm, before which the gradient of a bias is 0 but for rounding.
    tuned = respond(stn.convert(without_statistics(), quiet=True))
    weights = [p for name, p in tuned.named_parameters() if not is_response(name)]
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(weights, lr=0.05), F.cross_entropy, method="delta-stn", response_optimizer=make
    )
    response = [p for name, p in tuned.named_parameters() if is_response(name)]
    assert list(map(id, given)) == list(map(id, response))
    before = snapshot(tuned)
    tuner.train_step(batch(0))
    assert moved(before, tuned) == set(before)
    for name, parameter in tuned.named_parameters():
        if is_response(name):  # a first step of Adam is as long as its learning rate
            assert (parameter - before[name]).abs().max() < 1.001e-3, name


def test_a_bad_dropout_rate_is_tuned_away():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = (x[:, :4] @ torch.randn(4, 4, generator=generator)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.8), nn.Linear(16, 4))
    tuned = stn.convert(model, quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9), F.cross_entropy, method="delta-stn",
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.15),
    )  # fmt: skip
    for _ in range(50):
        tuner.step((x[:200], y[:200]), (x[200:], y[200:]))
    assert tuner.values()["dropout"] < 0.5


# Evaluation: W and b at the current hyperparameters, wherever they are


def plain_copy(tuned):
    """The network with W and b, and without a response."""
    model = network()
    model.load_state_dict({name: tensor for name, tensor in tuned.state_dict().items() if name in model.state_dict()})
    return model.eval()


def trained():
    tuner = delta(hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.3))
    run(tuner, 3)
    return tuner


def test_evaluation_and_folding_use_the_plain_weights():
    tuner, (x, _) = trained(), batch(0)
    own, want = tuner.model.tuned_hyperparameters, plain_copy(tuner.model)
    assert (own.location != own.space.initial_state()[0]).all()
    assert torch.equal(own.response(), torch.zeros(2))
    torch.testing.assert_close(tuner.model.eval()(x), want(x), rtol=1e-6, atol=1e-6)
    folded = tuner.fold()
    assert all(map(torch.equal, folded.parameters(), want.parameters()))
    assert folded[3].p == tuner.values()["dropout"] == own.space.values(own.location)["dropout"]
    with own.using(tuner.method.unperturbed(13)):
        torch.testing.assert_close(tuner.model(x), want(x), rtol=1e-6, atol=1e-6)


def loaded(tuned):
    other = stn.convert(network(), quiet=True)
    other.load_state_dict(tuned.state_dict())
    return other


def saved(tuned):
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [loaded, saved, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_that_its_response_is_centred(copied):
    tuned, (x, _) = trained().model.eval(), batch(0)
    other = copied(tuned).eval()
    assert torch.equal(other(x), tuned(x))
    other.tuned_hyperparameters.location.add_(0.5)
    assert torch.equal(other(x), tuned(x))
    assert all(map(torch.equal, stn.fold(other).parameters(), stn.fold(tuned).parameters()))


def test_a_loaded_state_changes_the_response_that_was_used_before():
    tuned, (x, _) = trained().model, batch(0)
    other = respond(stn.convert(network(), quiet=True)).eval()
    other.tuned_hyperparameters.location.copy_(tuned.tuned_hyperparameters.location)
    other(x)
    other.load_state_dict(tuned.state_dict())
    assert torch.equal(other(x), tuned.eval()(x))


def test_a_method_does_not_go_on_with_the_response_of_the_other_one():
    for there, here in (("delta-stn", "stn"), ("stn", "delta-stn")):
        tuner = tuner_of(method=there)
        run(tuner, 1)
        model, before = tuner.model, copy.deepcopy(tuner.model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=f"tuned by {there}, whose response {here} can't go on with.*'{there}'"):
            stn.SelfTuner(model, optimizer, method=here)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        stn.SelfTuner(model, optimizer, method=there)


def test_a_method_may_be_chosen_until_the_hyperparameters_have_moved():
    tuner = delta()
    tuner.train_step(batch(0))
    optimizer = torch.optim.SGD(tuner.model.parameters(), lr=0.1)
    stn.SelfTuner(tuner.model, optimizer)
    assert not tuner.model.tuned_hyperparameters.centred


# Errors


def test_wrong_methods_and_options_are_named():
    raw = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3, response="raw")])
    cases = [
        (dict(method="delta"), "method must be one of 'stn', 'delta-stn', got 'delta'"),
        (dict(method="stn", linearize=False), "linearize are options of method='delta-stn'"),
        (dict(method="stn", response_optimizer=torch.optim.SGD), "response_optimizer and .* are options of method="),
        (dict(linearize="no"), "linearize must be True or False"),
        (
            dict(response_optimizer=lambda p: torch.optim.SGD(list(p)[1:], 0.1)),
            "response_optimizer lacks 0.resp.*given",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            tuner_of(**dict(method="delta-stn") | options)
    with pytest.raises(TypeError, match=r"response_optimizer must make a torch\.optim\.Optimizer.*got list"):
        delta(response_optimizer=list)
    tuned = stn.convert(network(), raw, quiet=True)
    with pytest.raises(ValueError, match="response='shifted', and dropout has another one"):
        stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1), method="delta-stn")
    assert not tuned.tuned_hyperparameters.centred


def test_a_loss_that_the_model_returns_is_an_error():
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.inner(x), labels)}

    x, y = batch(0)
    tuner = delta(Returning(), loss=lambda output, batch: output["loss"])
    with pytest.raises(RuntimeError, match=r"the model returns a single number.*return logits"):
        tuner.train_step(dict(x=x, labels=y))


def test_the_device_waits_for_the_first_response_step_of_an_optimizer_of_both(monkeypatch):
    """Its state is created in that step, and a fused SGD that skips it would leave that memory unwritten."""
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    tuner = delta(skip_nonfinite=1)
    decided = []
    apply = finite._apply_unless
    monkeypatch.setattr(finite, "_apply_unless", lambda bad, *given: decided.append(bad) or apply(bad, *given))
    tuner.train_step(batch(0))
    assert decided == []
    tuner.train_step(batch(1))
    assert len(decided) == 2
