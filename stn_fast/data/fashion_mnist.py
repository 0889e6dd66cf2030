"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels, ten kinds of clothing (Xiao, Rasul, Vollgraf, 2017).

Its files are in ``fashion_mnist/`` under the data root, as published: four idx files, compressed with gzip.
"""

from __future__ import annotations

from pathlib import Path

from stn_fast.data import idx
from stn_fast.data.download import Published, data_root, fetch
from stn_fast.data.splits import Images, Split

FOLDER = "fashion_mnist"
MEAN, STD = (0.2860,), (0.3530,)

MIRROR = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
AUTHORS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def _published(name: str, size: int, sha256: str) -> Published:
    return Published(name, size, sha256, (MIRROR + name, AUTHORS + name))


TRAIN = (
    _published(
        "train-images-idx3-ubyte.gz", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    _published("train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
)
TEST = (
    _published(
        "t10k-images-idx3-ubyte.gz", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    _published("t10k-labels-idx1-ubyte.gz", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
)


def load(root: str | Path | None = None) -> Images:
    """60,000 training and 10,000 test images, (N, 1, 28, 28) uint8 with 0 the background; targets 0 to 9.

    Args:
        root: the data root, by default as for `data_root`. Missing files are downloaded.

    Raises:
        UserError: a file is damaged, or missing and cannot be downloaded.
    """
    folder = data_root(root) / FOLDER
    train, test = (_split(folder, *files) for files in (TRAIN, TEST))
    return Images(train, test, MEAN, STD)


def _split(folder: Path, images: Published, labels: Published) -> Split:
    pixels, targets = (idx.parse(fetch(folder, file), str(folder / file.name)) for file in (images, labels))
    return Split(pixels.unsqueeze(1), targets.long())
