"""Label smoothing at a rate for each example, and SelfTuner with a LabelSmoothing added by convert."""

import copy

import pytest
import torch
import torch.nn.functional as F
from converted_networks import converted
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast.training.smoothing import smoothed_cross_entropy

CLASSES = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0], dtype=torch.float64)


def made(rows, *more, probabilities=False, ignored=None):
    """Logits (rows, C, *more) and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, CLASSES, *more, generator=generator, dtype=torch.float64)
    if probabilities:
        return logits, torch.rand(logits.shape, generator=generator, dtype=torch.float64).softmax(1)
    targets = torch.randint(CLASSES, (rows, *more), generator=generator)
    if ignored is not None:
        targets.view(-1)[::3] = ignored
    return logits, targets


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("more", [(), (3,), (2, 3)])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "ignored", "another ignored"])
def test_the_same_rate_for_all_is_label_smoothing_of_torch(kind, more, weight):
    ignored = {"ignored": -100, "another ignored": 1}.get(kind)
    logits, targets = made(6, *more, probabilities=kind == "probabilities", ignored=ignored)
    options = {} if ignored is None else dict(ignore_index=ignored)
    for rate in (0.0, 0.3, 1.0):
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        for examples in (6, 3):  # one row and two rows of each
            rates = torch.full((examples,), rate, dtype=torch.float64)
            loss = smoothed_cross_entropy(ours, targets, rates, weight=weight, **options)
            want = F.cross_entropy(theirs, targets, weight, label_smoothing=rate, **options)
            assert relative_error(loss, want) < 1e-14
        (gradient,), (expected,) = torch.autograd.grad(loss, ours), torch.autograd.grad(want, theirs)
        assert relative_error(gradient, expected) < 1e-14


@pytest.mark.parametrize("more", [(), (2, 3)])
def test_each_example_has_its_own_rate(more):
    logits, targets = made(6, *more)
    rates = torch.tensor([0.0, 0.1, 0.5])
    log_p = logits.log_softmax(1)
    correct = -log_p.gather(1, targets[:, None])[:, 0]
    rate = rates.double().repeat_interleave(2).view(6, *[1] * len(more))
    want = ((1 - rate) * correct - rate * log_p.mean(1)).mean()
    assert relative_error(smoothed_cross_entropy(logits, targets, rates), want) < 1e-7


@pytest.mark.parametrize("shape", [(6, CLASSES), (CLASSES,), (0, CLASSES)])
def test_logits_without_rows_for_each_example_are_refused(shape):
    with pytest.raises(ValueError, match=r"dimension 0 of the logits must count the examples.*for 4 examples"):
        smoothed_cross_entropy(torch.zeros(shape), torch.zeros(shape[:1], dtype=torch.long), torch.full((4,), 0.1))


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
    return converted(model, space=[stn.LabelSmoothing(**options)])


def batch(examples):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (examples,), generator=generator)


def tuner_of(tuned, loss=F.cross_entropy, **options):
    make = dict(clip=None, antithetic=False, tune_scales=False) | options
    optimizer = torch.optim.SGD(tuned.parameters(), 1.0)
    return stn.SelfTuner(tuned, optimizer, loss, hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, 1.0), **make)


def test_the_range_and_the_report(capsys):
    wanted = stn.Hyperparameter("label_smoothing", low=0.0, high=0.5, init=0.05, scale=1.0)
    assert stn.LabelSmoothing().hyperparameter == wanted
    tuned = stn.convert(nn.Linear(2, 2), [stn.LabelSmoothing(0.2, "smooth", 0.9)])
    assert tuned.tuned_hyperparameters.space.names == ("weight_decay", "smooth")
    shown = capsys.readouterr().out.splitlines()[-1].split(maxsplit=2)
    assert shown == ["smooth", "0.2", "[0, 0.9)  added as LabelSmoothing of the training loss"]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_training_step_minimises_the_smoothed_loss(weighted):
    tuned, (x, y) = network(init=0.2), batch(6)
    y[2] = 4
    loss = nn.CrossEntropyLoss(WEIGHT, ignore_index=4) if weighted else F.cross_entropy
    before = copy.deepcopy(tuned)
    value = tuner_of(tuned, loss, seed=5).train_step((x, y))
    own = before.tuned_hyperparameters
    hyper = own.space.sample(own.location, own.raw_scale, batch_size=6, seed=5, step=0)
    with own.using(hyper):
        log_p = before(x).log_softmax(1)
    rate, weight = hyper["label_smoothing"].double()[:, None], WEIGHT if weighted else torch.ones(CLASSES).double()
    smooth = (1 - rate) * F.one_hot(y, CLASSES) + rate / CLASSES
    rows = -(smooth * weight * log_p).sum(1)
    kept = (y != 4).double() if weighted else torch.ones(6).double()
    want = (rows * kept).sum() / (weight[y] * kept).sum()
    want = want + sum(before[k].weight_decay_penalty(hyper, hyper["weight_decay"]) for k in (0, 2))
    want.backward()
    assert relative_error(value, want.detach()) < 1e-6
    for name, parameter in before.named_parameters():
        if "response" not in name:
            moved = parameter.detach() - tuned.get_parameter(name).detach()
            assert relative_error(moved, parameter.grad) < 1e-6, name


def test_a_validation_step_does_not_smooth_and_moves_the_rate():
    tuned, (x, y) = network(init=0.4), batch(7)
    own = tuned.tuned_hyperparameters
    location, plain = own.location.clone().requires_grad_(), copy.deepcopy(tuned).eval()
    with plain.tuned_hyperparameters.using(own.space.at(location, batch_size=7)):
        loss = F.cross_entropy(plain(x), y)
    (wanted,) = torch.autograd.grad(loss, location)
    tuner = tuner_of(tuned)
    assert relative_error(tuner.valid_step((x, y)), loss.detach()) < 1e-7
    assert wanted.all()
    assert relative_error(location.detach() - own.location, wanted) < 1e-5


def test_a_rate_that_is_far_too_high_is_tuned_down():
    torch.manual_seed(0)
    tuned = stn.convert(nn.Linear(6, 4), [stn.LabelSmoothing(init=0.4)], quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 0.5), nn.CrossEntropyLoss(),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1))  # fmt: skip
    x = torch.randn(80, 6)
    y = x[:, :4].argmax(1)
    for _ in range(40):
        tuner.step((x[:40], y[:40]), (x[40:], y[40:]))
    assert tuner.values()["label_smoothing"] < 0.3


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: F.cross_entropy(logits, targets),
        F.nll_loss,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        type("Own", (nn.CrossEntropyLoss,), {})(),
    ],
    ids=["lambda", "nll", "smoothed", "sum", "subclass"],
)
def test_a_loss_that_cannot_be_smoothed_is_refused(loss):
    message = r"loss must be F\.cross_entropy or an nn\.CrossEntropyLoss.*by hand, with model\.tuned_hyperparameters\."
    with pytest.raises(ValueError, match=message + r"current\['label_smoothing'\], and needs a valid_loss"):
        tuner_of(network(), loss)
    tuner_of(converted(nn.Linear(2, 2), space=[]), loss)


def test_a_loss_may_smooth_the_labels_by_hand():
    (x, y), losses, models = batch(6), [], [network(), network()]

    def by_hand(logits, targets):
        return smoothed_cross_entropy(logits, targets, models[1].tuned_hyperparameters.current["label_smoothing"])

    for tuned, options in zip(models, ({}, dict(loss=by_hand, valid_loss=F.cross_entropy)), strict=True):
        tuner = tuner_of(tuned, **options)
        losses.append((tuner.step((x, y), (x, y)), tuner.step((x, y), (x, y))))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="nothing uses 'label_smoothing'"):
        tuner_of(network(), F.multi_margin_loss, valid_loss=F.cross_entropy).step((x, y))


def test_several_and_names_that_are_used_are_refused():
    with pytest.raises(ValueError, match="the list has several LabelSmoothing"):
        stn.convert(nn.Linear(2, 2), [stn.LabelSmoothing(), stn.LabelSmoothing(name="other")])
    for name in ("weight_decay", "dropout"):
        with pytest.raises(ValueError, match=f"would be the hyperparameter '{name}'"):
            stn.convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), [stn.LabelSmoothing(name=name)])


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(init=0.5), r"init=0\.5 must be strictly inside"), (dict(high=1.1), r"high must be at most 1, got 1\.1")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stn.LabelSmoothing(**options)
