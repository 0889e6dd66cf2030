"""Captured steps give the numbers that steps give, and what can't be captured is taken one by one.

There is no CUDA here: graphs are recorded operations (`recorded_graphs`), and the device decides as it would on CUDA.
"""

import copy
import inspect
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from capturing import as_on_cuda
from gates_alone import FixedHyperparameters, SelfTuning
from own_batches import Sum, Summing, summed_loss
from recorded_graphs import RecordedGraphs
from run_files import result
from step_tasks import OPTIMIZERS, TASKS, cycle, digits_steps, language_steps
from torch import nn

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.training import capture, finite
from stn_fast.training.batches import as_batch
from stn_fast.training.capture import CapturedSteps, CudaGraphs
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.rehearsal import HostWork, obstacles
from stn_fast.training.streams import Window
from stn_fast.training.task import classification_loss


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    as_on_cuda(monkeypatch)


def everything(method):
    state = copy.deepcopy(method.state_dict())
    found = {f"model.{name}": value for name, value in state["model"].items()}
    found |= {name: state[name] for name in ("location", "raw_scale")}
    for name in ("optimizer", "response_optimizer", "hyper_optimizer"):
        for index, of_one in state.get(name, {}).get("state", {}).items():
            found |= {f"{name}.{index}.{key}": value for key, value in of_one.items() if value is not None}
    return {name: torch.as_tensor(value) for name, value in found.items()}


def different(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def captured(method):
    return CapturedSteps(method, warn=lambda reason: None)


def train_both(method, steps, batches, count):
    """A training step on each of the first `count` batches, of both."""
    for step in range(count):
        method.train_step(batches[step], step)
        steps.train_step(batches[step], step)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "sgd, adam"), ("bf16", "adam, rmsprop")])
@pytest.mark.parametrize("task", TASKS)
def test_captured_steps_give_the_same_bits(task, precision, optimizer):
    one, other = (TASKS[task](precision=precision, **OPTIMIZERS[optimizer]) for _ in range(2))
    steps = captured(other.method)
    losses = cycle(one, 20), cycle(other, 20, steps)
    assert torch.equal(*map(torch.stack, losses))
    assert different(one.method, other.method) == []
    assert steps.reasons == []
    # But the first two of each kind, and of a text the first window of each pass: of the second, after 12 of them.
    assert steps.replayed == (15 if task == "language model" else 16)
    assert steps.graphs.captured == 2


@pytest.mark.parametrize("task", TASKS)
def test_hyperparameters_that_are_not_spread_are_captured_too(task):
    one, other = (TASKS[task](tune_scales=False) for _ in range(2))
    steps = captured(other.method)
    assert torch.equal(*map(torch.stack, (cycle(one, 12), cycle(other, 12, steps))))
    assert different(one.method, other.method) == []
    assert steps.reasons == []


def test_fixed_hyperparameters_are_captured_too():
    one, other = (digits_steps() for _ in range(2))
    methods = [
        FixedHyperparameters(one.method.model, one.method.space, one.method.training_objective) for one in (one, other)
    ]
    steps = captured(methods[1])
    for step in range(8):
        assert torch.equal(methods[0].train_step(one.train[step], step), steps.train_step(other.train[step], step))
    assert steps.replayed == 6
    with pytest.raises(RuntimeError, match="does not tune"):
        steps.valid_step(one.valid[0], 8)


@pytest.mark.parametrize("task", TASKS)
def test_both_steps_of_delta_stn_are_captured(task):
    make = DeltaSelfTuning
    one, other = (TASKS[task](make=make) for _ in range(2))
    steps = captured(other.method)
    assert torch.equal(*map(torch.stack, (cycle(one, 12), cycle(other, 12, steps))))
    assert different(one.method, other.method) == []
    assert steps.reasons == []
    assert steps.graphs.captured == 3
    assert steps.replayed >= 2 * 6 + 2


def stale_inputs(kept):
    kept.inputs = [tensor if tensor is None else tensor.clone() for tensor in kept.inputs]


