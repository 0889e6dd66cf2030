"""SelfTuner: the steps of SelfTuning on converted models; `alternate`."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from converted_networks import Block
from random_response import respond
from torch import nn
from torch.utils.checkpoint import checkpoint

import stn_fast as stn
from stn_fast.models import mlp
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.methods import SelfTuning
from stn_fast.training.parameters import is_response
from stn_fast.training.task import classification_loss, decayed_classification_loss

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)


def batch(seed, examples=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 6, generator=generator), torch.randint(4, (examples,), generator=generator)


def network(rate=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(rate), nn.Linear(16, 4))


def tuner_of(model=None, make=torch.optim.SGD, **options):
    tuned = respond(stn.convert(model or network(), quiet=True))
    return stn.SelfTuner(tuned, make(tuned.parameters(), lr=0.05), F.cross_entropy, **options)


def run(tuner, steps, start=0):
    return [tuner.step(batch(k), batch(100 + k)) for k in range(start, start + steps)]


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "options", [{}, dict(antithetic=False, tune_scales=False, clip=0.1, entropy_weight=0.1, seed=5)]
)
def test_the_numbers_are_those_of_self_tuning_on_the_network_of_gated_layers_bit_for_bit(options):
    hand = respond(mlp(SPACE, (6, 16, 4), response_rank="auto"))
    tuned = stn.convert(network(), SPACE, dropouts={"2": "hidden_dropout_1"}, quiet=True)
    layers = [tuned[0], tuned[3]]
    for ours, theirs in zip(layers, hand.layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    hand.dropouts[1].stream = tuned[2].stream
    by_name = [dict(layer.named_parameters()) for layer in layers]
    names = [dict(layer.named_parameters()) for layer in hand.layers]
    ordered = [mine[name] for mine, theirs in zip(by_name, names, strict=True) for name in theirs]
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(ordered, lr=0.05, momentum=0.9), F.cross_entropy, **options)
    method = SelfTuning(
        hand,
        SPACE,
        decayed_classification_loss,
        classification_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        **options,
    )
    step = 0
    for k in range(8):
        loss = tuner.step(batch(k), batch(100 + k) if k % 2 == 1 else None)
        assert torch.equal(loss, method.train_step(batch(k), step))
        step += 1
        if k % 2 == 1:
            method.valid_step(batch(100 + k), step)
            step += 1
    assert torch.equal(tuner.method.location, method.location)
    assert torch.equal(tuned.tuned_hyperparameters.location, method.location.detach())
    assert torch.equal(tuned.tuned_hyperparameters.raw_scale, method.raw_scale.detach())
    assert all(same(ours, theirs) for ours, theirs in zip(layers, hand.layers, strict=True))


def test_validation_steps_come_with_their_batches_after_the_warm_up():
    tuner = tuner_of(warmup_steps=4)
    counts = []
    for k in range(8):
        tuner.step(batch(k), batch(100) if k % 2 else None)
        counts.append(tuner.validated)
    assert counts == [0] * 5 + [1] * 2 + [2]
    assert [row["step"] for row in tuner.history] == [6, 8]


def test_a_training_step_moves_weights_and_a_validation_step_hyperparameters():
    tuner = tuner_of()
    own = tuner.model.tuned_hyperparameters
    before, location = copy.deepcopy(tuner.model), own.location.clone()
    tuner.train_step(batch(0))
    assert torch.equal(own.location, location)
    for (name, now), was in zip(tuner.model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(now, was), name
    before = copy.deepcopy(tuner.model)
    tuner.valid_step(batch(1))
    assert (own.location != location).all()
    assert all(map(torch.equal, tuner.model.parameters(), before.parameters()))
    assert tuner.values() == own.values()
    assert tuner.scales() == own.scales()
    assert own.current is None


def test_history_has_the_loss_and_the_values_of_each_validation_step():
    tuner = tuner_of()
    loss = tuner.valid_step(batch(0))
    first = tuner.values()
    tuner.valid_step(batch(1))
    assert tuner.history[0] == {"step": 0, "loss": loss.item(), "values": first}
    assert tuner.history[1]["values"] == tuner.values() != first


def test_a_bad_dropout_rate_is_tuned_away():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = (x[:, :4] @ torch.randn(4, 4, generator=generator)).argmax(1)
    tuner = tuner_of(network(0.8), hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05))
    assert tuner.values()["dropout"] == pytest.approx(0.8)
    for _ in range(150):
        tuner.step((x[:200], y[:200]), (x[200:], y[200:]))
    assert tuner.values()["dropout"] < 0.5


def test_a_resumed_run_is_the_same_bit_for_bit():
    whole = tuner_of(make=torch.optim.AdamW, warmup_steps=1)
    run(whole, 9)
    first = tuner_of(make=torch.optim.AdamW, warmup_steps=1)
    run(first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = tuner_of(make=torch.optim.AdamW, warmup_steps=1)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, 5, start=4)
    assert same(second.model, whole.model)
    assert second.values() == whole.values()
    assert torch.equal(second.method.raw_scale, whole.method.raw_scale)
    assert (second.trained, second.validated) == (whole.trained, whole.validated) == (9, 8)


def test_folding_gives_the_plain_network_at_the_tuned_values():
    tuner = tuner_of()
    run(tuner, 4)
    plain = tuner.fold()
    x, _ = batch(0)
    torch.testing.assert_close(plain.eval()(x), tuner.model.eval()(x))
    assert plain[2].p == tuner.values()["dropout"]
    assert type(plain[0]) is nn.Linear


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 4), nn.Dropout(0.2)

    def forward(self, x, shift, labels=None):
        logits = self.linear(self.drop(x)) + shift
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels)}


def test_a_batch_may_have_several_inputs_or_be_a_dict():
    (x, y), shift = batch(0), torch.ones(16, 4)
    losses = []
    for given, loss in (
        ((x, shift, y), F.cross_entropy),
        (dict(x=x, shift=shift, labels=y), lambda output, entries: output["loss"]),
        (dict(x=x, shift=shift), lambda output, entries: F.cross_entropy(output, y + 0 * entries["x"][:, 0].long())),
    ):
        torch.manual_seed(0)
        tuned = stn.convert(Pair(), quiet=True)
        tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1), loss)
        tuner.step(given)
        losses.append(tuner.step(given, given))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


class Both(nn.Module):
    """Of two inputs in a tuple or a list."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, both):
        return self.linear(both[0] + 2 * both[1])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("of_batch", [tuple, list])
