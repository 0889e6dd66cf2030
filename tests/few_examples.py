"""Runs `main` of a module on the beginning of each published data set: python few_examples.py MODULE [ARGUMENT...]

A command trains, evaluates and reports as ever, without minutes of evaluation on a CPU. The data sets are shortened
where this file is imported, so that processes that a command spawns, which import it too, have them.
"""

import importlib
import sys

from stn_fast.data import Images, Split, cifar10, fashion_mnist, ptb
from stn_fast.recipes import images

# A recipe may train on a twentieth of its images, and needs a batch of them.
TRAIN, EXAMPLES, WORDS = 4000, 200, 1000


def shortened(load, shorten):
    return lambda *arguments, **options: shorten(load(*arguments, **options))


def first(split, count):
    return Split(split.inputs[:count], split.targets[:count])


def few_images(data):
    return Images(first(data.train, TRAIN), first(data.test, EXAMPLES), data.mean, data.std)


def few_words(corpus):
    return corpus._replace(train=corpus.train[: 3 * WORDS], valid=corpus.valid[:WORDS], test=corpus.test[:WORDS])


for module in (cifar10, fashion_mnist):
    module.load = shortened(module.load, few_images)
ptb.load = shortened(ptb.load, few_words)
images.VALID_SIZES.update(dict.fromkeys(images.VALID_SIZES, EXAMPLES))

if __name__ == "__main__":
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
