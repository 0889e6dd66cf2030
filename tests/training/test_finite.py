"""A loss or a gradient that is not finite: named, and kept from everything that a step changes."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gates_alone import FixedHyperparameters, SelfTuning

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.models import mlp
from stn_fast.training import finite
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.streams import Streams
from stn_fast.training.task import classification_loss

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)
NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "plain sgd": partial(torch.optim.SGD, lr=0.05),
    "adam": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "unfused adamw": partial(torch.optim.AdamW, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2),
}


class Normed(torch.nn.Module):
    """With running statistics, which a forward pass changes before there is a loss."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.last = stn.HyperLinear(16, 4, num_hyperparameters=2)

    def forward(self, x, hyper):
        return self.last(self.norm(self.first(x)).relu(), hyper)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Normed()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Split(torch.randn(32, 6, generator=generator), torch.randint(4, (32,), generator=generator))


@pytest.fixture(params=["host", "device"])
def judge(request, monkeypatch):
    """Who decides on a step: the host before it, as on the CPU, or the device, as on CUDA."""
    if request.param == "device":
        monkeypatch.setattr(finite, "_decides", lambda device: True)
    return request.param


def poisoned(batch, value=NAN):
    return Split(batch.inputs.clone().index_fill_(0, torch.tensor([3]), value), batch.targets)


def everything(method):
    """All that a step may change, by name."""
    state = method.state_dict()
    found = {f"model.{name}": value for name, value in state["model"].items()}
    for name in ("location", "raw_scale"):
        found[name] = state[name]
    for name in ("optimizer", "hyper_optimizer"):
        for index, of_one in state.get(name, {}).get("state", {}).items():
            found |= {f"{name}.{index}.{key}": value for key, value in of_one.items() if value is not None}
    return copy.deepcopy(found)


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))]


def tuned(model, **options):
    return SelfTuning(model, SPACE, classification_loss, classification_loss, **options)


def judged(take, batch, step):
    """Takes a step and waits for the judgement."""
    take(batch, step)
    take.__self__.check_finite()