def test_inputs_that_are_a_tuple_or_a_list_are_one_argument(kind, of_batch):
    x, y = batch(0)
    tuned = stn.convert(Both(), quiet=True)
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.0), F.cross_entropy)
    loss = tuner.valid_step(of_batch((kind((x, -x)), y)))
    torch.testing.assert_close(loss, F.cross_entropy(tuned.linear.eval()(-x), y).detach())
    tuner.step(of_batch((kind((x, -x)), y)))


def test_examples_are_counted_by_the_first_input_not_by_the_targets():
    tuned = stn.convert(Block(0.2), quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 0.1), lambda y, targets: (y.flatten(0, 1) - targets).square().mean()
    )
    tokens = torch.arange(10).view(2, 5)
    assert tuner.step((tokens, torch.randn(10, 6))).isfinite()


def test_the_loss_of_validation_may_be_another_one():
    tuner = tuner_of(tune_scales=False, valid_loss=lambda output, targets: output.square().mean())
    x, y = batch(0)
    want = tuner.model.eval()(x).square().mean()
    torch.testing.assert_close(tuner.valid_step((x, y)), want)
    assert tuner.train_step((x, y)) != tuner.valid_step((x, y))


def test_checkpointed_segments_are_recomputed_with_the_hyperparameters_of_their_pass():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.inner, self.reentrant = network(), reentrant

        def forward(self, x):
            return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)

    plain, *recomputing = [tuner_of(Checkpointed(reentrant)) for reentrant in (None, False)]
    run(plain, 4)
    for tuner in recomputing:
        run(tuner, 4)
        assert same(tuner.model, plain.model)


def test_a_step_that_is_not_finite_changes_nothing():
    tuner = tuner_of()
    before, (x, y) = copy.deepcopy(tuner.model), batch(0)
    with pytest.raises(NonFiniteError):
        tuner.step((x * math.inf, y))
    assert same(tuner.model, before)
    assert tuner.model.tuned_hyperparameters.current is None
    assert tuner.trained == 0


def test_wrong_optimizers_and_models_are_refused():
    plain = network()
    early = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"SelfTuner: model must be one that stn\.convert has converted, got Sequential"
    ):
        stn.SelfTuner(plain, early, F.cross_entropy)
    tuned = stn.convert(plain, quiet=True)
    with pytest.raises(ValueError, match=r"lacks 0\.response_weight.* and \d+ more, parameters of the response.*after"):
        stn.SelfTuner(tuned, early, F.cross_entropy)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        stn.SelfTuner(tuned, other, F.cross_entropy)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer.*got type"):
        stn.SelfTuner(tuned, torch.optim.SGD, F.cross_entropy)


@pytest.mark.parametrize("options", [dict(warmup_steps=-1), dict(clip=0.0), dict(seed=-1)], ids=str)
def test_wrong_settings_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        tuner_of(**options)


def test_a_dropout_module_that_is_never_called_is_named():
    model = network()
    model.forward = lambda x: model[3](model[0](x))
    with pytest.raises(ValueError, match="nothing uses 'dropout': no layer"):
        tuner_of(model).step(batch(0))


def test_errors_about_the_loss_do_not_speak_of_objectives():
    space = stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, init=0.1) for name in ("weight_decay", "mine")])
    options, x_y = dict(of_loss="mine", quiet=True), batch(0)
    cases = [
        (F.cross_entropy, "nothing uses 'mine': no layer and no term of the training loss looks it up"),
        (lambda y, targets: y, r"the training loss must be a tensor of one number.*got a tensor \(16, 4\)"),
    ]
    for loss, says in cases:
        model = stn.convert(nn.Sequential(nn.Linear(6, 4)), space, **options)
        tuner = stn.SelfTuner(model, torch.optim.SGD(model.parameters(), lr=0.05), loss)
        with pytest.raises((TypeError, ValueError), match=says) as caught:
            tuner.step(x_y)
        assert "objective" not in str(caught.value)


