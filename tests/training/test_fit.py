"""fit: the trainer's runs of converted models on loaders, and that they are resumed bit for bit."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from run_files import result, rows
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import stn_fast as stn
from stn_fast.errors import UserError
from stn_fast.plot import save_schedule
from stn_fast.training import checkpoint
from stn_fast.training.signals import Interrupted
from stn_fast.training.trainer import Diverged


def examples(count=110, classes=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 6, generator=generator)
    return x, (x @ torch.randn(6, classes, generator=generator)).argmax(1)


X, Y = examples()
TRAIN, VALID, TEST = (TensorDataset(X[rows], Y[rows]) for rows in (slice(50), slice(50, 81), slice(81, 110)))


class Noisy(Dataset):
    """Adds noise of torch to the inputs of another data set."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.randn(6), y


def network(rate=0.5, outputs=3):
    """Its second dropout module is left plain, and draws from torch's generator."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(rate), nn.Dropout(0.1), nn.Linear(9, outputs))
    return respond(stn.convert(nn.Sequential(*layers), exclude="4", quiet=True))


def accuracy(logits, targets):
    return (logits.argmax(1) == targets).float().mean()


adam = partial(torch.optim.Adam, lr=0.02)
given = dict(loss=F.cross_entropy, optimizer=adam, epochs=3, warmup_epochs=1, quiet=True)


def trained(directory, model=None, **options):
    train = options.pop("train", DataLoader(Noisy(TRAIN), 12, shuffle=True))
    valid = options.pop("valid", DataLoader(VALID, 8, shuffle=True))
    return stn.fit(model or network(), train, valid, run_dir=directory, **{**given, **options})


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, to be read only."""
    return trained(tmp_path_factory.mktemp("fit") / "whole", scheduler=lambda made: lr_scheduler.StepLR(made, 2))


def interrupting(loss, call, action):
    """The loss, whose ``call``-th call, counted from 1, does ``action``; with the same name, as a resumed run has."""
    calls = []

    def interrupted(output, targets):
        calls.append(1)
        if len(calls) == call:
            action()
        return loss(output, targets)

    interrupted.__qualname__ = loss.__qualname__
    return interrupted


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise KeyboardInterrupt


# The loss is called once in the rehearsal, four times in an evaluation, and twice in a training step. There are five
# training steps in an epoch, so the last two stop in the middle of the second pass, after a validation step.
@pytest.mark.parametrize(("action", "call", "step"), [(terminate, 11, 3), (terminate, 26, 9), (crash, 28, 5)])
def test_a_run_that_is_stopped_anywhere_and_goes_on_equals_one_that_never_stopped(whole, tmp_path, action, call, step):
    scheduler = dict(scheduler=lambda made: lr_scheduler.StepLR(made, 2), checkpoint_epochs=1)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        trained(tmp_path, loss=interrupting(F.cross_entropy, call, action), **scheduler)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == step
    torch.manual_seed(123)
    again = trained(tmp_path, **scheduler)
    assert rows(tmp_path) == rows(whole.run_dir)
    assert result(tmp_path) == result(whole.run_dir)
    assert same(again.best.model, whole.best.model)
    assert same(again.last.model, whole.last.model)


OF_RESPONSE = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("options", "other", "says"),
    [
        ({}, dict(linearize=False), "method.linearize: True -> False"),
        (dict(linearize=False, response_optimizer=OF_RESPONSE), dict(linearize=False), "response_optimizer.lr: 0.1 ->"),
    ],
    ids=["default", "own"],
)
def test_delta_stn_runs_and_resumes_bit_for_bit_and_is_loaded(tmp_path, options, other, says):
    options = dict(method="delta-stn", checkpoint_epochs=1, **options)
    whole = trained(tmp_path / "whole", **options)
    assert whole.result["method"] == "delta-stn"
    with pytest.raises(Interrupted):  # the loss is called once in each step of the weights, and once in each response
        trained(tmp_path / "cut", loss=interrupting(F.cross_entropy, 30, terminate), **options)
    cut_at = checkpoint.steps(tmp_path / "cut" / "checkpoints")[-1]
    assert 5 < cut_at < whole.result["steps"]
    again = trained(tmp_path / "cut", **options)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    assert same(again.last.model, whole.last.model)
    model = stn.load(tmp_path / "cut", stn.fold(network()))
    assert model.tuned_hyperparameters.centred
    assert torch.equal(model(X), whole.best.model(X))
    with pytest.raises(UserError, match=r"method.name: delta-stn -> stn"):
        trained(tmp_path / "cut")
    with pytest.raises(UserError, match=says):
        trained(tmp_path / "cut", method="delta-stn", **other)


