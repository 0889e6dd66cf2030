"""A ResNet of timm on Fashion-MNIST: augmentation, dropout and stochastic depth tune themselves while it trains.

    pip install '.[examples]' && python examples/timm_resnet.py --data-root DIR

timm's ResNet has its dropout rate as a number, the same for all images, so stn.Dropout adds one after the pooling. The
plain run has the same epochs at the first guess, one pass per batch, without the validation labels or this dropout, and
without augmentation (stn.Augment only normalises in a plain model); the two numbers are not a comparison at equal
compute (benchmarks/five_lines.py is one).
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn
from stn_fast.data import fashion_mnist


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [model(some).argmax(1) == of for some, of in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(right).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=8)
    it.add_argument("--images", type=int, default=5000, help="to train on, and to tune on (default: %(default)s)")
    it.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: $STN_FAST_DATA)")
    flags = it.parse_args(arguments)
    torch.manual_seed(0)
    data = fashion_mnist.load(flags.data_root)  # uint8 images, which stn.Augment normalises
    parts = (TensorDataset(*(part[i : i + flags.images] for part in data.train)) for i in (0, flags.images))
    train, valid = (DataLoader(part, 64, shuffle=True) for part in parts)
    widths = dict(channels=(16, 32, 64, 128), in_chans=1, num_classes=10)
    resnet = timm.create_model("resnet10t", drop_path_rate=0.1, zero_init_last=False, **widths)
    augment = stn.Augment(mean=data.mean, std=data.std, rotation=5.0, translation=0.05, brightness=0.1)
    plain = nn.Sequential(augment, resnet)
    tuned = stn.convert(copy.deepcopy(plain), [stn.Dropout("1.global_pool"), stn.WeightDecay("*")])
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, weight_decay=1e-3)  # where the tuned one starts
    for (images, labels), _ in stn.alternate(train, valid, epochs=flags.epochs):
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters(), 1e-3), loss=F.cross_entropy)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    before, after = (accuracy(model, *data.test) for model in (plain, tuner.fold()))
    print(f"{tuner.values()}\ntest accuracy: plain {before:.3f}, self-tuned {after:.3f}")


if __name__ == "__main__":
    main()