def warmed(method, batch):
    """After a step of each kind: moments are there, and on a device the host no longer waits."""
    method.train_step(batch, 0)
    if method.tunes:
        method.valid_step(batch, 1)
    return method


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("hyper_optimizer", ["adam", "rmsprop"])
def test_a_step_that_is_not_finite_changes_nothing(model, batch, judge, optimizer, hyper_optimizer, clip, value):
    options = dict(optimizer=OPTIMIZERS[optimizer], hyper_optimizer=OPTIMIZERS[hyper_optimizer], clip=clip)
    method = warmed(tuned(model, skip_nonfinite=9, **options), batch)
    before = everything(method)
    for step, take in enumerate((method.train_step, method.valid_step), start=2):
        with pytest.warns(RuntimeWarning, match=f"loss is nan at step {step}"):
            judged(take, poisoned(batch, value), step)
    moved = same(before, everything(method))
    # Optimizers that aren't fused count the step on the host, and a count has no use for what it counts.
    assert [name for name in moved if not name.endswith(".step")] == []
    assert method.skipped_steps == 2
    method.train_step(batch, 4)
    judged(method.valid_step, batch, 5)
    assert all(torch.as_tensor(value).isfinite().all() for value in everything(method).values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_step_that_is_not_finite_leaves_no_trace_in_the_second(model, batch, judge, optimizer):
    """A fused SGD makes its momentum of what lies in memory where its first step is skipped on the device."""
    one = tuned(copy.deepcopy(model), optimizer=OPTIMIZERS[optimizer], skip_nonfinite=2)
    other = tuned(model, optimizer=OPTIMIZERS[optimizer])
    with pytest.warns(RuntimeWarning):
        one.train_step(poisoned(batch), 0)
    with pytest.warns(RuntimeWarning):
        one.valid_step(poisoned(batch), 1)
    for method in (one, other):
        method.train_step(batch, 2)
        method.valid_step(batch, 3)
    assert same(everything(one), everything(other)) == []


def test_fixed_hyperparameters_are_guarded_too(model, batch, judge):
    method = warmed(FixedHyperparameters(model, SPACE, classification_loss), batch)
    before = everything(method)
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 7; the step was not taken"):
        judged(method.train_step, poisoned(batch), 7)
    assert same(before, everything(method)) == []


def test_the_error_names_the_step_and_the_loss(model, batch):
    method = warmed(tuned(model), batch)
    with pytest.raises(NonFiniteError, match=r"the validation loss is nan at step 12;.*skip_nonfinite=k") as caught:
        method.valid_step(poisoned(batch), torch.tensor(12))
    assert caught.value.step == 12
    assert caught.value.reason == "the validation loss is nan at step 12"


def infinite_slope(x):
    """√0: the value is 0, its slope is infinite."""
    return (0 * x.sum()).sqrt()


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(model, batch, judge):
    def objective(model, batch, hyper):
        return classification_loss(model, batch, hyper) + infinite_slope(model.first.bias)

    method = warmed(SelfTuning(model, SPACE, classification_loss, classification_loss), batch)
    method.training_objective = objective
    before = everything(method)
    with pytest.raises(NonFiniteError, match=r"the gradient of first\.bias is not finite at training step 2"):
        judged(method.train_step, batch, 2)
    assert same(before, everything(method)) == []


def test_many_parameters_are_counted_and_not_listed(model, batch, judge):
    def objective(model, batch, hyper):
        return classification_loss(model, batch, hyper) + sum(map(infinite_slope, model.parameters()))

    method = warmed(tuned(model), batch)
    method.training_objective = objective
    with pytest.raises(NonFiniteError, match=r"of first.weight, first.bias, norm.weight and 7 more is not finite"):
        judged(method.train_step, batch, 2)


def test_a_gradient_that_is_not_finite_is_named_by_its_hyperparameter(model, batch, judge):
    method = warmed(tuned(model), batch)
    method.validation_objective = lambda *given: classification_loss(*given) + infinite_slope(given[2]["weight_decay"])
    before = everything(method)
    with pytest.raises(
        NonFiniteError, match="gradient of hyperparameter 'weight_decay' is not finite at validation step 3"
    ):
        judged(method.valid_step, batch, 3)
    assert same(before, everything(method)) == []


def test_an_infinite_loss_whose_gradients_are_finite_is_not_taken_either(model, batch, judge):
    method = warmed(tuned(model), batch)
    method.training_objective = lambda *given: classification_loss(*given) + INF
    with pytest.raises(NonFiniteError, match="the training loss is inf at step 2"):
        judged(method.train_step, batch, 2)


def test_a_gradient_longer_than_float32_is_named_as_such(model, batch):
    method = warmed(tuned(model), batch)
    method.training_objective = lambda *given: classification_loss(*given) + 1e30 * given[0].first.weight.sum()
    with pytest.raises(NonFiniteError, match=r"of first\.weight is not finite"):
        method.train_step(batch, 2)
    method.training_objective = lambda *given: (
        classification_loss(*given) + sum(1e18 * parameter.sum() for parameter in given[0].parameters())
    )
    method.train_step(batch, 3)


def test_up_to_k_steps_in_a_row_are_skipped_and_one_more_is_an_error(model, batch, judge):
    method = warmed(tuned(model, skip_nonfinite=2), batch)
    bad = poisoned(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, given in enumerate([bad, bad, batch, bad, bad], start=2):
            method.train_step(given, step)
        method.check_finite()
    assert method.skipped_steps == 4
    with pytest.raises(NonFiniteError, match="at step 7; the step was not taken, nor were the 2 before it"):
        judged(method.train_step, bad, 7)
    assert method.skipped_steps == 5


def test_the_count_goes_on_after_a_checkpoint(model, batch):
    one, other = (warmed(tuned(copy.deepcopy(model), skip_nonfinite=1), batch) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="left out, 1 of 1 in a row"):
        one.train_step(poisoned(batch), 2)
    other.load_state_dict(one.state_dict())
    assert other.skipped_steps == 1
    with pytest.raises(NonFiniteError, match="nor was the one before it"):
        other.train_step(poisoned(batch), 3)


def test_training_and_validation_steps_count_as_one_row(model, batch):
    method = warmed(tuned(model, skip_nonfinite=1), batch)
    with pytest.warns(RuntimeWarning):
        method.train_step(poisoned(batch), 2)
    with pytest.raises(NonFiniteError, match="validation loss"):
        method.valid_step(poisoned(batch), 3)


def test_a_loop_may_go_on_after_the_error(model, batch, judge):
    method, undisturbed = warmed(tuned(copy.deepcopy(model)), batch), warmed(tuned(model), batch)
    with pytest.raises(NonFiniteError):
        judged(method.train_step, poisoned(batch), 2)
    for one in (method, undisturbed):
        one.train_step(batch, 3)
        one.valid_step(batch, 4)
    assert same(everything(method), everything(undisturbed)) == []


def test_the_device_reports_a_step_later_without_being_waited_for(model, batch, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    method = warmed(tuned(model), batch)
    step = torch.tensor(2)
    loss = method.train_step(poisoned(batch), step)  # nothing is raised: nobody has looked
    assert loss.isnan()
    step.add_(1)
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 2"):
        method.train_step(batch, step)


def test_no_number_is_read_back_while_a_step_is_on_its_way(model, batch, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    monkeypatch.setattr(finite._Sent, "arrived", property(lambda self: False))
    method = warmed(tuned(model), batch)
    read, seen = [], []
    item, take = torch.Tensor.item, method.guard.take

    def counted(*given):
        read.clear()
        take(*given)
        seen.append(len(read))

    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(self) or item(self))
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    monkeypatch.setattr(method.guard, "take", counted)
    for step in range(2, 6):
        method.train_step(batch, step)
        method.valid_step(batch, step)
    assert seen == [0] * 8


class OnSecondDevice(torch.Tensor):
    """A tensor on the host that says it is on the second CUDA device."""

    is_cuda, device = True, torch.device("cuda", 1)


def test_numbers_are_waited_for_on_the_device_that_they_come_from(monkeypatch):
    """Each device has its own streams: an event on the first device's says nothing about a copy from the second."""
    current, copied, recorded = [torch.device("cuda", 0)], [], []

    @contextmanager
    def device(other):
        current.append(other)
        yield
        current.pop()

    class Event:
        def record(self, stream=None):
            recorded.append((current[-1], stream or f"stream of {current[-1]}"))

    empty, copy_ = torch.empty, torch.Tensor.copy_
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory, **options: empty(*given, **options))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *given, **options: copied.append(current[-1]) or copy_(*given))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device or current[-1]}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    second = OnSecondDevice.device
    attempt = finite.Attempt("training", 3, torch.zeros(()), torch.zeros(1), torch.zeros(()), str)
    finite.Guard(skip=0).send(attempt, torch.zeros(3).as_subclass(OnSecondDevice))
    assert set(copied) == {second}
    assert recorded == [(second, f"stream of {second}")]


