"""Losses through the response: those of the run, those of folded networks by hand, and their derivatives."""

import math
from dataclasses import replace

import pytest
import torch
from random_response import respond
from run_files import rows

import stn_fast as stn
from stn_fast.data import DataSet, Split
from stn_fast.errors import UserError
from stn_fast.exploration.response import Curve, Point, Response, explored, sampled
from stn_fast.models import plain_mlp, tuned
from stn_fast.training import task
from stn_fast.training.build import build_method
from stn_fast.training.config import Config, HyperparameterConfig, MethodConfig, ScheduleConfig
from stn_fast.training.spaces import build_space
from stn_fast.training.trainer import Trainer

METHODS = ["method.name=stn", "method.name=delta-stn"]
SETTINGS = [[METHODS[0]], [METHODS[1]], ["method.response=raw", "optimizer.average=0.9"]]
ALL = 10**9


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_at_the_runs_values_is_the_one_that_the_run_recorded(digits_run, restore, setting):
    trainer, (directory, _) = restore(*setting), digits_run(*setting)
    (recorded,) = [row["loss"] for row in rows(directory) if row["phase"] == "eval" and row["step"] == trainer.step]
    found = explored(trainer, points=3, examples=ALL, pairs=False)
    assert found.loss == pytest.approx(recorded, rel=1e-6)
    assert (found.examples, found.validation_examples) == (400, 400)
    assert all(curve.here.loss == found.loss for curve in found.curves)


def test_the_best_checkpoint_is_explored_if_asked_for(digits_run, restore):
    worse_later = "optimizer.learning_rate=3.0"
    directory, _ = digits_run(worse_later)
    best = min((row for row in rows(directory) if row["phase"] == "eval"), key=lambda row: row["loss"])
    last, trainer = restore(worse_later), restore(worse_later, best=True)
    assert trainer.step == best["step"] != last.step
    assert explored(trainer, points=3, examples=ALL, pairs=False).loss == pytest.approx(best["loss"], rel=1e-6)


def by_hand(trainer, name, shift):
    """The validation loss of a plain float64 network with W + diag(Gw h) R and b + (Gb h) ⊙ r."""
    method, data = trainer.method, trainer.task.data.valid
    there = method.location.detach().double()
    there[method.space.index(name)] += shift * method.scales()[method.space.index(name)].double()
    center = method.location if method.center is not None else method.space.initial_state()[0]
    h, x = there - center.detach().double(), data.inputs.double()
    layers = [module for module in method.model if isinstance(module, torch.nn.Linear)]
    for number, layer in enumerate(layers):
        x = x.relu() if number else x
        of = {key: parameter.detach().double() for key, parameter in layer.named_parameters()}
        weight = of["weight"] + (of["weight_gate"] @ h)[:, None] * of["response_weight"]
        x = x @ weight.T + of["bias"] + (of["bias_gate"] @ h) * of["response_bias"]
    return torch.nn.functional.cross_entropy(x, data.targets).item()


@pytest.mark.parametrize("setting", METHODS)
def test_a_point_is_the_loss_of_the_network_folded_there_by_hand(responding, setting):
    trainer = responding(setting)
    response = Response(trainer, ALL)
    for name, shift in (("input_dropout", -2.0), ("weight_decay", 1.3), ("hidden_dropout_2", 4.0)):
        assert response.point(name, shift).loss == pytest.approx(by_hand(trainer, name, shift), rel=1e-5)
    assert response.point("hidden_dropout_2", 4.0).loss != pytest.approx(response.loss(response.location), rel=1e-3)


def test_the_slope_is_the_hypergradient_of_a_validation_step(responding):
    trainer = responding(METHODS[0])
    trainer.method.tune_scales = False  # so that the step is not perturbed
    gradients, _ = trainer.method.hypergradients(trainer.task.data.valid, 0)[1]
    assert list(Response(trainer, ALL).slopes().values()) == pytest.approx(gradients.tolist(), rel=1e-4)


def test_exploring_changes_nothing(responding):
    trainer = responding(METHODS[0])
    before = [tensor.clone() for tensor in trainer.method.model.state_dict().values()]
    location, training = trainer.method.location.detach().clone(), trainer.method.model.training
    explored(trainer, points=3)
    assert all(torch.equal(*both) for both in zip(before, trainer.method.model.state_dict().values(), strict=True))
    assert torch.equal(location, trainer.method.location.detach())
    assert trainer.method.model.training == training
    assert all(parameter.requires_grad for parameter in trainer.method.model.parameters())
    assert all(parameter.grad is None for parameter in trainer.method.model.parameters())


