"""One of the processes of tests/training/test_processes.py: trains a converted network in passes and saves the results.

    python gloo_process.py FILE DDP fabric accelerate

Trains by each library that is named. The environment says which process it is, as torchrun's does.
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


def network():
    torch.manual_seed(0)
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
    torch.save({library: ways[library]() for library in libraries}, file)
    torch.distributed.destroy_process_group()