def test_a_fit_of_delta_stn_has_the_steps_of_a_self_tuner(tmp_path):
    train, valid = [(X[:20], Y[:20]), (X[20:50], Y[20:50])], [(X[50:81], Y[50:81])]
    models = [stn.convert(nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.4), nn.Linear(9, 3)), quiet=True) for _ in "12"]
    model, other = models
    other.load_state_dict(model.state_dict())
    fit = trained(tmp_path, model, method="delta-stn", train=train, valid=valid, warmup_epochs=0, seed=3)
    tuner = stn.SelfTuner(other, adam(other.parameters()), F.cross_entropy, method="delta-stn", seed=3)
    for batch, held_out in stn.alternate(train, valid, epochs=3):
        tuner.step(batch, held_out)
    assert same(fit.last.model, other)


def test_a_callback_that_ends_a_run_loses_nothing(whole, tmp_path):
    scheduler = dict(scheduler=lambda made: lr_scheduler.StepLR(made, 2))
    seen = []

    def stop(row):
        seen.append(row)
        if row["phase"] == "valid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[stop], **scheduler)
    assert [row["phase"] for row in seen] == ["eval", "train", "eval", "train", "valid"]
    trained(tmp_path, **scheduler)
    assert rows(tmp_path) == rows(whole.run_dir)


def test_the_steps_are_those_of_a_self_tuner_bit_for_bit(tmp_path):
    """With the last, smaller batches of both loaders."""
    train, valid = ([part[:] for part in zip(*(t.split(size) for t in (x, y)), strict=True)] for x, y, size in (
        (X[:50], Y[:50], 12), (X[50:81], Y[50:81], 8)))  # fmt: skip
    model = stn.convert(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 3)), quiet=True)
    other = stn.convert(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 3)), quiet=True)
    other.load_state_dict(model.state_dict())
    fit = trained(tmp_path, model, train=train, valid=valid, warmup_epochs=0, epochs=4, seed=3)
    tuner = stn.SelfTuner(other, adam(other.parameters()), F.cross_entropy, seed=3)
    for batch, held_out in stn.alternate(train, valid, epochs=4):
        tuner.step(batch, held_out)
    assert same(fit.last.model, other)
    assert fit.result["steps"] == tuner.trained + tuner.validated == 30
    assert fit.result["train_examples"] == 2 * 4 * 50
    assert fit.result["valid_examples"] == sum(len(valid[k % 4][1]) for k in range(10))


