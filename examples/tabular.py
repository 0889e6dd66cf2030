"""An MLP on a small table, scikit-learn's diabetes data: its dropout rate and weight decay tune themselves.

    python examples/tabular.py

150 patients to train on, 150 to tune on and 142 to test, from a first guess of dropout .5 and weight decay 1e-4. The
plain run has the same epochs at the first guess, one pass per batch, without the validation labels; the two numbers are
not a comparison at equal compute (benchmarks/five_lines.py is one).
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=60)
    flags = it.parse_args(arguments)

    torch.manual_seed(0)
    x, y = (torch.from_numpy(array).float() for array in load_diabetes(return_X_y=True, scaled=False))
    x, y = ((of - of[:150].mean(0)) / of[:150].std(0) for of in (x, y[:, None]))  # as in training
    train, valid = (DataLoader(TensorDataset(x[i : i + 150], y[i : i + 150]), 25, shuffle=True) for i in (0, 150))
    hidden = [nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5)]
    plain = nn.Sequential(*hidden, nn.Linear(64, 1))
    tuned = stn.convert(copy.deepcopy(plain))

    optimizer = torch.optim.Adam(plain.parameters(), 3e-3, weight_decay=1e-4)  # where the tuned one starts
    for (inputs, targets), _ in stn.alternate(train, valid, epochs=flags.epochs):
        F.mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters(), 3e-3), loss=F.mse_loss)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    print(tuner.values())
    for name, model in (("plain", plain), ("self-tuned", tuner.fold())):
        print(f"{name}: squared error of the test patients {F.mse_loss(model.eval()(x[300:]), y[300:]):.3f}")


if __name__ == "__main__":
    main()