def stale_step(kept):
    kept.step = kept.step.clone()


@pytest.mark.parametrize("plant", [stale_inputs, stale_step])
@pytest.mark.parametrize("task", TASKS)
def test_the_test_detects_a_step_on_stale_memory(task, plant):
    one, other = (TASKS[task]() for _ in range(2))
    steps = captured(other.method)
    cycle(one, 12)
    replay = capture._Step._replay

    def on_stale_memory(self, kept, *given):
        plant(kept)
        return replay(self, kept, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture._Step, "_replay", on_stale_memory)
        cycle(other, 12, steps)
    assert different(one.method, other.method) != []


def test_the_test_detects_a_state_that_is_not_carried():
    one, other = (language_steps() for _ in range(2))
    steps = captured(other.method)
    losses = cycle(one, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "finish_as", lambda window, other: window.carry((torch.zeros(2, 8, 32),) * 2))
        assert not torch.equal(torch.stack(losses), torch.stack(cycle(other, 12, steps)))


@pytest.mark.parametrize("fused", [True, False])
def test_a_changed_learning_rate_is_used_by_captured_steps(fused, monkeypatch):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 1 << 20)
    options = dict(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=fused))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    for take in (one.method, steps):
        for step in range(12):
            if step in (6, 9):
                take_of = one.method if take is one.method else other.method
                take_of.learning_rate = 0.3 / step
            take.train_step(one.train[step], step)
    assert different(one.method, other.method) == []
    assert steps.graphs.captured == (1 if fused else 3)


