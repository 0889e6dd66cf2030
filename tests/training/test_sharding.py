"""Two gloo processes tune a model that fully_shard has sharded as one process tunes the whole one."""

import os
from functools import cache

import fsdp_process
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import stn_fast as stn

# The networks compute in float64. λ, σ, the draws and the moments of h are float32, and sums over examples or processes
# are added up in another order: that may change the last of 24 bits, at each of 4 steps.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what two processes have saved, each with a half of the batch and of the weights."""
    folder = tmp_path_factory.mktemp("sharded")
    run_two(folder, *fsdp_process.RUNS, "save", "unequal", "past an error", "option")
    return folder


def run_two(folder, *runs):
    two_processes.finish(two_processes.start([fsdp_process.__file__], folder, *runs))


def both(folder, run):
    return [torch.load(folder / f"{run} {rank}") for rank in range(2)]


@cache
def whole(run):
    return fsdp_process.train(**fsdp_process.RUNS[run])


@pytest.mark.parametrize("run", fsdp_process.RUNS)
def test_two_processes_with_shards_tune_as_one_does_with_the_whole_model(run, folder):
    one, other = both(folder, run)
    assert one["history"] == other["history"]
    assert one["scales"] == other["scales"]
    assert len(one["history"]) == fsdp_process.STEPS
    wanted = whole(run)
    assert one["scales"] == pytest.approx(wanted["scales"], rel=ROUNDING)
    for found, expected in zip(one["history"], wanted["history"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=ROUNDING)
        assert found["values"] == pytest.approx(expected["values"], rel=ROUNDING)
    for name, weight in wanted["weights"].items():
        assert torch.equal(one["weights"][name], other["weights"][name])
        assert (one["weights"][name] - weight).norm() < ROUNDING * weight.norm(), name
    if "passes" not in run:  # in which the training loss is not averaged
        assert one["losses"] == pytest.approx(wanted["losses"], rel=ROUNDING)


def test_unequal_shares_are_refused_in_all_processes(folder):
    for error in both(folder, "unequal"):
        assert "fully_shard averages gradients as if all had as many" in error


def test_rows_are_checked_together_though_only_one_process_has_a_new_structure_of_batch(folder):
    one, other = both(folder, "option")
    assert one["losses"] == other["losses"]
    assert one["checks"] == other["checks"] == [3, 3, 0]  # calls of the model by `check_rows` in each step


@pytest.fixture(scope="module")
def mesh():
    """Of this process alone: what a process does with its shards, without another one."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(two_processes.free_port())}
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def tuner_of(tuned, **options):
    return stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1), F.cross_entropy, **options)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("way", ["steps", "passes"])
def test_weights_may_be_freed_after_the_forward_pass_or_not(way, reshard, mesh):
    tuned = fsdp_process.sharded(fsdp_process.network("mlp"), mesh, reshard_after_forward=reshard)
    tuner = tuner_of(tuned)
    if way == "steps":
        fsdp_process.in_steps(tuner, "mlp", range(2))
    else:
        fsdp_process.in_passes(tuner, tuner.method.optimizer, "mlp", range(2))
    expected = tuner_of(fsdp_process.network("mlp"))
    fsdp_process.in_steps(expected, "mlp", range(2))
    assert tuner.values() == pytest.approx(expected.values(), rel=ROUNDING)


def test_weights_that_are_not_freed_get_gradients_after_a_validation_pass_without_an_update(mesh):
    tuned = fsdp_process.sharded(fsdp_process.network("mlp"), mesh, reshard_after_forward=False)
    tuner = tuner_of(tuned, check_rows=False)  # which frees them, too
    x, y = fsdp_process.batch("mlp", 0)[0]
    with tuner.validating(len(x)):  # its loss is not used
        tuned(x)
    tuner.train_step((x, y))
    assert tuned[0].weight.grad is not None


def test_a_policy_of_mixed_precision_computes_in_its_dtype(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    tuner = tuner_of(fsdp_process.sharded(fsdp_process.network("mlp"), mesh, mp_policy=policy))
    dtypes = []
    tuner.model[0].register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    losses = fsdp_process.in_steps(tuner, "mlp", range(2))
    assert set(dtypes) == {torch.float32}
    expected = tuner_of(fsdp_process.network("mlp"))
    wanted = fsdp_process.in_steps(expected, "mlp", range(2))
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=ROUNDING)
    assert tuner.values() == pytest.approx(expected.values(), rel=ROUNDING)


def test_autocast_does_not_round_the_penalty(mesh):
    penalties = []
    for shard in (False, True):
        tuned = fsdp_process.network("transformer").float()
        tuner = tuner_of(fsdp_process.sharded(tuned, mesh) if shard else tuned)
        x, _ = fsdp_process.batch("transformer", 0)[0]
        with tuner.training(len(x)), torch.autocast("cpu", torch.bfloat16):
            tuned(x)
            penalties.append(tuner.penalty().item())
    assert penalties[1] == pytest.approx(penalties[0], rel=ROUNDING)


def test_a_step_that_is_not_finite_changes_no_shard(mesh):
    tuned = fsdp_process.sharded(fsdp_process.network("mlp"), mesh)
    tuner = tuner_of(tuned, skip_nonfinite=1)
    (x, y), _ = fsdp_process.batch("mlp", 0)
    before = [one.to_local().clone() for one in tuned.parameters()]
    with pytest.warns(RuntimeWarning, match="training loss is nan"):
        tuner.train_step((x * float("nan"), y))
    assert all(torch.equal(one.to_local(), kept) for one, kept in zip(tuned.parameters(), before, strict=True))
    tuner.train_step((x, y))
    assert not torch.equal(tuned[0].weight.to_local(), before[0])


def test_a_folded_model_is_made_from_gathered_weights(mesh):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tuner = tuner_of(fsdp_process.sharded(fsdp_process.network("mlp"), mesh))
    fsdp_process.in_steps(tuner, "mlp", range(3))
    with pytest.raises(ValueError, match=r"fold: the parameters are sharded.*full_state_dict=True"):
        tuner.fold()
    gathered = get_model_state_dict(tuner.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = fsdp_process.network("mlp")
    own.load_state_dict(gathered)
    x = fsdp_process.batch("mlp", 0)[0][0]
    torch.testing.assert_close(stn.fold(own).eval()(x), tuner.model.eval()(x))


class Tied(nn.Module):
    """Reads the weight of its embedding itself."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(fsdp_process.WORDS, 6), nn.Linear(6, 6)

    def forward(self, tokens):
        return F.linear(self.inner(self.words(tokens)).mean(1), self.words.weight)


def test_rows_and_parameters_are_checked_as_in_a_whole_model(mesh):
    tuned = stn.convert(Tied(), quiet=True)
    fully_shard(tuned.inner, mesh=mesh)
    tuner = tuner_of(fully_shard(tuned, mesh=mesh))
    with pytest.raises(ValueError, match=r"words \(Embedding\) is not called where the model passes its weight"):
        tuner.train_step(fsdp_process.batch("transformer", 0)[0])


def of_blocks_only(mesh):
    tuned = fsdp_process.network("transformer")
    fully_shard(tuned.blocks[0], mesh=mesh)
    return tuner_of(tuned)


def of_an_older_optimizer(mesh):
    tuned = fsdp_process.network("mlp")
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    return stn.SelfTuner(fsdp_process.sharded(tuned, mesh), optimizer, F.cross_entropy)


def sparse(mesh):
    tuned = stn.convert(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2)), quiet=True)
    return tuner_of(fully_shard(tuned, mesh=mesh))


