"""One of the processes of tests/training/test_processes.py: trains a converted network and saves the results.

    python gloo_process.py FILE DDP fabric accelerate stn delta-stn "unequal stn" "wrapped stn" ... statistics

Trains in passes by each library that is named, or in steps by the method, with shares of different sizes, or of a model
in DistributedDataParallel. The environment says which process it is, as torchrun's does.
"""

import gc
import os
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

import stn_fast as stn

STEPS, EXAMPLES = 12, 8  # of training; in a batch of all processes


def batch(step, inputs=5):
    """Every process draws the whole batch: (x, y), and another one to tune on."""
    generator = torch.Generator().manual_seed(step)
    draws = [torch.randn(EXAMPLES, inputs, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [(x, (x[:, 0] > x[:, 1]).long()) for x in draws]


def share(tensors, rank, size):
    return [tensor.chunk(size)[rank] for tensor in tensors]


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2)
    tuned = stn.convert(nn.Sequential(*layers).double(), quiet=True)
    for name, parameter in tuned.named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)  # E[s²] of a gate is above 1, by which gradients are divided
    return tuned


def train(prepare, backward=torch.Tensor.backward, group=None, rank=0, size=1):
    """The history of λ and the last weights; `prepare` returns the model and the optimizer of the library."""
    tuned = network()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.3, momentum=0.9)
    tuner = stn.SelfTuner(tuned, optimizer, process_group=group)
    model, optimizer = prepare(tuned, optimizer)
    for step in range(STEPS):
        (x, y), (held_x, held_y) = (share(tensors, rank, size) for tensors in batch(step))
        for antithetic in (False, True):
            with tuner.training(len(x), antithetic=antithetic):
                backward((F.cross_entropy(model(x), y) + tuner.penalty()) / 2)
        optimizer.step()
        optimizer.zero_grad()
        with tuner.validating(len(held_x)):
            loss = F.cross_entropy(model(held_x), held_y)
        tuner.hyper_step(loss)
    return result(tuner, tuned)


def train_in_steps(method="stn", group=None, rank=0, size=1):
    """The same by `SelfTuner.step`."""
    tuned = network(seed=rank)  # steps begin with the weights of the first process
    optimizer = torch.optim.SGD(tuned.parameters(), 0.3, momentum=0.9)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, method=method, process_group=group)
    for step in range(STEPS):
        tuner.step(*(share(tensors, rank, size) for tensors in batch(step)))
    return result(tuner, tuned)


def train_in_unequal_shares(method="stn", group=None, rank=0):
    """The same with 5 and 3 of the 8 examples, and in each third step with 2 and 1 of 3."""
    tuned = network()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.3)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, method=method, process_group=group)
    for step in range(STEPS):
        count, first = (3, 2) if step % 3 == 2 else (EXAMPLES, 5)
        own = slice(count) if group is None else (slice(first), slice(first, count))[rank]
        tuner.step(*([tensor[own] for tensor in tensors] for tensors in batch(step)))
    return result(tuner, tuned)


class Experts(nn.Module):
    """Calls those of three layers that its examples need, which are those of its first two."""

    def __init__(self):
        super().__init__()
        self.before, self.dropout = nn.Linear(5, 16), nn.Dropout(0.3)
        self.experts = nn.ModuleList([nn.Linear(16, 2) for _ in range(3)])

    def forward(self, x):
        y, expert = self.dropout(self.before(x).tanh()), (x[:, 2] > 0).long()
        return sum(self.experts[k](y) * (expert == k)[:, None] for k in expert.unique().tolist())


