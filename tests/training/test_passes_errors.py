"""What passes of SelfTuner leave behind, also after errors, and what they refuse."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from small_tuners import EXAMPLES, Checkpointed, batch, network, tuner_of

from stn_fast.training.finite import NonFiniteError


def run(tuner):
    """One pass of each kind."""
    x, y = batch(0)
    with tuner.training(EXAMPLES):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    with tuner.validating(EXAMPLES):
        loss = F.cross_entropy(tuner.model(x), y)
    tuner.hyper_step(loss)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["training", "validating"])
def test_an_error_inside_a_pass_restores_everything(kind):
    tuner = tuner_of()
    own = tuner.model.tuned_hyperparameters
    tuner.model[1].eval()
    tuner.model[4].bias.requires_grad_(False)

    def state():
        modes = [module.training for module in tuner.model.modules()]
        wanted = [parameter.requires_grad for parameter in tuner.model.parameters()]
        return modes, wanted, own.current

    def stopped(kind):
        with getattr(tuner, kind)(EXAMPLES):
            assert tuner.model.training == (kind == "training")
            assert any(state()[1]) == (kind == "training")
            assert own.current is not None
            raise Stop

    for training in (True, False):
        tuner.model.train(training)
        before = state()
        with pytest.raises(Stop):
            stopped(kind)
        assert state() == before
    run(tuner)


def test_an_error_inside_an_antithetic_pass_restores_running_statistics():
    tuner, (x, _) = tuner_of(), batch(0)
    with tuner.training(EXAMPLES):
        tuner.model(x)
        tuner.penalty()
    before = tuner.model[1].running_mean.clone()

    def stopped():
        with tuner.training(EXAMPLES, antithetic=True):
            tuner.model(x)
            raise Stop

    with pytest.raises(Stop):
        stopped()
    assert torch.equal(tuner.model[1].running_mean, before)


# Errors


def test_passes_may_not_be_nested():
    tuner = tuner_of(loss=F.cross_entropy)
    inside = {
        "training": lambda: tuner.training(EXAMPLES).__enter__(),
        "validating": lambda: tuner.validating(EXAMPLES).__enter__(),
        "train_step": lambda: tuner.train_step(batch(0)),
        "valid_step": lambda: tuner.valid_step(batch(0)),
        "hyper_step": lambda: tuner.hyper_step(torch.zeros(())),
    }
    for call, enter in inside.items():
        with tuner.training(EXAMPLES):
            tuner.model(batch(0)[0])
            tuner.penalty()
            with pytest.raises(RuntimeError, match=rf"{call}: the pass `with tuner\.training\(\.\.\.\)` is still open"):
                enter()
    run(tuner)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True], ids=str)
def test_wrong_sizes_are_named(size):
    for kind in ("training", "validating"):
        tuner = tuner_of()
        with pytest.raises(ValueError, match=f"{kind}: batch_size must be an int >= 1"):
            getattr(tuner, kind)(size).__enter__()
        assert tuner.draws == 0


def test_a_size_other_than_that_of_the_input_is_an_error_of_the_layer():
    tuner, message = tuner_of(), r"0 \(Linear\): dimension 0 of its input \(13, 6\) must count the 12 examples"
    with pytest.raises(ValueError, match=message), tuner.training(12):
        tuner.model(batch(0)[0])


def test_passes_without_gradients_are_an_error():
    tuner = tuner_of()
    for kind in ("training", "validating"):
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"{kind} computes gradients, but"):
            getattr(tuner, kind)(EXAMPLES).__enter__()
    with tuner.validating(EXAMPLES):
        loss = tuner.model(batch(0)[0]).sum()
    with torch.no_grad(), pytest.raises(RuntimeError, match="hyper_step computes gradients, but"):
        tuner.hyper_step(loss)


def test_only_a_draw_that_has_not_been_repeated_can_be():
    tuner, x = tuner_of(), batch(0)[0]

    def enter(size, antithetic):
        with tuner.training(size, antithetic=antithetic):
            tuner.model(x)
            tuner.penalty()

    with pytest.raises(RuntimeError, match="antithetic=True repeats the draw of the pass before, once"):
        enter(EXAMPLES, True)
    enter(EXAMPLES, False)
    with pytest.raises(ValueError, match="antithetic=True needs the examples of the pass before, 13"):
        enter(12, True)
    enter(EXAMPLES, True)
    with pytest.raises(RuntimeError, match="the pass before, once"):
        enter(EXAMPLES, True)
    with pytest.raises(ValueError, match="antithetic must be True or False"):
        enter(EXAMPLES, "no")
    assert tuner.draws == 1


@pytest.mark.parametrize("inside", ["validating", None])
def test_the_penalty_belongs_to_training(inside):
    tuner = tuner_of()
    wrong = pytest.raises(RuntimeError, match="penalty: it belongs to the training loss")
    with tuner.validating(EXAMPLES) if inside else nullcontext(), wrong:
        tuner.penalty()


def test_a_loss_without_the_penalty_is_an_error():
    tuner, (x, y) = tuner_of(), batch(0)
    with pytest.raises(ValueError, match=r"add tuner\.penalty\(\) to the loss"), tuner.training(EXAMPLES):
        F.cross_entropy(tuner.model(x), y).backward()


def test_a_hyperparameter_that_is_not_used_is_named():
    model = network()
    model.forward = lambda x: model[4](model[0](x))
    tuner = tuner_of(model)
    with pytest.raises(ValueError, match="nothing uses 'dropout': no layer"), tuner.training(EXAMPLES):
        (model(batch(0)[0]).sum() + tuner.penalty()).backward()


@pytest.mark.parametrize("tune_scales", [True, False])
def test_a_loss_that_does_not_depend_on_hyperparameters_is_refused(tune_scales):
    tuner, (x, y) = tuner_of(tune_scales=tune_scales), batch(0)
    before = tuner.method.location.detach().clone()
    with tuner.training(EXAMPLES):
        of_training = F.cross_entropy(tuner.model(x), y) + tuner.penalty()
    with torch.no_grad():
        of_evaluation = F.cross_entropy(tuner.model.eval()(x), y)
    for loss in (of_training, of_evaluation):
        with pytest.raises(RuntimeError, match="does not depend on the hyperparameters: compute it from outputs"):
            tuner.hyper_step(loss)
    with tuner.validating(EXAMPLES):
        of_each = F.cross_entropy(tuner.model(x), y, reduction="none")
    with pytest.raises(TypeError, match=r"hyper_step: the loss must be a tensor of one number.*got a tensor \(13,\)"):
        tuner.hyper_step(of_each)
    with pytest.raises(TypeError, match="got float"):
        tuner.hyper_step(0.5)
    assert torch.equal(tuner.method.location, before)
    assert (tuner.validated, tuner.history) == (0, [])


def test_the_loss_of_a_step_must_depend_on_hyperparameters_too():
    tuner = tuner_of(loss=lambda output, targets: output.detach().mean())
    with pytest.raises(RuntimeError, match="validation loss does not depend on the hyperparameters"):
        tuner.valid_step(batch(0))
    assert tuner.draws == 0


def test_a_validation_loss_that_is_not_finite_changes_nothing():
    tuner, (x, y) = tuner_of(), batch(0)
    before = tuner.method.location.detach().clone()
    with tuner.validating(EXAMPLES):
        loss = F.cross_entropy(tuner.model(x), y) * math.inf
    with pytest.raises(NonFiniteError):
        tuner.hyper_step(loss)
    assert torch.equal(tuner.method.location, before)
    assert tuner.validated == 0


def test_the_step_of_the_hyperparameters_may_be_inside_for_checkpointing():
    plain, checkpointed = tuner_of(), tuner_of(Checkpointed())
    x, y = batch(0)
    for tuner in (plain, checkpointed):
        with tuner.validating(EXAMPLES):
            tuner.hyper_step(F.cross_entropy(tuner.model(x), y))
    assert torch.equal(plain.method.location, checkpointed.method.location)


def test_steps_need_a_loss():
    tuner = tuner_of(loss=None)
    for step in (tuner.train_step, tuner.valid_step):
        with pytest.raises(TypeError, match=r"steps need a loss, SelfTuner\(model, optimizer, loss\)"):
            step(batch(0))


def test_a_step_inside_a_pass_is_an_error_and_changes_nothing():
    tuner, (x, y) = tuner_of(), batch(0)
    before = [parameter.clone() for parameter in tuner.model.parameters()]
    with tuner.training(EXAMPLES):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
        with pytest.raises(RuntimeError, match=r"leave `with tuner.training\(...\)` before the optimizer steps"):
            tuner.method.optimizer.step()
    assert all(map(torch.equal, before, tuner.model.parameters()))
    assert tuner.trained == 0
