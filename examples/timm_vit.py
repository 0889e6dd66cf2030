"""A vision transformer of timm on CIFAR-10: augmentation, dropouts and stochastic depth tune themselves.

    pip install '.[examples]' && python examples/timm_vit.py --data-root DIR

timm's fused attention has one dropout rate for all images; without it, this rate is tuned, too. The plain run has the
same epochs at the first guess, one pass per batch, without the validation labels or augmentation (a plain stn.Augment
only normalises); the numbers are no comparison at equal compute (benchmarks/five_lines.py is).
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn
from stn_fast.data import cifar10


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
    data = cifar10.load(flags.data_root)  # uint8 images, which stn.Augment normalises
    parts = (TensorDataset(*(part[i : i + flags.images] for part in data.train)) for i in (0, flags.images))
    train, valid = (DataLoader(part, 64, shuffle=True) for part in parts)
    timm.layers.set_fused_attn(False)
    shape = dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=2, num_classes=10)
    vit = timm.create_model("vit_tiny_patch16_224", proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1, **shape)
    augment = stn.Augment(mean=data.mean, std=data.std, flip=0.5, crop_padding=4, hue=0.05, saturation=0.1)
    plain = nn.Sequential(augment, vit)
    tuned = stn.convert(copy.deepcopy(plain))
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, weight_decay=1e-4)  # where the tuned one starts
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
