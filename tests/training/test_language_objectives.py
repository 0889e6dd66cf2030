"""AR and TAR: the penalties of training, and that no validation objective has them."""

import pytest
import torch
import torch.nn.functional as F

from stn_fast.data import Split
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.models import LanguageModel, tuned
from stn_fast.training.language import (
    activation_penalty,
    next_word_loss,
    next_word_scores,
    regularised_next_word_loss,
)
from stn_fast.training.streams import Streams

ALPHA = Hyperparameter("activation_regularization", low=0.0, init=0.7, per_example=False)
BETA = Hyperparameter("temporal_activation_regularization", low=0.0, init=0.3, per_example=False)
OTHER = Hyperparameter("output_dropout", low=0.0, high=0.95, init=0.5)


def batch_of(*hyperparameters, batch=4):
    space = HyperparameterSpace(hyperparameters)
    return space.sample(*space.initial_state(), batch_size=batch, seed=0, step=0)


def activations(time=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(time, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_each_penalty_is_its_mean_square_times_its_weight():
    raw, dropped = activations()
    ar, tar = dropped.pow(2).sum() / dropped.numel(), (raw[1:] - raw[:-1]).pow(2).sum() / raw[1:].numel()
    hyper = batch_of(OTHER, ALPHA, BETA)
    alpha, beta = hyper["activation_regularization"][0], hyper["temporal_activation_regularization"][0]
    assert alpha != 0.7
    torch.testing.assert_close(activation_penalty(raw, dropped, hyper), alpha * ar + beta * tar, check_dtype=False)
    torch.testing.assert_close(
        activation_penalty(raw, dropped, batch_of(ALPHA)), batch_of(ALPHA).values[0, 0] * ar, check_dtype=False
    )
    assert activation_penalty(raw, dropped, batch_of(OTHER)) == 0


def test_every_example_may_have_weights_of_its_own():
    hyper, (raw, dropped) = batch_of(Hyperparameter("activation_regularization", low=0.0, init=0.7)), activations()
    want = sum(hyper.values[b, 0] * dropped[:, b].pow(2).mean() for b in range(4)) / 4
    torch.testing.assert_close(activation_penalty(raw, dropped, hyper), want, check_dtype=False)


def test_the_temporal_penalty_has_gradients_for_both_time_steps():
    (raw, dropped), hyper = activations(), batch_of(BETA)
    pull = 2 * hyper.values[0, 0].item() * (raw[1:] - raw[:-1]) / raw[1:].numel()
    want = F.pad(pull, (0, 0, 0, 0, 1, 0)) - F.pad(pull, (0, 0, 0, 0, 0, 1))
    raw.requires_grad_()
    (got,) = torch.autograd.grad(activation_penalty(raw, dropped, hyper), raw)
    torch.testing.assert_close(got, want)


def test_a_window_of_one_word_has_no_change_to_penalise():
    assert activation_penalty(*activations(1), batch_of(BETA)) == 0


def test_a_penalty_weight_that_could_be_negative_is_refused():
    with pytest.raises(ValueError, match=r"'activation_regularization' weights a penalty.*got None"):
        activation_penalty(*activations(), batch_of(Hyperparameter("activation_regularization", init=1.0)))


@pytest.mark.parametrize("objective", [next_word_loss, regularised_next_word_loss, next_word_scores])
def test_a_batch_that_is_not_a_window_is_an_error(objective):
    with pytest.raises(TypeError, match="needs a Window of Streams or WholeText, got a Split"):
        objective(torch.nn.Identity(), Split(torch.zeros(3), torch.zeros(3)), None)


def test_training_is_penalised_and_validation_is_not():
    space = HyperparameterSpace([ALPHA, BETA])
    hyper = space.at(space.initial_state()[0], batch_size=4)
    torch.manual_seed(0)
    model = tuned(LanguageModel(11, 6, 6), space)
    tokens = torch.randint(11, (200,))
    window = Streams(Split(tokens[:-1], tokens[1:]), 4, 9, seed=0, stream=0)[0]
    with model.tuned_hyperparameters.using(hyper):
        outputs = model(window.inputs)
    bare = F.cross_entropy(outputs.logits.transpose(1, 2), window.targets)
    penalty = activation_penalty(outputs.raw, outputs.dropped, hyper)
    assert penalty > 0
    validation, state = next_word_loss(model, window, hyper)
    assert torch.equal(state[1], outputs.state[1])
    torch.testing.assert_close(validation, bare)
    torch.testing.assert_close(regularised_next_word_loss(model, window, hyper)[0], bare + penalty)
    torch.testing.assert_close(next_word_scores(model, window, hyper)[0]["loss"], bare * window.targets.numel())
