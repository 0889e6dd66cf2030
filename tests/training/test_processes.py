"""Two gloo processes tune as one process with the whole batch does: in steps, and by DDP, Fabric and Accelerate."""

from importlib.util import find_spec

import gloo_process
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import two_processes
from libraries import library
from torch import nn

import stn_fast as stn

# The network computes in float64. λ, σ and the draws are float32, and the gradients of λ and σ are sums over examples,
# which two processes add up in another order: that may change the last of 24 bits, at each of 12 steps.
ROUNDING = 1e-6
LIBRARIES = {"DDP": "torch", "fabric": "lightning_fabric", "accelerate": "accelerate"}


IN_STEPS = {
    "stn": gloo_process.train_in_steps,
    "delta-stn": lambda: gloo_process.train_in_steps("delta-stn"),
    "unequal stn": gloo_process.train_in_unequal_shares,
    "unequal delta-stn": lambda: gloo_process.train_in_unequal_shares("delta-stn"),
    "experts stn": gloo_process.train_experts,
    "experts delta-stn": lambda: gloo_process.train_experts("delta-stn"),
    "accumulated": gloo_process.accumulate,
    "wrapped stn": gloo_process.train_wrapped,
    "wrapped delta-stn": lambda: gloo_process.train_wrapped("delta-stn"),
}


@pytest.fixture(scope="module")
def whole():
    """One process with the whole batch."""
    return gloo_process.train(lambda *both: both)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two processes, each with a half of the batch: {library: result} of each."""
    installed = [library for library, module in LIBRARIES.items() if find_spec(module)]
    installed += [*IN_STEPS, "statistics", "unequal passes", "other steps"]
    folder = tmp_path_factory.mktemp("processes")
    two_processes.finish(two_processes.start([gloo_process.__file__], folder / "{rank}", *installed))
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_two_processes_tune_as_one_does_with_the_whole_batch(library, whole, halves):
    if library not in halves[0]:
        pytest.skip(f"{LIBRARIES[library]} is not installed")
    assert_equal(*(results[library] for results in halves), whole)


@pytest.mark.parametrize("way", IN_STEPS)
def test_steps_of_two_processes_are_those_of_one_with_the_whole_batch(way, halves):
    assert_equal(*(results[way] for results in halves), IN_STEPS[way]())


def test_running_statistics_are_averaged(halves):
    one, other = (results["statistics"] for results in halves)
    assert torch.equal(one["variance"], other["variance"])
    for found in (one, other):
        torch.testing.assert_close(found["mean"], gloo_process.running_mean()["mean"])


def assert_equal(one, other, whole):
    """Both processes found the same, bit for bit, and what one process finds with the whole batch."""
    assert one["history"] == other["history"]
    assert one["scales"] == other["scales"]
    assert torch.equal(one["weights"], other["weights"])
    assert len(one["history"]) == gloo_process.STEPS
    for found, wanted in zip(one["history"], whole["history"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=ROUNDING)
        assert found["values"] == pytest.approx(wanted["values"], rel=ROUNDING)
    assert one["scales"] == pytest.approx(whole["scales"], rel=ROUNDING)
    assert (one["weights"] - whole["weights"]).norm() < ROUNDING * whole["weights"].norm()


def test_passes_with_shares_of_different_sizes_are_refused_in_all_processes(halves):
    one, other = (results["unequal passes"] for results in halves)
    assert one == other
    assert "the processes have 5, 3 examples, but in passes" in one


def test_processes_that_take_different_steps_are_an_error_in_all_of_them(halves):
    one, other = (results["other steps"] for results in halves)
    assert one == other
    for error, (first, second) in zip(one, OTHER_STEPS, strict=True):
        assert f"process 0 takes a {first}, process 1 takes a {second}, but they share every batch" in error


OTHER_STEPS = (
    ("validation step with draw 1", "training step with draw 1"),
    ("training step with draw 0", "training pass with draw 0"),
    ("training step with draw 0", "training step with draw 1"),
)


def test_another_group_than_that_of_the_wrapper_is_refused_and_a_wrapper_is_named_elsewhere(two):
    tuned = gloo_process.network()
    wrapped = nn.parallel.DistributedDataParallel(tuned)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    with pytest.raises(ValueError, match="process_group must be that of the DistributedDataParallel"):
        stn.SelfTuner(wrapped, optimizer, process_group=dist.new_group([0, 1]))
    tuner = stn.SelfTuner(wrapped, optimizer)
    assert tuner.model is tuned
    assert tuner.method.processes.size == 2
    with pytest.raises(TypeError, match="the attribute module of this DistributedDataParallel: give that"):
        stn.fold(wrapped)
    with pytest.raises(TypeError, match="the attribute module of this DataParallel: give that"):
        stn.SelfTuner(nn.DataParallel(tuned), optimizer)


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_a_wrapped_model_is_not_converted_because_the_wrapper_knows_nothing_of_the_response(wrap, two):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    says = f"the model is a {wrap.__name__}.* convert the module in it, and put {wrap.__name__} around the result"
    with pytest.raises(ValueError, match=says):
        stn.convert(wrap(model), quiet=True)
    with pytest.raises(ValueError, match=f"0 is a {wrap.__name__}"):
        stn.convert(nn.Sequential(wrap(model)), quiet=True)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_fabric_computes_the_gradients_in_mixed_precision():
    fabric = library("lightning_fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    tuned = gloo_process.network().float()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    tuner = stn.SelfTuner(tuned, optimizer)
    model, optimizer = fabric.setup(tuned, optimizer)
    (x, y), (held_x, held_y) = ((x.float(), y) for x, y in gloo_process.batch(0))
    with tuner.training(len(x)):
        fabric.backward(F.cross_entropy(model(x), y) + tuner.penalty())
    optimizer.step()
    before = tuner.values()

    def loss():
        with tuner.validating(len(held_x)):
            return F.cross_entropy(model(held_x), held_y)

    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        tuner.hyper_step(loss())
    tuner.hyper_step(loss(), fabric.backward)
    assert all(tuner.values()[name] != value for name, value in before.items() if name != "weight_decay")


def test_passes_of_delta_stn_and_what_is_no_group_are_refused(two):
    tuned = gloo_process.network()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"process_group must be one of torch\.distributed, got int"):
        stn.SelfTuner(tuned, optimizer, process_group=2)
    tuner = stn.SelfTuner(tuned, optimizer, method="delta-stn", process_group=two)
    pass_of_weights = tuner.training(4)
    with pytest.raises(ValueError, match="delta-stn can't share a batch between processes in passes"):
        pass_of_weights.__enter__()
