"""WikiText-2: good and featured articles of Wikipedia, 2,088,628 training words (Merity et al., 2016; CC BY-SA).

``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens`` are in ``wikitext-2/`` under the data root.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from stn_fast import files
from stn_fast.data.download import Published, data_root, downloaded, writing
from stn_fast.data.text import Corpus, corpus_of, read
from stn_fast.errors import UserError
from stn_fast.files import replace

FOLDER = "wikitext-2"
FILES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
WORDS = (2088628, 217646, 245569)  # as published, ends of lines included
ARCHIVE = Published(
    "wikitext-2-v1.zip",
    4475746,
    "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    (
        "https://wikitext.smerity.com/wikitext-2-v1.zip",  # the site of one of the authors
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",  # the original; blocked since 2024
    ),
)


def load(
    root: str | Path | None = None, *, min_count: int = 1, train_fraction: float = 1.0, cache: bool = True
) -> Corpus:
    """2,088,628 training, 217,646 validation and 245,569 test words, ends of lines included; 33,278 distinct ones.

    The archive is checked against the published checksum before it is opened; files that already exist are checked by
    their numbers of words.

    Args:
        root: the data root, by default as for `data_root`. Missing files are downloaded.
        min_count, train_fraction, cache: as for `stn_fast.data.text.load`.

    Raises:
        UserError: a file is not the published one, or missing and cannot be downloaded; or an argument is out of range.
    """
    folder = data_root(root) / FOLDER
    missing = [name for name in FILES if not files.exists(folder / name)]
    if missing:
        with downloaded(folder / ARCHIVE.name, ARCHIVE) as archive:
            unpack(archive, folder, missing)
    paths = [folder / name for name in FILES]
    corpus = corpus_of([read(path) for path in paths], list(map(str, paths)), min_count, train_fraction, cache)
    expected = (ceil(train_fraction * WORDS[0]), *WORDS[1:])
    for path, tokens, words in zip(paths, corpus[:3], expected, strict=True):
        if len(tokens) != words:
            raise UserError(
                f"{path} is not the published file ({len(tokens):,} words used, {words:,} expected); "
                "delete it, and the next run downloads it again"
            )
    return corpus


def unpack(archive: Path, folder: Path, names: Sequence[str]) -> None:
    """Extracts the files ``names`` of the checked archive into ``folder``, each atomically."""
    with zipfile.ZipFile(archive) as source:
        for name in names:
            with writing(folder / name):
                replace(folder / name, source.read(f"{FOLDER}/{name}"))
