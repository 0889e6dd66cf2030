"""Hugging Face Accelerate: the loop is yours, and the tuner's passes go around it. In one process or in several.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node=2 examples/accelerate_loop.py

Accelerate's model averages the gradients of the weights over the processes, and the tuner those of the hyperparameters:
all processes have the same λ. `pip install '.[examples]'` installs Accelerate.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=100)
    flags = it.parse_args(arguments)

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # cpu=True joins processes on CPUs
    set_seed(0)
    x, y = (torch.from_numpy(array).to(accelerator.device) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    parts = (TensorDataset(x[i : i + 200], y[i : i + 200]) for i in (0, 200))
    size = 100 // accelerator.num_processes
    train, valid = accelerator.prepare(*(DataLoader(part, size, shuffle=True) for part in parts))
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))

    tuned = stn.convert(network.to(accelerator.device), quiet=True)
    optimizer = torch.optim.AdamW(tuned.parameters(), 3e-3, weight_decay=0)
    tuner = stn.SelfTuner(tuned, optimizer, process_group=torch.distributed.group.WORLD)
    model, optimizer = accelerator.prepare(tuned, optimizer)
    for _ in range(flags.epochs):
        for (inputs, targets), (held_inputs, held_targets) in zip(train, valid, strict=True):
            with tuner.training(len(inputs)):
                accelerator.backward(F.cross_entropy(model(inputs), targets) + tuner.penalty())
            optimizer.step()
            optimizer.zero_grad()
            with tuner.validating(len(held_inputs)):
                loss = F.cross_entropy(model(held_inputs), held_targets)
            tuner.hyper_step(loss)

    accuracy = (tuner.fold().eval()(x[400:]).argmax(1) == y[400:]).float().mean()
    accelerator.print(f"{tuner.values()}\ntest accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