def test_a_bad_rate_is_tuned_away_and_the_best_model_is_the_one_that_was_evaluated(tmp_path):
    mean = {"accuracy": accuracy}
    hyper = partial(torch.optim.Adam, lr=0.05)
    loaders = dict(train=DataLoader(TRAIN, 12, shuffle=True), test_loader=DataLoader(TEST, 10))
    fit = trained(
        tmp_path, model := network(0.8), metrics=mean, epochs=8, train_steps=1, hyper_optimizer=hyper, **loaders
    )
    evaluations = [row for row in rows(tmp_path) if row["phase"] == "eval"]
    assert [row["epoch"] for row in evaluations] == list(range(9))
    assert evaluations[0]["hyperparameters"]["dropout"] == pytest.approx(0.8)
    assert fit.result["hyperparameters_end"]["dropout"] < 0.75
    assert fit.result["valid_loss"] == min(row["loss"] for row in evaluations) < 0.8 * evaluations[0]["loss"]
    assert fit.best.values() == fit.result["hyperparameters"]
    assert fit.last.values() == fit.result["hyperparameters_end"]
    assert (fit.best.step, fit.last.step) == (fit.result["best_step"], fit.result["steps"])
    plain = fit.best.fold()
    assert type(plain[0]) is nn.Linear
    assert plain[3].p == fit.best.values()["dropout"]
    for split, data in (("valid", VALID), ("test", TEST)):
        x, y = data.tensors
        with torch.no_grad():
            logits = plain(x)
        assert fit.result[f"{split}_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
        assert fit.result[f"{split}_accuracy"] == pytest.approx(accuracy(logits, y).item(), rel=1e-6)
    assert torch.equal(model(X), fit.best.model(X))  # the model itself is the best one


def test_a_finished_run_gives_its_result_and_more_epochs_continue_it(whole, tmp_path, capfd):
    first = trained(tmp_path, epochs=2, scheduler=lambda made: lr_scheduler.StepLR(made, 2))
    again = trained(tmp_path, model := network(), epochs=2, scheduler=lambda made: lr_scheduler.StepLR(made, 2))
    assert again.result == first.result
    assert same(model, first.best.model)
    longer = trained(tmp_path, scheduler=lambda made: lr_scheduler.StepLR(made, 2), quiet=False)
    assert rows(tmp_path) == rows(whole.run_dir)
    assert same(longer.best.model, whole.best.model)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("fit, stn: 5 training, 4 validation batches; ")
    assert said[-1].startswith("20 steps at ")


def test_the_model_of_a_fit_goes_on_although_it_is_in_evaluation_mode(whole, tmp_path):
    model = network()
    first = trained(tmp_path, model, epochs=1)
    assert not model.training
    assert trained(tmp_path, model, epochs=1).result == first.result
    more = trained(tmp_path, model)
    assert more.result["epochs"] == 3
    assert same(more.last.model, trained(tmp_path / "whole", network()).last.model)
    assert repr(more).startswith(f"Fit({str(tmp_path)!r}, valid_loss=")


@pytest.mark.parametrize("given", ["itself", "its copy"])
def test_a_batch_norm_that_was_frozen_before_the_first_call_stays_so_when_a_later_call_goes_on(tmp_path, given):
    def frozen():
        model = network()
        model[1].running_mean.fill_(0.5)
        model[1].eval()
        return model

    whole, model = trained(tmp_path / "whole", frozen()), frozen()
    first = trained(tmp_path / "cut", model, epochs=1)
    again = trained(tmp_path / "cut", model if given == "itself" else first.last.model)
    assert set(again.last.model[1].running_mean.tolist()) == {0.5}
    assert same(again.last.model, whole.last.model)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_finished_run_lacks_a_new_metric_and_a_new_test_loader(tmp_path):
    plain = [(X[50:81], Y[50:81])]  # has no fingerprint
    options = dict(train=[(X[:50], Y[:50])], valid=plain, epochs=1)
    first = trained(tmp_path, metrics={"accuracy": accuracy}, **options)
    model, before = network(), network()
    two = {"accuracy": accuracy, "other": accuracy}
    with pytest.raises(UserError, match=r"a finished run without valid_other: choose another run_dir.*resume=False"):
        trained(tmp_path, model, metrics=two, **options)
    assert same(model, before)
    with pytest.raises(UserError, match="run without test_loss, test_accuracy: choose"):
        trained(tmp_path, metrics={"accuracy": accuracy}, test_loader=plain, **options)
    assert trained(tmp_path, metrics={"accuracy": accuracy}, **options).result == first.result
    longer = trained(tmp_path, metrics=two, **options | dict(epochs=2))
    assert longer.result["valid_other"] == longer.result["valid_accuracy"]


def test_schedulers_step_once_per_epoch_and_get_the_validation_loss(whole, tmp_path):
    assert rates(whole.run_dir) == pytest.approx([0.02, 0.02, 0.002])
    patient = dict(scheduler=lambda made: lr_scheduler.ReduceLROnPlateau(made, factor=0.5, patience=0, threshold=0.05))
    trained(tmp_path, **patient, epochs=3)
    trained(tmp_path, **patient, epochs=8)
    optimizer = adam(nn.Linear(1, 1).parameters())
    plateau, wanted = patient["scheduler"](optimizer), []
    for row in rows(tmp_path):
        if row["phase"] == "eval" and row["epoch"]:
            wanted.append(optimizer.param_groups[0]["lr"])
            plateau.step(row["loss"])
    assert rates(tmp_path) == wanted
    assert len(set(wanted)) > 1


def rates(directory):
    return [row["learning_rate"] for row in rows(directory) if row["phase"] == "train"]


def test_patience_ends_a_run_and_a_run_directory_can_be_plotted(tmp_path):
    fit = trained(tmp_path, optimizer=partial(torch.optim.SGD, lr=1e-12), train_steps=5, epochs=9, patience=2)
    assert fit.result["ended_by"] == "schedule.patience"
    assert fit.result["epochs"] < 9
    assert "test_loss" not in fit.result
    assert save_schedule([tmp_path]).is_file()


class Pair(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.drop = nn.Linear(6, outputs), nn.Dropout(0.2)

    def forward(self, x, shift, labels=None):
        logits = self.linear(self.drop(x)) + shift
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_batches_may_be_triples_or_dicts(tmp_path):
    shift = torch.linspace(-1, 1, 330).view(110, 3)
    triples = [[(X[i : i + k], shift[i : i + k], Y[i : i + k]) for i in range(a, b, k)] for a, b, k in (
        (0, 50, 20), (50, 81, 31))]  # fmt: skip
    dicts = [[dict(zip(("x", "shift", "labels"), batch, strict=True)) for batch in part] for part in triples]
    one = trained(tmp_path / "one", stn.convert(Pair(), quiet=True), train=triples[0], valid=triples[1],
        metrics={"accuracy": accuracy})  # fmt: skip
    other = trained(
        tmp_path / "other",
        stn.convert(Pair(), quiet=True),
        train=dicts[0],
        valid=dicts[1],
        loss=lambda output, batch: output["loss"],
        metrics={"accuracy": lambda output, batch: accuracy(output["logits"], batch["labels"])},
    )
    assert result(tmp_path / "one") == result(tmp_path / "other")
    assert same(one.best.model, other.best.model)


def test_a_regression_has_the_loss_that_it_is_given(tmp_path):
    targets = X[:, :1] * 2 - X[:, 1:2]
    data = [DataLoader(TensorDataset(X[rows], targets[rows]), 16) for rows in (slice(50), slice(50, 110))]
    fit = trained(
        tmp_path,
        network(0.1, outputs=1),
        train=data[0],
        valid=data[1],
        loss=F.mse_loss,
        valid_loss=F.l1_loss,
        metrics={"square": lambda output, target: F.mse_loss(output, target).item()},
        epochs=6,
    )
    output = fit.best.model(X[50:])
    assert fit.result["valid_loss"] == pytest.approx(F.l1_loss(output, targets[50:]).item(), rel=1e-5)
    assert fit.result["valid_square"] == pytest.approx(F.mse_loss(output, targets[50:]).item(), rel=1e-5)
    assert fit.result["valid_loss"] < rows(tmp_path)[0]["loss"]


def test_torchs_generators_are_left_as_they_were(tmp_path):
    model, before = network(), torch.get_rng_state()
    trained(tmp_path, model, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


class Turned(nn.Module):
    """Turns pairs of features by complex numbers of 128 bits."""

    def __init__(self):
        super().__init__()
        self.turn, self.linear = nn.Parameter(torch.ones(3, dtype=torch.complex128)), nn.Linear(6, 3)

    def forward(self, x):
        turned = torch.view_as_complex(x.double().reshape(-1, 3, 2)) * self.turn
        return self.linear(torch.view_as_real(turned).reshape(x.shape).float())


def test_what_a_checkpoint_can_t_hold_is_an_error_before_a_run_replaces_another(tmp_path):
    first = trained(tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"a checkpoint can't hold model/turn, a tensor of torch.complex128"):
        trained(tmp_path, stn.convert(Turned(), quiet=True), resume=False)
    assert same(stn.load(tmp_path, network()), first.best.model)


def test_a_loss_that_is_not_finite_ends_the_run_and_says_what_to_lower(tmp_path):
    with pytest.raises(
        Diverged, match=r"lower optimizer.learning_rate \(now 0\.02\).*resume=False or in another run_dir"
    ):
        trained(tmp_path, loss=interrupting_value(F.cross_entropy, 10))
    assert checkpoint.steps(tmp_path / "checkpoints") == [0]


def interrupting_value(loss, call):
    calls = []

    def broken(output, targets):
        calls.append(1)
        return loss(output, targets) * (torch.inf if len(calls) > call else 1)

    return broken


CHANGED = {
    "fit.optimizer.lr: 0.02 -> 0.01": dict(optimizer=partial(torch.optim.Adam, lr=0.01)),
    "fit.optimizer.class: Adam -> SGD": dict(optimizer=partial(torch.optim.SGD, lr=0.02)),
    "fit.hyper_optimizer.lr: 0.01 -> 0.1": dict(hyper_optimizer=partial(torch.optim.Adam, lr=0.1)),
    "fit.loss: cross_entropy -> nll_loss": dict(loss=F.nll_loss),
    "fit.valid_loss: cross_entropy -> nll_loss": dict(valid_loss=F.nll_loss),
    r"fit.scheduler.step_size: 2 -> 3": dict(scheduler=lambda made: lr_scheduler.StepLR(made, 3)),
    "schedule.batch_size: 12 -> 10": dict(train=DataLoader(Noisy(TRAIN), 10, shuffle=True)),
    "fit.train_batches: 5 -> 4": dict(train=DataLoader(Noisy(TRAIN), 12, shuffle=True, drop_last=True)),
    "fit.valid_batches: 4 -> 3": dict(valid=DataLoader(VALID, 8, drop_last=True)),
    "hyperparameters.dropout.init: 0.5 -> 0.4": dict(model=network(0.4)),
    "fit.modules.5.example_dim: 0 -> None": dict(
        model=stn.convert(stn.fold(network()), exclude=["4", "5"], quiet=True)),
    "seed: 0 -> 1": dict(seed=1),
    "method.train_steps: 2 -> 1": dict(train_steps=1),
    "optimizer.clip: 1.0 -> None": dict(clip=None),
    r"other data \(different: validation split\)": dict(valid=DataLoader(TensorDataset(X[51:82], Y[51:82]), 8)),
}  # fmt: skip


@pytest.mark.parametrize("says", CHANGED)
def test_a_run_with_other_settings_is_not_continued(whole, says):
    before = {file: file.read_bytes() for file in Path(whole.run_dir).rglob("*") if file.is_file()}
    options = {"scheduler": lambda made: lr_scheduler.StepLR(made, 2), **CHANGED[says]}
    with pytest.raises(UserError, match=f"{says}.*choose another run_dir.* start over with resume=False"):
        trained(whole.run_dir, **options)
    assert {file: file.read_bytes() for file in Path(whole.run_dir).rglob("*") if file.is_file()} == before


def regularised(addition):
    torch.manual_seed(0)
    return stn.convert(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), [addition], quiet=True)


class Halved(nn.Module):
    """A loss in a loss."""

    def __init__(self, factor, **settings):
        super().__init__()
        self.factor, self.inner = factor, nn.CrossEntropyLoss(**settings)

    def forward(self, output, targets):
        return self.factor * self.inner(output, targets)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            dict(model=partial(regularised, stn.Dropout("0", init=0.3, name="d"))),
            dict(model=partial(regularised, stn.Dropout("1", init=0.3, name="d"))),
            r"fit.additions.d: Dropout of 0 -> Dropout of 1\)",
        ),
        (
            dict(model=partial(regularised, stn.WeightDecay("0", name="wd"))),
            dict(model=partial(regularised, stn.WeightDecay("2", name="wd"))),
            r"fit.additions.wd: WeightDecay of 0 -> WeightDecay of 2\)",
        ),
        (
            dict(loss=nn.CrossEntropyLoss()),
            dict(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 100.0, 0.5]))),
            r"fit.loss: CrossEntropyLoss\(.*\) -> CrossEntropyLoss\(.*weight=\(1.0, 100.0, 0.5\)",
        ),
        (
            dict(loss=F.cross_entropy, valid_loss=Halved(0.5)),
            dict(loss=F.cross_entropy, valid_loss=Halved(0.5, ignore_index=2)),
            r"fit.valid_loss: Halved\(factor=0.5.*inner.ignore_index=-100.* -> Halved\(.*inner.ignore_index=2",
        ),
    ],
)
def test_other_regularisers_or_settings_of_a_loss_are_not_continued(tmp_path, first, second, says):
    def call(options, epochs):
        options = dict(options)
        return trained(tmp_path, options.pop("model", network)(), epochs=epochs, **options)

    call(first, 1)
    with pytest.raises(UserError, match=says):
        call(second, 2)
    assert call(first, 2).result["epochs"] == 2


