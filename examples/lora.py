"""LoRA with peft: a small network learns mirrored digits from few examples, and LoRA's regularisers tune themselves.

    pip install '.[examples]' && python examples/lora.py

The network is first trained on scikit-learn's digits. Then only the layers that peft adds are trained, and so `convert`
gives them, and no others, a response. The plain run has the same epochs at the first guess, one pass per batch, without
the validation labels; the two numbers are not a comparison at equal compute (benchmarks/five_lines.py is one).
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn


def fit(model: nn.Module, batches: DataLoader[tuple[torch.Tensor, ...]], epochs: int, smoothing: float = 0.0) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-3)  # where the tuned one starts
    for _ in range(epochs):
        for x, y in batches:
            F.cross_entropy(model(x), y, label_smoothing=smoothing).backward()
            optimizer.step()
            optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=40, help="of the fine-tuning (default: %(default)s)")
    flags = it.parse_args(arguments)
    torch.manual_seed(0)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x.float().view(-1, 8, 8) / 16
    mirrored = x.mT.flatten(1)  # along the diagonal
    parts = (TensorDataset(mirrored[i : i + 200], y[i : i + 200]) for i in (0, 200))
    train, valid = (DataLoader(part, 50, shuffle=True) for part in parts)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    fit(network, DataLoader(TensorDataset(x[:1000].flatten(1), y[:1000]), 50, shuffle=True), epochs=10)
    plain = get_peft_model(network, LoraConfig(r=8, lora_alpha=32, target_modules=["0", "2", "4"], lora_dropout=0.3))
    tuned = stn.convert(copy.deepcopy(plain), [stn.WeightDecay("*"), stn.LabelSmoothing(init=0.1)])
    fit(plain, train, flags.epochs, smoothing=0.1)
    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters(), 3e-3), loss=F.cross_entropy)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    print(tuner.values())
    networks: dict[str, Any] = {"plain": plain, "self-tuned": tuner.fold()}
    for name, model in networks.items():
        merged = model.merge_and_unload().eval()  # a Sequential of three Linear, as before LoRA
        print(f"{name}: test accuracy {(merged(mirrored[1000:]).argmax(1) == y[1000:]).float().mean():.3f}")


if __name__ == "__main__":
    main()
