"""One of the processes of tests/training/test_processes.py: trains a converted network and saves the results.

    python gloo_process.py FILE DDP fabric accelerate stn delta-stn unequal statistics

Trains in passes by each library that is named, or in steps by the method, or with shares of different sizes. The
environment says which process it is, as torchrun's does.
"""

import os
import sys

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


def train_in_unequal_shares(group=None, rank=0):
    """The steps of a method with 5 and 3 of the 8 examples."""
    tuned = network()
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.3), F.cross_entropy, process_group=group)
    shares = [slice(None)] if group is None else [slice(5), slice(5, None)]
    if group is not None:
        tuner.method.processes.equal = False
    for step in range(STEPS):
        own, held_out = ([tensor[shares[rank]] for tensor in tensors] for tensors in batch(step))
        tuner.method.train_step(own, step, first_example=shares[rank].start or 0)
        tuner._record(tuner.method.valid_step(held_out, 1000 + step, first_example=shares[rank].start or 0))
    return result(tuner, tuned)


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
    ways["unequal"] = lambda: train_in_unequal_shares(here()["group"], here()["rank"])
    ways["statistics"] = lambda: running_mean(**here())
    torch.save({library: ways[library]() for library in libraries}, file)
    torch.distributed.destroy_process_group()