def test_curves_reach_as_far_as_asked_and_hold_the_band_and_the_runs_value(responding):
    trainer = responding(METHODS[0])
    found = explored(trainer, points=6, span=3.0, examples=50)
    for curve in found.curves:
        assert [point.shift for point in curve.points] == pytest.approx([-3, -2, -1.8, -0.6, 0, 0.6, 1.8, 2, 3])
        by_shift = {point.shift: point for point in curve.points}
        assert (curve.low, curve.here, curve.high) == (by_shift[-2.0], by_shift[0.0], by_shift[2.0])
        values = [point.value for point in curve.points]
        assert values == sorted(values)
        column = trainer.method.space.index(curve.name)
        assert curve.scale == pytest.approx(trainer.method.scales()[column].item())
        assert curve.here.value == trainer.method.space.values(trainer.method.location)[curve.name]
    ranges = [curve.range for curve in found.curves]
    assert ranges == sorted(ranges, reverse=True)
    assert ranges[-1] > 0


def test_the_map_of_the_first_two_goes_through_their_curves(responding):
    found = explored(responding(METHODS[0]), points=9, examples=50)
    first, second = found.curves[:2]
    drawn = found.map
    assert drawn.names == (first.name, second.name)
    losses = {point.shift: point.loss for point in first.points}
    row = drawn.losses[drawn.shifts[1].index(0.0)]
    assert row == [losses[shift] for shift in drawn.shifts[0]]
    losses = {point.shift: point.loss for point in second.points}
    assert [row[drawn.shifts[0].index(0.0)] for row in drawn.losses] == [losses[shift] for shift in drawn.shifts[1]]
    assert drawn.values[1][0] == min(drawn.values[1])
    assert explored(responding(METHODS[0]), points=9, examples=50, pairs=False).map is None


def test_fewer_examples_are_evenly_spaced(responding):
    trainer = responding(METHODS[0])
    few = sampled(trainer, 3)
    whole = trainer.task.data.valid
    assert torch.equal(few.inputs, whole.inputs[[0, 133, 266]])
    assert torch.equal(few.targets, whole.targets[[0, 133, 266]])
    found = explored(trainer, points=3, examples=3, pairs=False)
    assert (found.examples, found.validation_examples) == (3, 400)
    assert sampled(trainer, 400) is whole


def curve_of(losses, scale=0.5, **more):
    """A curve at shifts -4, -2, 0, 2, 4 with these losses."""
    points = [Point(shift, 10.0 + shift, loss) for shift, loss in zip((-4, -2, 0, 2, 4), losses, strict=True)]
    given = dict(name="a", scale=scale, low=points[1], here=points[2], high=points[3], points=points, slope=0.0)
    return Curve(**given | more)


def test_the_numbers_of_the_table_are_those_within_the_band():
    curve = curve_of([-9.0, 3.0, 1.0, 5.0, 99.0])
    assert curve.range == 4.0
    assert curve.lowest == Point(0, 10.0, 1.0)
    assert curve.curvature == pytest.approx((3 - 2 * 1 + 5) / 1.0**2)  # ±2σ are ±1 in λ
    assert curve_of([0.0, 3.0, 1.0, 5.0, 0.0], scale=1.0).curvature == pytest.approx(6 / 4)


def test_losses_that_are_not_finite_come_first_and_have_no_curvature():
    curve = curve_of([0.0, 3.0, 1.0, math.nan, 0.0])
    assert curve.range == math.inf
    assert math.isnan(curve.curvature)
    assert curve.lowest.loss == 1.0


def trainer_of(config, tmp_path, **changes):
    """A trainer at the start of a task with random examples, whose objective uses no hyperparameter by name."""
    space = build_space(config)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    splits = [
        Split(torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (20, 31, 7)
    ]
    built = task.Task(
        space=space,
        model=tuned(plain_mlp((5, 7, 3)), space),
        data=DataSet(*splits),
        training_objective=task.classification_loss,
        validation_objective=task.classification_loss,
        scores=task.classification_scores,
        allow_unused=True,
    )
    built = replace(built, **changes)
    schedule = ScheduleConfig(batch_size=10, valid_batch_size=10, eval_batch_size=8)
    config = replace(config, schedule=schedule)
    return Trainer(config, built, build_method(config, built), tmp_path)


class Smooth(torch.nn.Module):
    """5 → 7 → 3 with tanh, so that the loss has all derivatives."""

    def __init__(self, space):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            stn.HyperLinear(*sizes, num_hyperparameters=len(space)) for sizes in ((5, 7), (7, 3))
        )

    def forward(self, x, hyper):
        first, second = self.layers
        return second(first(x, hyper).tanh(), hyper)