def test_steps_are_checked_before_a_checkpoint_is_made(model, batch, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    method = warmed(tuned(model), batch)
    method.train_step(poisoned(batch), 2)
    with pytest.raises(NonFiniteError):
        method.state_dict()


def test_a_good_state_can_be_loaded_after_a_step_that_nobody_has_judged_yet(model, batch, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    method = warmed(tuned(model), batch)
    state = copy.deepcopy(method.state_dict())
    method.train_step(poisoned(batch), 2)
    method.load_state_dict(state)
    method.train_step(batch, 3)
    method.check_finite()


def test_steps_of_a_large_unfused_optimizer_are_checked_by_the_host(model, batch, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 10)
    method = warmed(tuned(model, optimizer=OPTIMIZERS["unfused adamw"]), batch)
    with pytest.raises(NonFiniteError):
        method.train_step(poisoned(batch), 2)


def test_running_statistics_are_those_of_the_steps_that_were_taken(model, batch, judge):
    method, plain = warmed(tuned(model, skip_nonfinite=1), batch), torch.nn.BatchNorm1d(16)
    before = {name: value.clone() for name, value in model.norm.state_dict().items()}
    with pytest.warns(RuntimeWarning):
        judged(method.train_step, poisoned(batch), 2)
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    plain.load_state_dict(before)
    plain(model.first(batch.inputs))
    method.train_step(batch, 3)
    assert torch.equal(model.norm.running_mean, plain.running_mean)
    assert model.norm.num_batches_tracked == before["num_batches_tracked"] + 1


class Buffered(Normed):
    """With buffers of every kind: reassigned, written to, expanded, large and constant, large and written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("ids", torch.arange(4.0).expand(3, 4))
        self.register_buffer("mask", torch.ones(300, 300))
        self.register_buffer("history", torch.zeros(300, 300))

    def forward(self, x, hyper):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * self.first(x).mean(0)
            self.count += x.sum()
            self.history[0] += x.sum()
        return super().forward(x, hyper)


def test_buffers_of_every_kind_are_those_of_the_steps_that_were_taken(batch, judge):
    torch.manual_seed(0)
    network = Buffered()
    method = SelfTuning(network, SPACE, classification_loss, classification_loss)
    for step in range(2):
        method.train_step(batch, step)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with pytest.raises(NonFiniteError):
        judged(method.train_step, Split(batch.inputs * NAN, batch.targets), 2)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_large_buffers_that_no_step_changes_are_not_copied(batch):
    network = Buffered()
    method = SelfTuning(network, SPACE, classification_loss, classification_loss)
    for step in range(3):
        method.train_step(batch, step)
    copy = method._buffers._copy
    assert copy(network, "mask", network.mask) is None
    assert torch.equal(copy(network, "history", network.history), network.history)


def test_loading_a_state_does_not_make_large_buffers_copied(batch):
    network = Buffered()
    del network.ids  # torch loads no expanded buffer
    method = SelfTuning(network, SPACE, classification_loss, classification_loss)
    method.train_step(batch, 0)
    method.load_state_dict(copy.deepcopy(method.state_dict()))
    assert method._buffers._copy(network, "mask", network.mask) is None
    assert torch.equal(method._buffers._copy(network, "history", network.history), network.history)


def test_a_loss_of_nothing_that_is_trained_is_named(model, batch):
    method = SelfTuning(model, SPACE, classification_loss, classification_loss, optimizer=OPTIMIZERS["plain sgd"])
    apart = torch.ones((), requires_grad=True)
    method.training_objective = lambda model, batch, hyper: apart * 2
    with pytest.raises(RuntimeError, match="none of the parameters that the optimizer trains"):
        method.train_step(batch, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_text_goes_on_from_zero_after_a_window_that_was_left_out(judge):
    class Counter(torch.nn.Module):
        """Its state is the sum of all words so far."""

        def __init__(self):
            super().__init__()
            self.linear = stn.HyperLinear(1, 1, num_hyperparameters=2)

        def forward(self, words, hyper, state):
            total = words.float().sum(0) + (0 if state is None else state)
            return self.linear(total[:, None], hyper).square().mean(), total

    def objective(model, window, hyper):
        states.append(window.state)
        loss, total = model(window.inputs, hyper, window.state)
        bad = window.index == 2
        return loss * (NAN if bad else 1.0), total * (NAN if bad else 1.0)

    states = []
    words = torch.ones(240, dtype=torch.int64)
    streams = Streams(Split(words, words), 4, 5, seed=0, stream=0)
    method = SelfTuning(Counter(), SPACE, objective, objective, skip_nonfinite=1)
    for index in range(5):
        method.train_step(streams[index], index)
    method.check_finite()
    assert method.skipped_steps == 1
    totals = [None if state is None else state.tolist() for state in states]
    assert totals[::2] == totals[1::2]  # both passes of a step start from the same state
    assert totals[:6:2] == [None, [5.0] * 4, [10.0] * 4]
    assert states[6] is None or totals[6] == [0.0] * 4
    assert totals[8] == [5.0] * 4


def test_a_sparse_embedding_is_guarded_and_clipped(judge):
    """Its gradient holds the rows that were looked up, some of them twice."""

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = stn.HyperEmbedding(9, 4, num_hyperparameters=2, sparse=True)

        def forward(self, tokens, hyper):
            return self.embedding(tokens, hyper)

    def make(**options):
        torch.manual_seed(0)
        return SelfTuning(Words(), SPACE, classification_loss, classification_loss, **options)

    plain = partial(torch.optim.SGD, lr=0.1)
    method = make(optimizer=plain)
    method.training_objective = lambda *given: 1e3 * classification_loss(*given)
    batch = torch.tensor([1, 1, 2, 3]), torch.tensor([0, 1, 2, 3])
    method.train_step(batch, 0)
    norms = [(p.grad.coalesce().values() if p.grad.is_sparse else p.grad).norm() for p in method.model.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1.0, rel=1e-4)
    before = everything(method)
    method.training_objective = lambda *given: classification_loss(*given) * NAN
    with pytest.raises(NonFiniteError, match="training loss is nan"):
        judged(method.train_step, batch, 1)
    assert same(before, everything(method)) == []


def test_the_norm_that_clips_is_that_of_torch(model, batch):
    method = tuned(model, clip=1e-3, antithetic=False)
    method.train_step(batch, 0)
    got = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    plain = Normed()
    hyper = SPACE.sample(*SPACE.initial_state(), batch_size=32, seed=0, step=0)
    F.cross_entropy(plain(batch.inputs, hyper), batch.targets).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    assert all(torch.equal(one, other.grad) for one, other in zip(got, plain.parameters(), strict=True))


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_a_wrong_skip_nonfinite_is_refused(model, value):
    with pytest.raises(ValueError, match="SelfTuning: skip_nonfinite must be an int >= 0"):
        tuned(model, skip_nonfinite=value)


@pytest.mark.parametrize("value", [0, -1.0, NAN, "1", True])
def test_a_clip_that_is_not_positive_is_refused(model, value):
    with pytest.raises(ValueError, match="SelfTuning: clip must be"):
        tuned(model, clip=value)


@pytest.mark.parametrize("name", ["tune_scales", "freeze"])
def test_text_is_not_accepted_as_a_bool_argument_of_a_method(model, name):
    with pytest.raises(ValueError, match=f"SelfTuning: {name} must be True or False, got 'False'"):
        tuned(model, **{name: "False"})


def test_a_small_network_of_the_package(batch, judge):
    torch.manual_seed(0)
    method = warmed(tuned(mlp(SPACE, (6, 16, 4))), batch)
    with pytest.raises(NonFiniteError):
        judged(method.valid_step, poisoned(batch), 2)
    assert method.location.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hyper_optimizer", ["adam", "rmsprop"])
def test_on_cuda_no_step_waits_for_the_device_and_none_that_is_not_finite_is_taken(batch, hyper_optimizer):
    torch.manual_seed(0)
    batch, bad = batch.to("cuda"), poisoned(batch).to("cuda")
    method = tuned(Normed().cuda(), hyper_optimizer=OPTIMIZERS[hyper_optimizer], skip_nonfinite=2)
    warmed(warmed(method, batch), batch)
    before = everything(method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, take in enumerate((method.train_step, method.valid_step), start=4):
            take(bad, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.warns(RuntimeWarning, match="loss is nan at step"):
        method.check_finite()
    assert [name for name in same(before, everything(method)) if not name.endswith(".step")] == []
