"""WeightDecay in the list given to convert: the λ of each layer, in the penalty and in the steps of SelfTuner."""

import copy

import pytest
import torch
import torch.nn.functional as F
from converted_networks import Text, assert_descends, converted, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast.training.task import with_weight_decay


class Network(nn.Module):
    def __init__(self, rate=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Dropout(rate), nn.Linear(7, 6, bias=False))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def full(layer):
    """R of a layer."""
    projection = layer.response_projection
    return layer.response_weight if projection is None else layer.response_weight @ projection


def penalty(layer, hyper, name):
    """½ · mean over b of λ[b] ‖W + diag(Gw h[b]) R‖², from the weights of every example."""
    gates = hyper.response.to(layer.weight) @ layer.weight_gate.T
    effective = layer.weight + gates[:, :, None] * full(layer)
    return (0.5 * hyper[name].to(layer.weight) * effective.square().sum((1, 2))).mean()


def decayed(tuned, hyper):
    return with_weight_decay(torch.zeros((), dtype=torch.float64), tuned, hyper)


def test_every_layer_is_decayed_by_the_first_entry_that_fits_it():
    tuned = converted(Network().double(), space=[stn.WeightDecay("head", init=0.3), stn.WeightDecay("*", init=0.01)])
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)
    assert own.space.names == ("dropout", "weight_decay_head", "weight_decay")
    assert [own.space[name].init for name in own.space.names[1:]] == [0.3, 0.01]
    want = penalty(tuned.head, hyper, "weight_decay_head")
    want = want + penalty(tuned.body[0], hyper, "weight_decay") + penalty(tuned.body[3], hyper, "weight_decay")
    assert relative_error(decayed(tuned, hyper), want) < 1e-6
    assert [one.modules for one in own.added] == [("head",), ("body.0", "body.3")]


def test_a_layer_that_no_entry_fits_is_not_decayed():
    tuned = converted(Network().double(), space=(stn.WeightDecay("head", name="decay", scale=0.5),))
    hyper = sampled(tuned)
    assert tuned.tuned_hyperparameters.space["decay"] == stn.Hyperparameter("decay", low=0.0, init=1e-3, scale=0.5)
    assert "weight_decay" not in hyper
    assert relative_error(decayed(tuned, hyper), penalty(tuned.head, hyper, "decay")) < 1e-6


def test_without_an_entry_the_suggestion_is_kept():
    tuned = stn.convert(Network(), [], quiet=True)
    assert tuned.tuned_hyperparameters.space == stn.suggest_space(Network())
    tuned = converted(Network().double(), space=[])
    hyper = sampled(tuned)
    want = sum(penalty(layer, hyper, "weight_decay") for layer in (tuned.head, tuned.body[0], tuned.body[3]))
    assert relative_error(decayed(tuned, hyper), want) < 1e-6


def test_a_tied_weight_is_decayed_by_the_entry_of_the_layer_that_has_one():
    tuned = converted(Text().double(), space=[stn.WeightDecay("decoder")])
    hyper = sampled(tuned)
    assert relative_error(decayed(tuned, hyper), penalty(tuned.decoder, hyper, "weight_decay_decoder")) < 1e-6


def test_default_names_are_the_words_of_the_pattern():
    names = {"*": "weight_decay", "*.head": "weight_decay_head", "blocks.[0-3].*": "weight_decay_blocks_0_3"}
    assert {pattern: stn.WeightDecay(pattern).hyperparameter.name for pattern in names} == names


def batch(examples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (examples,), generator=generator)


def two_layers():
    torch.manual_seed(0)
    additions = [stn.WeightDecay("0", init=2.0, scale=2.0), stn.WeightDecay("1", init=5.0, name="last")]
    return converted(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), space=additions, response_rank=None)


def outputs(tuned, x, h):
    for layer in tuned[:2]:
        x, given = x @ layer.weight.T + layer.bias, x
        x = x + (h @ layer.weight_gate.T) * (given @ layer.response_weight.T)
        x = x + (h @ layer.bias_gate.T) * layer.response_bias
    return x


def test_a_training_step_minimises_the_loss_with_both_penalties():
    tuned, (x, y) = two_layers(), batch(6)
    before = copy.deepcopy(tuned)
    optimizer = torch.optim.SGD(tuned.parameters(), 1.0)
    stn.SelfTuner(tuned, optimizer, F.cross_entropy, clip=None, antithetic=False, seed=4).train_step((x, y))
    own = before.tuned_hyperparameters
    hyper = own.space.sample(own.location, own.raw_scale, batch_size=6, seed=4, step=0)
    h = hyper.response.double()
    loss = F.cross_entropy(outputs(before, x, h), y)
    (loss + penalty(before[0], hyper, "weight_decay_0") + penalty(before[1], hyper, "last")).backward()
    for k in range(2):
        for name, parameter in before[k].named_parameters():
            moved = parameter.detach() - getattr(tuned[k], name).detach()
            if name.startswith("response"):  # steps of the response are divided by the mean square of its gate
                gate = getattr(before[k], name.replace("response", "").strip("_") + "_gate").detach()
                squares = (h @ gate.T).square().mean(0).clamp(min=1)
                moved = moved * squares.view(-1, *[1] * (moved.ndim - 1))
            assert relative_error(moved, parameter.grad) < 1e-6, (k, name)


