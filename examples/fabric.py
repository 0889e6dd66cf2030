"""Lightning Fabric: the loop is yours, and the tuner's passes go around it. In one process or in several.

    python examples/fabric.py
    python examples/fabric.py --processes 2

Fabric's model averages the gradients of the weights over the processes, and the tuner those of the hyperparameters, so
that all processes have the same λ. `pip install '.[examples]'` installs Fabric.
"""

import argparse

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=100)
    it.add_argument("--processes", type=int, default=1)
    flags = it.parse_args(arguments)

    fabric = Fabric(accelerator="auto", devices=flags.processes)
    fabric.launch()
    fabric.seed_everything(0)
    x, y = (torch.from_numpy(array).to(fabric.device) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    parts = (TensorDataset(x[i : i + 200], y[i : i + 200]) for i in (0, 200))
    train, valid = fabric.setup_dataloaders(*(DataLoader(part, 100 // flags.processes, shuffle=True) for part in parts))
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))

    tuned = stn.convert(network.to(fabric.device), quiet=True)
    optimizer = torch.optim.AdamW(tuned.parameters(), 3e-3, weight_decay=0)
    tuner = stn.SelfTuner(tuned, optimizer, process_group=torch.distributed.group.WORLD)
    model, optimizer = fabric.setup(tuned, optimizer)
    for _ in range(flags.epochs):
        for (inputs, targets), (held_inputs, held_targets) in zip(train, valid, strict=True):
            with tuner.training(len(inputs)):
                fabric.backward(F.cross_entropy(model(inputs), targets) + tuner.penalty())
            optimizer.step()
            optimizer.zero_grad()
            with tuner.validating(len(held_inputs)):
                loss = F.cross_entropy(model(held_inputs), held_targets)
            tuner.hyper_step(loss)

    accuracy = (tuner.fold().eval()(x[400:]).argmax(1) == y[400:]).float().mean()
    fabric.print(f"{tuner.values()}\ntest accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