class Own(lr_scheduler.LRScheduler):
    """Keeps a function in its state."""

    def __init__(self, optimizer):
        self.rule = lambda epoch: 0.1
        super().__init__(optimizer)

    def get_lr(self):
        return [self.rule(self.last_epoch)]


WRONG = {
    "model must be one that stn.convert has converted": dict(model=nn.Linear(6, 3)),
    r"optimizer must be a function that makes it, such as partial\(Adam, ...\).*got an object of type Adam": dict(
        optimizer=adam(nn.Linear(1, 1).parameters())),
    "optimizer must make a Optimizer of torch, but <lambda> made a Linear": dict(
        optimizer=lambda parameters: nn.Linear(1, 1)),
    "the optimizer holds none of the model's parameters": dict(
        optimizer=lambda parameters: adam(nn.Linear(1, 1).parameters())),
    r"scheduler must be a function.*partial\(StepLR": dict(
        scheduler=lr_scheduler.StepLR(adam(nn.Linear(1, 1).parameters()), 1)),
    "scheduler, Own, can't be saved: a checkpoint can't hold rule": dict(scheduler=lambda made: Own(made)),
    "epochs must be an int >= 1": dict(epochs=0),
    "train_steps must be an int >= 1": dict(train_steps=1.5),
    "warmup_epochs must be an int >= 0": dict(warmup_epochs=-1),
    "patience must be an int >= 1": dict(patience=0),
    r"method must be one of 'stn', 'delta-stn', got 'delta'": dict(method="delta"),
    "response_optimizer and linearize are options of method='delta-stn'": dict(linearize=False),
    r"response_optimizer must be a function that makes it": dict(method="delta-stn", response_optimizer=3),
    "linearize must be True or False": dict(method="delta-stn", linearize=1),
    "resume must be True or False": dict(resume="no"),
    "clip must be above 0": dict(clip=0),
    "entropy_weight = -1.0: must be finite and at least 0": dict(entropy_weight=-1),
    r"metrics must be \{name: function of outputs and targets\}": dict(metrics=["accuracy"]),
    "callbacks must be a list of functions of a row": dict(callbacks=print),
    "loss must be a function of outputs and targets, got <class": dict(loss=nn.CrossEntropyLoss),
    "a metric can't be called 'loss'": dict(metrics={"loss": accuracy}),
    r"metrics\['accuracy'\] must be a function of outputs and targets, got int": dict(metrics={"accuracy": 3}),
    r"metrics\['each'\] must be one number.*got a tensor \(8, 3\)": dict(metrics={"each": lambda out, y: out}),
    "the training loss must be a tensor of one number": dict(loss=lambda out, y: out, valid_loss=F.cross_entropy),
    "fit: train_loader gives no batch": dict(train=DataLoader(TRAIN, 99, drop_last=True)),
    "fit: valid_loader can be read only once": dict(valid=iter([])),
    "fit: test_loader must be a loader": dict(test_loader=3),
    "a batch must be": dict(train=[X]),
    "a batch has a PackedSequence": dict(train=[(nn.utils.rnn.pack_sequence([X]), Y)]),
}  # fmt: skip


@pytest.mark.parametrize("says", WRONG)
def test_wrong_arguments_are_named(tmp_path, says):
    model = (options := dict(WRONG[says])).pop("model", None) or network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=says):
        trained(tmp_path, model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "result.json").exists()


def test_hyperparameters_with_different_responses_are_refused(tmp_path):
    space = stn.HyperparameterSpace([
        stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-3, response="raw"),
    ])  # fmt: skip
    model = stn.convert(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.3)), space, quiet=True)
    with pytest.raises(UserError, match="all hyperparameters must have the same response, got shifted, raw"):
        trained(tmp_path, model)
