"""explore_model: its losses are those of networks with the predicted weights, on the first batches of the loader."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3].sum(1) > 0).long()
VALID = DataLoader(TensorDataset(X, Y), 25)


def trained(method="stn"):
    """A model of which a few steps have moved the hyperparameters."""
    torch.manual_seed(1)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)
    model = respond(stn.convert(nn.Sequential(*layers), response_rank=None, quiet=True))
    tuner = stn.SelfTuner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, method=method)
    for _ in range(4):
        tuner.step((X[:30], Y[:30]), (X[30:], Y[30:]))
    return model


def by_hand(model, there):
    """The loss of the plain float64 network with W + diag(Gw h) R and b + (Gb h) ⊙ r."""
    own = model.tuned_hyperparameters
    center = own.location.detach() if own.centred else own.space.initial_state()[0]
    h, x = there - center.double(), X.double()
    for layer in (model[0], model[3]):
        of = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
        weight = of["weight"] + (of["weight_gate"] @ h)[:, None] * of["response_weight"]
        x = (x if layer is model[0] else x.tanh()) @ weight.T + of["bias"] + (of["bias_gate"] @ h) * of["response_bias"]
    return F.cross_entropy(x, Y)


@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_losses_and_slopes_are_those_of_networks_with_the_predicted_weights(method):
    model = trained(method)
    own = model.tuned_hyperparameters
    found = stn.explore_model(model, VALID, loss=F.cross_entropy, points=5, quiet=True)
    assert {curve.name for curve in found.curves} == {"dropout", "weight_decay"}
    assert (found.examples, set(found.map.names)) == (60, {"dropout", "weight_decay"})
    there = own.location.detach().double().requires_grad_()
    slopes = torch.autograd.grad(by_hand(model, there), there)[0].tolist()
    for curve in found.curves:
        k = own.space.index(curve.name)
        assert curve.slope == pytest.approx(slopes[k], rel=1e-3)
        for point in curve.points:
            there = own.location.detach().double()
            there[k] += point.shift * own.scales()[curve.name]
            assert point.loss == pytest.approx(by_hand(model, there).item(), rel=1e-5)


def test_the_model_does_not_change():
    model = trained().train()
    before, kept = copy.deepcopy(model.state_dict()), model.tuned_hyperparameters.location
    stn.explore_model(model, VALID, loss=F.cross_entropy, points=3, pairs=False, quiet=True)
    assert model.training
    assert model.tuned_hyperparameters.location is kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_gradients_has_the_same_losses_and_still_none():
    model = trained()
    want = stn.explore_model(model, VALID, loss=F.cross_entropy, points=3, quiet=True)
    model.requires_grad_(False)
    assert stn.explore_model(model, VALID, loss=F.cross_entropy, points=3, quiet=True) == want
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_label_smoothing_has_the_loss_that_is_given_which_is_not_smoothed():
    def margin(output, targets):
        return F.multi_margin_loss(output, targets)

    torch.manual_seed(1)
    model = stn.convert(nn.Sequential(nn.Linear(6, 2)), [stn.LabelSmoothing(init=0.3)], quiet=True)
    found = stn.explore_model(model, VALID, loss=margin, points=3, quiet=True)
    assert found.loss == pytest.approx(margin(model.eval()(X), Y).item(), rel=1e-6)


def test_every_point_has_the_same_batches_until_they_are_enough():
    model, shuffled = trained(), DataLoader(TensorDataset(X, Y), 25, shuffle=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.0 if name.endswith(("response_weight", "response_bias")) else 1.0)
    found = stn.explore_model(model, shuffled, loss=F.cross_entropy, points=3, examples=26, quiet=True)
    assert found.examples == 50
    assert all(point.loss == pytest.approx(found.loss) for curve in found.curves for point in curve.points)


def test_the_files_are_written_and_the_table_is_printed(tmp_path, capsys):
    found = stn.explore_model(trained(), VALID, loss=F.cross_entropy, points=3, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"explore.png", "explore.json", "explore.html"}
    written = json.loads((tmp_path / "out" / "explore.json").read_text())
    assert (written["model"], written["method"], written["loss"]) == ("Sequential", "stn", found.loss)
    assert said.startswith(f"Sequential, stn\nValidation loss {found.loss:.4f} on 60 examples.\n")
    assert f"are in {tmp_path / 'out'}." in said


def test_a_model_read_back_from_a_run_of_fit_has_the_loss_that_the_run_recorded(tmp_path):
    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))

    fit = stn.fit(
        stn.convert(build(), quiet=True), VALID, VALID, loss=F.cross_entropy, optimizer=torch.optim.Adam, epochs=2,
        run_dir=tmp_path, quiet=True,
    )  # fmt: skip
    found = stn.explore_model(stn.load(tmp_path, build()), VALID, loss=F.cross_entropy, points=3, quiet=True)
    assert found.loss == pytest.approx(fit.result["valid_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(model=nn.Linear(6, 2)), TypeError, "explore_model: model must be one that stn.convert has converted"),
        (dict(valid_loader=[]), ValueError, "explore_model: valid_loader gives no batch"),
        (dict(valid_loader=[X]), TypeError, "a batch must be"),
        (dict(points=2), ValueError, "points must be an int >= 3"),
        (dict(span=1), ValueError, "span must be >= 2, got 1"),
        (dict(examples=0), ValueError, "examples must be an int >= 1"),
        (dict(out=__file__), ValueError, "out .*test_model.py can't be written"),
    ],
)
def test_wrong_arguments_are_named(options, error, says):
    with pytest.raises(error, match=says):
        stn.explore_model(**(dict(model=trained(), valid_loader=VALID, loss=F.cross_entropy) | options))