def test_wrong_batches_are_named():
    tuner = tuner_of()
    with pytest.raises(TypeError, match="a batch must be"):
        tuner.step(torch.randn(3, 6))
    with pytest.raises(TypeError, match="the first input of a batch must be a tensor"):
        tuner.step(dict(x=3))


def test_packed_sequences_are_refused_by_name():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 6), [5, 2, 2])
    for held in ((packed, torch.zeros(3)), dict(x=[packed], labels=torch.zeros(3))):
        with pytest.raises(TypeError, match=r"a PackedSequence, whose rows are not examples.*give padded sequences"):
            tuner_of().step(held)
        with pytest.raises(TypeError, match="a PackedSequence"):
            tuner_of().valid_step(held)


def test_alternate_gives_a_validation_batch_after_every_train_steps():
    assert list(stn.alternate("abcde", [1, 2, 3])) == [("a", None), ("b", 1), ("c", None), ("d", 2), ("e", None)]
    assert list(stn.alternate("abc", [1, 2], train_steps=1)) == [("a", 1), ("b", 2), ("c", 1)]
    epochs = [("a", None), ("b", 1), ("c", None), ("a", 2), ("b", None), ("c", 3)]
    assert list(stn.alternate("abc", [1, 2, 3], epochs=2)) == epochs


def test_alternate_refuses_empty_loaders():
    with pytest.raises(ValueError, match="train_loader gives no batch"):
        list(stn.alternate([], [1]))
    with pytest.raises(ValueError, match="valid_loader gives no batch"):
        list(stn.alternate("ab", []))
    with pytest.raises(ValueError, match="read again and again"):
        list(stn.alternate("abcd", iter([1])))
    with pytest.raises(ValueError, match="train_steps must be"):
        list(stn.alternate("ab", [1], train_steps=0))
    with pytest.raises(ValueError, match="epochs must be"):
        list(stn.alternate("ab", [1], epochs=0))
    with pytest.raises(ValueError, match="train_loader gives no batch"):
        list(stn.alternate(iter("ab"), [1], epochs=2))


def test_memory_of_its_own_for_the_models_hyperparameters_is_refused():
    tuner = tuner_of()
    state = {name: value.clone() for name, value in tuner.model.state_dict().items()}
    tuner.model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="other memory than when the tuner was made"):
        tuner.step(batch(0))


def test_an_optimizer_that_decays_weights_too_is_a_warning():
    tuned = stn.convert(network(), quiet=True)
    with pytest.warns(UserWarning, match=r"decays weights by 0\.01, in addition to the tuned weight_decay"):
        stn.SelfTuner(tuned, torch.optim.AdamW(tuned.parameters()), F.cross_entropy)


def test_an_optimizer_of_the_response_alone_is_refused():
    tuned = stn.convert(network(), quiet=True)
    response = [parameter for name, parameter in tuned.named_parameters() if is_response(name)]
    with pytest.raises(ValueError, match="holds only parameters of the response"):
        stn.SelfTuner(tuned, torch.optim.SGD(response, lr=0.1), F.cross_entropy)


def test_a_rate_that_is_too_high_falls_with_every_seed():
    """The example of the README."""
    for seed in (0, 4):  # two of those with which it rose before the perturbations were as wide
        torch.manual_seed(seed)
        x = torch.randn(600, 20)
        y = (x[:, :3].sum(1) > 0).long()
        train, valid = (list(zip(x[rows].split(50), y[rows].split(50), strict=True)) for rows in (
            slice(400), slice(400, 600)))  # fmt: skip
        tuned = stn.convert(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.7), nn.Linear(64, 2)), quiet=True)
        tuner = stn.SelfTuner(tuned, torch.optim.AdamW(tuned.parameters(), 1e-3, weight_decay=0), F.cross_entropy)
        for step_batch, held_out in stn.alternate(train, valid, epochs=30):
            tuner.step(step_batch, held_out)
        assert tuner.values()["dropout"] < 0.6


@pytest.mark.parametrize("loss", ["ce", nn.CrossEntropyLoss], ids=["str", "class"])
def test_a_loss_that_is_no_function_is_refused(loss):
    model = stn.convert(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), quiet=True)
    with pytest.raises(TypeError, match="SelfTuner: loss must be a function of outputs and targets, got"):
        stn.SelfTuner(model, torch.optim.SGD(model.parameters(), 0.1), loss)


def test_a_converted_layer_that_a_plain_one_has_replaced_is_named():
    tuned = stn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)), quiet=True)
    tuned = nn.SyncBatchNorm.convert_sync_batchnorm(tuned)
    with pytest.raises(ValueError, match=r"1 \(SyncBatchNorm\) had been converted"):
        stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1), F.mse_loss)