@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_the_slope_is_the_central_difference_of_the_curve(tmp_path, method):
    names = {name: HyperparameterConfig(init=0.3, low=0.0, high=0.9) for name in ("one", "two", "three")}
    config = Config("own", names, method=MethodConfig(name=method, response_start="published"))
    torch.manual_seed(2)
    trainer = trainer_of(config, tmp_path, model=Smooth(build_space(config)))
    respond(trainer.method.model)
    for layer in trainer.method.model.layers:
        for gate in (layer.weight_gate, layer.bias_gate):
            torch.nn.init.normal_(gate, std=0.5, generator=torch.Generator().manual_seed(len(gate)))
    trainer.method.location.data += torch.tensor([0.2, -0.3, 0.1])
    response = Response(trainer, 29)  # batches of 8, 8, 8 and 5

    def difference(name, shift):
        high, low = (response.point(name, sign * shift).loss for sign in (1, -1))
        return (high - low) / (2 * shift * 0.5)  # σ is 0.5

    # Richardson's extrapolation, whose error is of the fourth order
    expected = [(4 * difference(name, 0.1) - difference(name, 0.2)) / 3 for name in response.space.names]
    assert list(response.slopes().values()) == pytest.approx(expected, rel=1e-3)
    assert min(map(abs, expected)) > 1e-3


def whole(**given):
    return Config("own", {"holes": HyperparameterConfig(**{"integer": True, **given})})


def test_an_integer_takes_its_values_once_each_in_the_middle_of_those_that_round_down_to_it(tmp_path):
    trainer = trainer_of(whole(init=1.7, low=0.0, high=4.0), tmp_path)
    response = Response(trainer, ALL)
    shifts = response.shifts("holes", 4.0, 21)
    assert [response.point("holes", shift).value for shift in shifts] == [0, 1, 2, 3]
    assert shifts[1] == 0.0, "the current value must be at the run's own λ"
    # λ = log(v / (4 − v)); σ is 0.5
    location = math.log(1.7 / 2.3)
    middles = [(math.log(v / (4 - v)) - location) / 0.5 for v in (0.5, 2.5, 3.5)]
    assert [shifts[0], *shifts[2:]] == pytest.approx([max(-4, middles[0]), *(min(4, m) for m in middles[1:])], rel=1e-4)
    few = response.shifts("holes", 0.2, 21)
    assert {response.point("holes", shift).value for shift in few} == {1.0}


def test_an_integer_with_many_values_takes_as_many_as_there_are_points(tmp_path):
    trainer = trainer_of(whole(init=40.5, low=0.0), tmp_path)
    trainer.method.space.clamp_(trainer.method.raw_scale.data.fill_(2.0))  # σ is 2.13
    response = Response(trainer, ALL)
    shifts = response.shifts("holes", 5.0, 4)
    values = [response.point("holes", shift).value for shift in shifts]
    assert values[0] == 29.0
    assert values[-1] == 51.0
    assert 40.0 in values
    assert len(values) == len(set(values)) in (4, 5)
    curve = response.curve("holes", 5.0, 4, slope=0.0)
    assert math.isfinite(curve.curvature)


def test_float32_may_reach_an_integers_bound(tmp_path):
    trainer = trainer_of(whole(init=3.9, low=0.0, high=4.0, scale=3.0), tmp_path)
    with torch.no_grad():
        trainer.method.location.fill_(9.0)
    response = Response(trainer, ALL)
    shifts = response.shifts("holes", 4.0, 9)
    assert [response.point("holes", shift).value for shift in shifts][-1] == 3.0


def test_a_single_place_makes_no_map(tmp_path):
    one = HyperparameterConfig(init=0.3, low=0.0, high=0.9)
    config = whole(init=0.5, low=0.0, high=0.9)
    config = replace(config, hyperparameters={**config.hyperparameters, "rate": one})
    found = explored(trainer_of(config, tmp_path), points=5)
    assert found.map is None
    assert len(found.curves) == 2


def test_a_score_without_a_gradient_is_an_error(tmp_path):
    config = Config("own", {"rate": HyperparameterConfig(init=0.3, low=0.0, high=0.9)})

    @torch.no_grad()
    def scores(model, batch, hyper):
        return task.classification_scores(model, batch, hyper)

    with pytest.raises(UserError, match="the score `loss` has no gradient"):
        explored(trainer_of(config, tmp_path, scores=scores), points=3)


def test_a_method_without_a_response_is_an_error(tmp_path):
    config = Config("own", {"rate": HyperparameterConfig(init=0.3, low=0.0, high=0.9)})
    fixed = replace(config, method=replace(config.method, name="fixed"))
    with pytest.raises(UserError, match="FixedHyperparameters has no response"):
        explored(trainer_of(fixed, tmp_path), points=3)