def test_a_validation_step_moves_both_down_the_loss_without_penalties():
    tuned, (x, y) = two_layers(), batch(7)
    own = tuned.tuned_hyperparameters
    location, start = own.location.double().requires_grad_(), own.space.initial_state()[0].double()
    (wanted,) = torch.autograd.grad(F.cross_entropy(outputs(tuned, x, (location - start).expand(7, 2)), y), location)
    assert_descends(tuned, (x, y), location, wanted)


def test_a_decay_that_is_far_too_strong_is_tuned_down_and_saved():
    torch.manual_seed(0)
    tuned = stn.convert(Network(), [stn.WeightDecay("head", init=1.0), stn.WeightDecay()], quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 0.1), F.cross_entropy,
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1))  # fmt: skip
    x = torch.randn(60, 5)
    y = (4 * x[:, :3]).argmax(1)
    for _ in range(40):
        tuner.step((x[:40], y[:40]), (x[40:], y[40:]))
    assert tuner.values()["weight_decay_head"] < 0.8
    other = stn.convert(Network(), [stn.WeightDecay("head", init=1.0), stn.WeightDecay()], quiet=True)
    other.load_state_dict(tuned.state_dict())
    assert other.tuned_hyperparameters.values() == tuner.values()
    folded = stn.fold(tuned)
    assert "decay_name" not in folded.head.__dict__
    stn.convert(folded, [stn.WeightDecay()], quiet=True)


def test_copies_keep_the_entries():
    tuned = copy.deepcopy(converted(Network().double(), space=[stn.WeightDecay("head")]))
    hyper = sampled(tuned)
    assert relative_error(decayed(tuned, hyper), penalty(tuned.head, hyper, "weight_decay_head")) < 1e-6


def test_an_optimizer_that_decays_weights_too_is_a_warning():
    tuned = stn.convert(Network(), [stn.WeightDecay("head"), stn.WeightDecay("body.0")], quiet=True)
    with pytest.warns(UserWarning, match="in addition to the tuned weight_decay_head, weight_decay_body_0, and the"):
        stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1, weight_decay=0.1), F.cross_entropy)


def test_the_table_says_what_was_added_and_where(capsys):
    stn.convert(Network(), [stn.WeightDecay("head", init=0.3), stn.WeightDecay()])
    shown = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["weight_decay_head", "0.3", "[0, inf)   added as WeightDecay of head"] in shown
    assert ["weight_decay", "0.001", "[0, inf)   added as WeightDecay of body.0, body.3"] in shown


def test_wrong_entries_are_named_and_change_nothing():
    model = Network()
    space = stn.suggest_space(model)
    cases = [
        ([stn.WeightDecay("tail")], ValueError, r"no module for WeightDecay\(pattern='tail'"),
        ([stn.WeightDecay("body.1")], ValueError, "a converted layer that is not a norm"),
        ([stn.WeightDecay("body.2")], ValueError, r"no module for WeightDecay\(pattern='body\.2'"),
        ([stn.WeightDecay(), stn.WeightDecay("head")], ValueError, "no WeightDecay before it fits"),
        (
            [stn.WeightDecay("head"), stn.WeightDecay("*.head")],
            ValueError,
            "the hyperparameter 'weight_decay_head', which is another",
        ),
        ([stn.WeightDecay("head", name="dropout")], ValueError, "would be the hyperparameter 'dropout', which"),
        ([space["dropout"]], TypeError, r"a list must have additions.*got Hyperparameter\(name='dropout'"),
        (stn.WeightDecay(), TypeError, r"must be a HyperparameterSpace or a list of additions, got WeightDecay\("),
    ]
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            stn.convert(model, given)
        assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="give space, too, as a HyperparameterSpace"):
        stn.convert(model, [], dropouts={"body.2": "dropout"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(init=0.0), r"'weight_decay': init=0\.0 must be strictly inside"),
        (dict(scale=9.0), r"'weight_decay': scale=9\.0 must be in"),
        (dict(name=""), "name must be a non-empty string"),
        (dict(pattern=""), "WeightDecay: pattern must be a non-empty string"),
        (dict(pattern=["head"]), "WeightDecay: pattern must be a non-empty string"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stn.WeightDecay(**options)