def penalised_before_the_model(mesh):
    tuner = tuner_of(fsdp_process.sharded(fsdp_process.network("mlp"), mesh))
    with tuner.training(4):
        tuner.penalty()


def sharded_after_the_tuner(mesh):
    tuner = tuner_of(fsdp_process.network("mlp"))
    fsdp_process.sharded(tuner.model, mesh)
    tuner.step(*fsdp_process.batch("mlp", 0))


def linearised(mesh):
    return tuner_of(fsdp_process.sharded(fsdp_process.network("mlp"), mesh), method="delta-stn")


def converted_afterwards(mesh):
    stn.convert(fsdp_process.sharded(fsdp_process.mlp(), mesh), quiet=True)


def fitted(mesh):
    stn.fit(
        fsdp_process.sharded(fsdp_process.network("mlp"), mesh),
        (),
        (),
        loss=F.cross_entropy,
        optimizer=torch.optim.SGD,
        run_dir="",
    )


def of_two_dimensions(mesh):
    replicas = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    return tuner_of(fsdp_process.sharded(fsdp_process.network("mlp"), replicas))


REFUSED = {
    of_blocks_only: "words.weight, .* are not sharded, but others are: call fully_shard on the model itself",
    of_an_older_optimizer: "the optimizer holds none of the model's parameters: .*, after fully_shard",
    sparse: "0 has sparse gradients, which fully_shard can't average",
    penalised_before_the_model: "penalty: call the sharded model first",
    sharded_after_the_tuner: "step: the model has been sharded since the tuner was made",
    linearised: "delta-stn of a sharded model needs linearize=False",
    converted_afterwards: "convert: 0.weight is sharded, as by fully_shard: convert the plain model, then shard it",
    fitted: "fit: the parameters are sharded",
    of_two_dimensions: "0.weight has the placements .* on a mesh of 2 dimensions",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_not_supported_is_refused_by_name(make, mesh):
    with pytest.raises((ValueError, RuntimeError), match=REFUSED[make]):
        make(mesh)


def test_weights_on_another_device_than_the_mesh_are_refused(mesh, monkeypatch):
    tuned = fsdp_process.sharded(fsdp_process.network("mlp"), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    tuner_of(tuned)  # they are where they would be without it
    monkeypatch.setattr(tuned[0].weight.device_mesh, "_device_type", "cuda")
    with pytest.raises(ValueError, match=r"is on cpu, and its mesh on cuda: fully_shard with CPUOffloadPolicy"):
        tuner_of(tuned)


def test_an_error_of_one_process_that_saves_is_one_of_all_and_leaves_the_checkpoint_before(folder):
    for found in both(folder, "save"):
        assert "step-00000004 (No space left on device)" in found["error"]
    assert os.listdir(folder / "checkpoints") == ["step-00000002"]


def test_an_error_of_one_process_that_loads_sends_all_to_the_checkpoint_before(folder):
    assert both(folder, "past an error") == [2, 2]


def test_new_processes_go_on_from_a_checkpoint_bit_for_bit(mesh, folder):
    (saved, _) = both(folder, "save")
    run_two(folder, "load", "load whole")
    for found in both(folder, "load"):
        assert found["history"] == saved["history"]
        assert_close(found, saved, exact=True)
    assert_close(both(folder, "load whole")[0], saved)
    for shard in (True, False):
        with pytest.warns(RuntimeWarning, match=r"saved by 2 and is loaded by 1 of the processes .* not bit for bit"):
            found = fsdp_process.loaded(folder, mesh, shard=shard)
        assert_close(found, saved)


def assert_close(found, wanted, exact=False):
    assert found["scales"] == pytest.approx(wanted["scales"], rel=0 if exact else ROUNDING)
    for name, weight in wanted["weights"].items():
        assert (found["weights"][name] - weight).norm() <= (0 if exact else ROUNDING) * weight.norm(), name