def train_experts(method="stn", group=None, rank=0, size=1):
    """The same with `Experts`: in even steps, the first half of a batch needs one layer and the second half another."""
    torch.manual_seed(0)
    model = Experts().double()
    rates = [one for one in stn.suggest_space(model) if one.name != "weight_decay"]  # which would use all layers
    tuned = stn.convert(model, stn.HyperparameterSpace(rates), quiet=True)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.3, momentum=0.9)  # which moves by gradients of 0, not by None
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, method=method, process_group=group, check_rows=False)
    for step in range(STEPS):
        pairs = batch(step)
        for x, _ in pairs:
            x[:, 2] = x[:, 2].abs() * torch.tensor([1, -1 if step % 2 == 0 else 1]).repeat_interleave(EXAMPLES // 2)
        tuner.step(*(share(tensors, rank, size) for tensors in pairs))
    return result(tuner, tuned)


def train_wrapped(method="stn", group=None, rank=0, size=1):
    """A `SelfTuner` of a model inside of DistributedDataParallel, first in steps, then in passes by it."""
    tuned = network()
    model = tuned if group is None else nn.parallel.DistributedDataParallel(tuned)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    tuner = stn.SelfTuner(model, optimizer, F.cross_entropy, method=method)
    for step in range(STEPS):
        (x, y), (held_x, held_y) = (share(tensors, rank, size) for tensors in batch(step))
        if step % 2 or method == "delta-stn":
            tuner.step((x, y), (held_x, held_y))
            continue
        with tuner.training(len(x)):
            (F.cross_entropy(model(x), y) + tuner.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with tuner.validating(len(held_x)):
            loss = F.cross_entropy(model(held_x), held_y)
        tuner.hyper_step(loss)
    return result(tuner, tuned)


def accumulate(group=None, rank=0, size=1):
    """Passes for two parts of each share, before a step of the optimizer, by DistributedDataParallel."""
    tuned = network()
    model = tuned if group is None else nn.parallel.DistributedDataParallel(tuned)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.3, momentum=0.9)
    tuner = stn.SelfTuner(model, optimizer)
    ranks = [rank] if size == 2 else range(2)  # one process has the parts of both
    parts = [torch.cat([torch.arange(EXAMPLES).chunk(2)[one].chunk(2)[part] for one in ranks]) for part in range(2)]
    for step in range(STEPS):
        (x, y), held_out = batch(step)
        for part in parts:
            last = part is parts[-1]
            with nullcontext() if group is None or last else model.no_sync(), tuner.training(len(part)):
                ((F.cross_entropy(model(x[part]), y[part]) + tuner.penalty()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        held_x, held_y = share(held_out, rank, size)
        with tuner.validating(len(held_x)):
            loss = F.cross_entropy(model(held_x), held_y)
        tuner.hyper_step(loss)
    return result(tuner, tuned)


def unequal_passes(group, rank):
    """The error of a pass with 5 and 3 examples."""
    tuned = network()
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.3), process_group=group)
    try:
        with tuner.training(5 if rank == 0 else 3):
            raise AssertionError
    except ValueError as error:
        return str(error)


def other_steps(group, rank):
    """The errors where the processes take other steps: without a batch to tune on, in a pass, and after another one."""

    def tune(tuner):
        tuner.step(*(batch(0) if rank == 0 else batch(0)[:1]))
        tuner.train_step(batch(1)[0])

    def train(tuner):
        if rank == 0:
            return tuner.train_step(batch(0)[0])
        with tuner.training(EXAMPLES):
            raise AssertionError

    def train_after_one_more(tuner):
        tuner.draws += rank
        tuner.train_step(batch(0)[0])

    errors = []
    for steps in (tune, train, train_after_one_more):
        tuned = network()
        try:
            steps(stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.3), F.cross_entropy, process_group=group))
        except ValueError as error:
            errors.append(str(error))
    return errors


def running_mean(group=None, rank=0, size=1):
    """That of a batch norm of the inputs after a step."""
    tuned = stn.convert(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2)).double(), quiet=True)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, process_group=group)
    tuner.train_step(share(batch(0)[0], rank, size))
    return {"mean": tuned[0].running_mean, "variance": tuned[0].running_var}


def result(tuner, tuned):
    weights = torch.cat([parameter.detach().flatten() for parameter in tuned.parameters()])
    return {"history": tuner.history, "scales": tuner.scales(), "weights": weights}


def by_ddp():
    parallel = nn.parallel.DistributedDataParallel
    return train(lambda model, optimizer: (parallel(model), optimizer), **here())


def by_fabric():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    return train(fabric.setup, fabric.backward, **here())


def by_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return train(accelerator.prepare, accelerator.backward, **here())


def here():
    world = torch.distributed.group.WORLD
    return {"group": world, "rank": torch.distributed.get_rank(), "size": torch.distributed.get_world_size()}


if __name__ == "__main__":
    file, *libraries = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ways = {"DDP": by_ddp, "fabric": by_fabric, "accelerate": by_accelerate}
    ways |= {method: lambda method=method: train_in_steps(method, **here()) for method in ("stn", "delta-stn")}
    group = here()["group"], here()["rank"]
    for method in ("stn", "delta-stn"):
        ways[f"unequal {method}"] = lambda method=method: train_in_unequal_shares(method, *group)
        ways[f"experts {method}"] = lambda method=method: train_experts(method, **here())
        ways[f"wrapped {method}"] = lambda method=method: train_wrapped(method, **here())
    ways["accumulated"] = lambda: accumulate(**here())
    ways["unequal passes"] = lambda: unequal_passes(*group)
    ways["other steps"] = lambda: other_steps(*group)
    ways["statistics"] = lambda: running_mean(**here())
    torch.save({library: ways[library]() for library in libraries}, file)
    gc.collect()  # a group that is still held when Python ends has threads that abort it
    torch.distributed.destroy_process_group()