def test_the_test_detects_a_learning_rate_kept_from_the_capture(monkeypatch):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 1 << 20)
    monkeypatch.setattr(capture._Step, "_settings", lambda self, first_example: {})
    options = dict(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    for step in range(8):
        if step == 5:
            one.method.learning_rate = 0.3
            other.method.learning_rate = 0.3
        one.method.train_step(one.train[step], step)
        steps.train_step(one.train[step], step)
    assert different(one.method, other.method) != []


def test_a_changed_first_example_is_used_by_captured_steps():
    one, other = (digits_steps() for _ in range(2))
    steps = captured(other.method)
    for take in (one.method, steps):
        for step in range(12):
            take.train_step(one.train[step], step, first_example=50 * (step // 6))
    assert different(one.method, other.method) == []
    assert (steps.graphs.captured, steps.replayed) == (2, 12 - 2 - 1)  # anew after one step with the other


def test_changed_modes_and_state_are_used_by_captured_steps():
    one, other = (digits_steps() for _ in range(2))
    steps = captured(other.method)
    state = None
    for take, method in ((one.method, one.method), (steps, other.method)):
        for step in range(18):
            if step == 6:
                state = copy.deepcopy(method.state_dict())
            if step == 11:
                method.model.dropouts[1].eval()
            if step == 15:
                method.load_state_dict(state)
                method.clip = 0.1
            take.train_step(one.train[step], step)
    assert different(one.method, other.method) == []
    assert steps.replayed == 18 - 2 - 1 - 1  # the first two, one in other modes, one after another state is loaded
    assert steps.graphs.captured == 3


def other_clip(method, turn):
    method.clip = 1 + turn


def other_learning_rate(method, turn):
    method.learning_rate = 0.1 / (1 + turn)


def other_modes(method, turn):
    method.model.dropouts[0].train(turn % 2 == 0)


def loaded_state(method, turn):
    method.load_state_dict(copy.deepcopy(method.state_dict()))


def clip_and_once_the_modes(method, turn):
    other_clip(method, turn)
    method.model.dropouts[0].train(turn < 3)


CHANGES = {
    other_clip: "clip",
    other_learning_rate: "lr of SGD",
    other_modes: "the modes of modules",
    loaded_state: "the state of SGD",
    clip_and_once_the_modes: "clip, the modes of modules",
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_change_again_and_again_are_named(change, monkeypatch):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 1 << 20)
    options = dict(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    for step in range(40):
        for method, take in ((one.method, one.method), (other.method, steps)):
            if step % 4 == 0:
                change(method, step // 4)
            take.train_step(one.train[step], step)
    assert different(one.method, other.method) == []
    assert steps.graphs.captured == 8
    assert steps.reasons == [
        f"train_step is not captured: it was captured 8 times because these settings changed: {CHANGES[change]}"
    ]


def test_a_batch_of_another_size_runs_without_a_graph():
    one, other = (digits_steps() for _ in range(2))
    steps = captured(other.method)
    for step in range(9):
        batch = one.train[step]
        if step in (5, 7):
            batch = Split(batch.inputs[:20], batch.targets[:20])
        assert torch.equal(one.method.train_step(batch, step), steps.train_step(batch, step))
    assert different(one.method, other.method) == []
    assert steps.reasons == ["train_step: batches differ in shape; those unlike the captured one run without a graph"]
    assert steps.graphs.captured == 1


def test_batches_of_two_sizes_in_turns_are_never_captured_and_that_is_said():
    one = digits_steps()
    steps = captured(one.method)
    for step in range(6):
        batch = one.train[step]
        steps.train_step(Split(batch.inputs[: 20 + step % 2], batch.targets[: 20 + step % 2]), step)
    assert steps.replayed == 0
    assert len(steps.reasons) == 1


class Plain(nn.Module):
    """torch's own dropout and batch norm in front of a network."""

    def __init__(self, model):
        super().__init__()
        self.norm, self.drop, self.model = nn.BatchNorm1d(64), nn.Dropout(0.3), model

    def forward(self, x, hyper):
        return self.model(self.drop(self.norm(x)), hyper)


def test_torch_s_own_generator_and_running_statistics_go_on_as_without_graphs():
    methods, losses, one = [], [], digits_steps()
    for _ in range(2):
        steps = digits_steps()
        model = Plain(steps.method.model)
        method = SelfTuning(model, steps.method.space, classification_loss, classification_loss)
        methods.append(method)
        take = captured(method) if len(methods) == 2 else method
        torch.manual_seed(5)
        losses.append(torch.stack([take.train_step(one.train[step], step) for step in range(8)]))
    assert take.reasons == []
    assert take.replayed == 6
    assert torch.equal(*losses)
    assert different(*methods) == []


def test_losses_and_states_are_the_caller_s_own():
    one = language_steps()
    steps = captured(one.method)
    losses, states = [], []
    for index in range(8):
        losses.append(steps.train_step(one.train[index], index))
        states.append(one.train.state_for(index + 1)[0])
    assert steps.replayed == 6
    assert len({loss.item() for loss in losses}) == 8
    assert len({state.sum().item() for state in states}) == 8


def test_batches_of_ones_own_are_captured_and_keep_what_they_keep_without_graphs():
    found = []
    for capture_steps in (False, True):
        one, kept = digits_steps(allow_unused=True), Sum()
        one.method.training_objective = summed_loss
        steps = captured(one.method) if capture_steps else one.method
        sums = []
        for step in range(6):
            steps.train_step(Summing(*one.train[step], kept, begins=step == 4), step)
            sums.append(kept.value)
        found.append(torch.stack(sums))
    assert steps.replayed == 3
    assert steps.reasons == []
    assert torch.equal(*found)


def gradients(method):
    tensors = [*method.model.parameters(), method.location, method.raw_scale]
    return [None if tensor.grad is None else tensor.grad.clone() for tensor in tensors]


def same_gradients(one, other):
    pairs = zip(gradients(one), gradients(other), strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def test_gradients_are_those_of_each_step():
    """Steps of another batch size come in between: they are taken one by one, and replace each gradient."""
    one, other = (digits_steps() for _ in range(2))
    steps, same = captured(other.method), []
    for step in range(20):
        name = "valid_step" if step % 4 == 3 else "train_step"
        batch = (one.valid if step % 4 == 3 else one.train)[step]
        if step in (8, 12, 15):
            batch = Split(batch.inputs[:20], batch.targets[:20])
        for take in (one.method, steps):
            getattr(take, name)(batch, step)
        same.append(same_gradients(one.method, other.method))
    assert steps.replayed == 20 - 2 * 2 - 3
    assert same == [True] * 20


def test_a_graph_leaves_the_gradients_of_another_where_they_are(monkeypatch):
    """Graphs that share memory may write over what another has left."""
    for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    signature, begun = inspect.signature(torch.cuda.graph), mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "graph", begun)
    graphs = CudaGraphs(torch.device("cuda", 1))
    for _ in range(2):
        graphs.capture(lambda: None)
    calls = [signature.bind(*call.args, **call.kwargs).arguments for call in begun.call_args_list]
    assert [call.get("pool") for call in calls] == [None, None]


def test_gradients_that_no_optimizer_takes_add_up_as_without_graphs():
    options = dict(optimizer=lambda parameters: torch.optim.SGD(parameters[2:], lr=0.05, momentum=0.9, fused=True))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    for step in range(6):
        one.method.train_step(one.train[step], step)
        steps.train_step(one.train[step], step)
        assert same_gradients(one.method, other.method)
    assert steps.replayed == 4


def test_a_step_is_counted_by_a_tensor_too():
    one, other = (digits_steps() for _ in range(2))
    steps, count = captured(other.method), torch.zeros((), dtype=torch.int64)
    for step in range(6):
        one.method.train_step(one.train[step], step)
        steps.train_step(one.train[step], count)
        count += 1
    assert different(one.method, other.method) == []


def poisoned(batch):
    return Split(batch.inputs.clone().index_fill_(0, torch.tensor([3]), float("nan")), batch.targets)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_that_is_not_finite_changes_nothing_and_is_counted(optimizer):
    one, other = (digits_steps(skip_nonfinite=2, **OPTIMIZERS[optimizer]) for _ in range(2))
    steps = captured(other.method)
    cycle(one, 12)
    cycle(other, 12, steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for take in (one.method, steps):
            take.train_step(poisoned(one.train[20]), 20)
            take.valid_step(poisoned(one.valid[20]), 21)
            take.train_step(one.train[21], 22)
            take.train_step(one.train[23], 23)
        one.method.check_finite()
        other.method.check_finite()
    assert different(one.method, other.method) == []
    assert one.method.skipped_steps == other.method.skipped_steps == 2
    told = [str(warning.message) for warning in seen]
    assert sorted(told[:2] * 2) == sorted(told)
    assert "the training loss is nan at step 20" in told[0]
    assert steps.replayed == 12 + 4 - 2 * 2


def test_steps_are_not_captured_before_one_has_been_taken():
    one, other = (digits_steps(skip_nonfinite=4) for _ in range(2))
    steps = captured(other.method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(8):
            batch = poisoned(one.train[step]) if step < 4 else one.train[step]
            one.method.train_step(batch, step)
            steps.train_step(batch, step)
    assert different(one.method, other.method) == []
    assert steps.reasons == []
    assert steps.replayed == 2


def test_more_captured_steps_in_a_row_than_allowed_are_an_error():
    one = digits_steps(skip_nonfinite=1)
    steps = captured(one.method)
    cycle(one, 9, steps)
    replayed = steps.replayed
    steps.train_step(poisoned(one.train[20]), 9)
    with pytest.warns(RuntimeWarning, match="the training loss is nan at step 9; left out, 1 of 1"):
        steps.train_step(poisoned(one.train[20]), 10)
    assert steps.replayed == replayed + 2
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 10"):
        one.method.check_finite()


@pytest.mark.parametrize("kind", ["train_step", "valid_step"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_part_of_a_step_prevents_its_capture(task, kind, precision, monkeypatch):
    """Every operation of a step after the first ones, as it is queued on the device."""
    monkeypatch.setattr("stn_fast.ops.augment._check_values", lambda *given: None)  # on the CPU alone
    one = TASKS[task](precision=precision)
    cycle(one, 9)
    before = everything(one.method)
    batch = as_batch(one.train[6] if kind == "train_step" else one.valid[3], torch.device("cpu"))
    parts, step = batch.parts(), torch.tensor(9)

    def refuse(*given):
        raise AssertionError("a tensor is read on the host")

    def run():
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, refuse)
            one.method.kinds[kind].body(batch.like(parts), step, 0)

    assert obstacles(one.method, run) == []
    after = everything(one.method)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


class Counting(nn.Module):
    """A buffer that each call replaces, which a graph would read where it was."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, hyper):
        if self.training:
            self.calls = self.calls + 1
        return self.model(x, hyper)


class WithBuffers(nn.Module):
    """A network that is given buffers, of which each training step writes to ``written``, if it is there."""

    def __init__(self, model, **buffers):
        super().__init__()
        self.model = model
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=not buffer.is_sparse)  # torch.equal takes no sparse tensor

    def forward(self, x, hyper):
        if self.training and hasattr(self, "written"):
            self.written += x.mean()
        return self.model(x, hyper)


def with_buffers(make):
    """Two methods with buffers of their own that ``make`` returns by name, and training batches."""
    both = [digits_steps() for _ in range(2)]
    methods = [
        SelfTuning(WithBuffers(one.method.model, **make()), one.method.space, *[classification_loss] * 2)
        for one in both
    ]
    return *methods, both[0].train


def inference_buffer():
    with torch.inference_mode():
        return torch.ones(3)


CONSTANTS = {
    "expanded": lambda: torch.ones(1).expand(10),
    "inference": inference_buffer,
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_buffer_that_can_not_be_written_to_is_no_obstacle(kind):
    one, other, batches = with_buffers(lambda: {"constant": CONSTANTS[kind]()})
    steps = captured(other)
    for step in range(5):
        assert torch.equal(one.train_step(batches[step], step), steps.train_step(batches[step], step))
    assert steps.reasons == []
    assert steps.replayed == 3
    assert different(one, other) == []


def reading(objective):
    return lambda *given: (loss := objective(*given)) * (2.0 if loss.item() > 1 else 1.0)


def deciding(objective):
    return lambda *given: (loss := objective(*given)) * (2.0 if loss > 1 else 1.0)


def making(objective):
    return lambda *given: objective(*given) * torch.tensor(0.5)


def choosing(objective):
    return lambda model, batch, hyper: F.cross_entropy(
        model(batch.inputs, hyper)[batch.targets > 3], batch.targets[batch.targets > 3]
    )


def finding(objective):
    return lambda *given: objective(*given) + 0 * given[1].targets.nonzero().sum()


def crossing(objective):
    """The meta device stands for the host: a tensor elsewhere than the step's."""

    def crossed(*given):
        given[1].inputs.to("meta")
        return objective(*given)

    return crossed


PLANTED = {
    "item": (reading, "it reads a number back to the host"),
    "a comparison": (deciding, "it reads a number back to the host"),
    "torch.tensor": (making, "it makes a tensor from numbers on the host"),
    "a mask": (choosing, "the shape of a result depends on numbers"),
    "nonzero": (finding, "the shape of a result depends on numbers"),
    "another device": (crossing, "it uses tensors on meta, and the step is on cpu"),
}


@pytest.mark.parametrize("kind", ["train_step", "valid_step"])
@pytest.mark.parametrize("planted", PLANTED)
def test_work_that_a_graph_cannot_repeat_is_named_and_runs_without_one(planted, kind):
    change, reason = PLANTED[planted]
    one, other = (digits_steps(allow_unused=True) for _ in range(2))
    for method in (one.method, other.method):
        if kind == "train_step":
            method.training_objective = change(method.training_objective)
        else:
            method.validation_objective = change(method.validation_objective)
    steps = captured(other.method)
    assert torch.equal(*map(torch.stack, (cycle(one, 18), cycle(other, 18, steps))))
    assert different(one.method, other.method) == []
    assert len(steps.reasons) == 1
    assert steps.reasons[0].startswith(f"{kind} is not captured: {reason}")
    assert "test_capture.py:" in steps.reasons[0]
    assert steps.graphs.captured == 1  # the other kind


@pytest.mark.parametrize(
    ("index", "shape"),
    [(torch.tensor([0, 2]), False), (torch.tensor([True, False, True]), True), ((None, torch.tensor([1])), False)],
    ids=["places", "mask", "places of columns"],
)
def test_an_index_tensor_is_not_taken_for_a_mask(index, shape):
    x = torch.zeros(3, 2)
    with HostWork(x.device) as noted:
        x[index]
        x[index] = x[index] + 1
    assert any("shape" in found for found in noted.found) == shape


def test_a_buffer_that_is_replaced_at_each_step_is_named():
    one, other = (digits_steps() for _ in range(2))
    methods = [
        SelfTuning(
            Counting(each.method.model), each.method.space, classification_loss, classification_loss, antithetic=False
        )
        for each in (one, other)
    ]
    steps = captured(methods[1])
    train_both(methods[0], steps, one.train, 6)
    assert methods[0].model.calls == methods[1].model.calls == 6
    assert different(*methods) == []
    assert steps.reasons == ["train_step is not captured: it creates calls at each step"]


class Late(torch.optim.SGD):
    """Makes some of its state later than at its first step."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            taken = self.state[parameter]
            taken["seen"] = taken.get("seen", 0) + 1


def test_an_optimizer_that_keeps_state_on_the_host_is_named():
    options = dict(optimizer=partial(Late, lr=0.05, momentum=0.9, fused=True))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    train_both(one.method, steps, one.train, 6)
    assert different(one.method, other.method) == []
    assert steps.replayed == 0


def test_a_large_buffer_that_steps_only_read_is_not_copied_by_captured_ones():
    one, other, batches = with_buffers(lambda: {"mask": torch.ones(300, 300), "written": torch.zeros(300, 300)})
    steps = captured(other)
    train_both(one, steps, batches, 5)
    assert steps.replayed == 3
    assert different(one, other) == []
    assert other.model.mask._version == 0
    assert [name for _, name in other._buffers._changing] == ["written"]


class Uncopied(torch.Tensor):
    def copy_(self, *given):
        raise RuntimeError("no copies here\nand more")

    def __deepcopy__(self, memo):
        return self.as_subclass(torch.Tensor).clone()


class Noting(torch.optim.SGD):
    """Keeps a state that nothing can be copied to."""

    def step(self, closure=None):
        super().step(closure)
        taken = self.state[self.param_groups[0]["params"][0]]
        taken.setdefault("note", torch.zeros(2).as_subclass(Uncopied)).add_(1)


def test_a_tensor_that_can_not_be_restored_is_named_and_training_goes_on():
    options = dict(optimizer=partial(Noting, lr=0.05, momentum=0.9, fused=True))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    train_both(one.method, steps, one.train, 6)
    assert different(one.method, other.method) == ["optimizer.0.note"]  # it has counted the trial too
    assert steps.replayed == 0
    assert steps.reasons == [
        "train_step is not captured: Noting's note could not be restored after a trial of the step: no copies here"
    ]


def test_an_optimizer_that_can_not_be_captured_is_named(monkeypatch):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 1 << 20)
    options = dict(optimizer=partial(torch.optim.Adagrad, lr=0.05))
    one, other = (digits_steps(**options) for _ in range(2))
    steps = captured(other.method)
    train_both(one.method, steps, one.train, 6)
    assert different(one.method, other.method) == []
    assert "train_step is not captured: it reads a number back to the host" in steps.reasons[0]


def test_an_unfused_optimizer_of_many_numbers_is_named(monkeypatch):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 10)
    one = digits_steps(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    steps = captured(one.method)
    for step in range(4):
        steps.train_step(one.train[step], step)
    assert steps.reasons == ["train_step is not captured: SGD has a large state and is not fused (fused=True)"]


def test_sparse_gradients_are_named():
    space = stn.HyperparameterSpace([stn.Hyperparameter("unused", low=0.0, high=0.9, init=0.2)])

    def make():
        torch.manual_seed(0)
        model = stn.HyperEmbedding(12, 4, num_hyperparameters=1, sparse=True)
        return FixedHyperparameters(
            model, space, lambda model, batch, hyper: model(batch.inputs, hyper).square().mean(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )  # fmt: skip

    one, other = make(), make()
    steps = captured(other)
    for step in range(5):
        batch = Split(torch.arange(8) + step % 3, torch.zeros(8))
        one.train_step(batch, step)
        steps.train_step(batch, step)
    assert different(one, other) == []
    assert steps.reasons == ["train_step is not captured: gradients are sparse (weight)"]


def test_a_batch_that_holds_more_than_tensors_is_named():
    one = digits_steps(allow_unused=True)
    one.method.training_objective = lambda model, batch, hyper: F.cross_entropy(
        model(batch.inputs["x"], hyper), batch.targets
    )
    steps = captured(one.method)
    for step in range(4):
        inputs, targets = one.train[step]
        steps.train_step({"inputs": {"x": inputs, "names": "digits"}, "targets": targets}, step)
    assert steps.reasons == ["train_step is not captured: its batch has parts that are not tensors"]


def test_a_capture_that_cuda_refuses_is_given_up():
    class Refusing(RecordedGraphs):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    one, other = (digits_steps() for _ in range(2))
    steps = CapturedSteps(other.method, graphs=Refusing(), warn=lambda reason: None)
    assert torch.equal(*map(torch.stack, (cycle(one, 12), cycle(other, 12, steps))))
    assert different(one.method, other.method) == []
    assert steps.reasons[0] == (
        "train_step is not captured: CUDA refused it: operation not permitted when stream is capturing"
    )


def test_on_another_device_steps_run_without_a_graph_and_warn_once(monkeypatch):
    monkeypatch.undo()
    one = digits_steps()
    steps = one.method.captured()
    with pytest.warns(RuntimeWarning, match="CUDA graphs need a CUDA device, and the model is on cpu") as seen:
        cycle(one, 6, steps)
    assert len(seen) == 2  # one for each kind
    assert steps.replayed == 0


def test_a_run_captures_its_steps_and_says_how_many(train, same_run, capsys):
    one = train("capture=false", name="one")
    assert result(one, timeless=False)["captured"] is None
    other = train(name="other")
    same_run(one, other)
    # 54 training steps and 18 of validation; two of each kind come first.
    assert result(other, timeless=False)["captured"] == {"steps": 72 - 4, "reasons": []}
    assert "not captured" not in capsys.readouterr().err


def test_a_run_whose_steps_can_not_be_captured_says_why(train, monkeypatch, capsys):
    monkeypatch.setattr(finite, "MAX_COPIED_NUMBERS", 10)
    other = train("hyper_optimizer.name=rmsprop")
    reason = "valid_step is not captured: RMSprop has a large state and is not fused (fused=True)"
    assert result(other, timeless=False)["captured"] == {"steps": 52, "reasons": [reason]}
    assert capsys.readouterr().err.count(reason) == 1


def test_gradients_that_are_switched_off_are_an_error_as_ever():
    one = digits_steps()
    steps = captured(one.method)
    cycle(one, 9, steps)
    with torch.no_grad(), pytest.raises(RuntimeError, match="train_step computes gradients"):
        steps.train_step(one.train[9], 9)


def test_a_replay_counts_as_a_change_of_the_hyperparameters(monkeypatch):
    counted = []
    monkeypatch.setattr(capture, "increment_version", lambda tensors: counted.append([*tensors]))
    task = digits_steps(precision="fp32")
    steps = captured(task.method)
    cycle(task, 9, steps)
    assert len(counted) == steps.replayed >= 3
    assert all(one is task.method.location for one, _ in counted)
    assert all(one is task.method.raw_scale for _, one in counted)
