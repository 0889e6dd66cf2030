"""Word-level corpora from plain text files: one vocabulary, built once from the training text, and cached.

    corpus = text.load("train.txt", "valid.txt", "test.txt")
    corpus.words[corpus.train[0]]                       # the first word
    data = corpus.data_set()                            # what a task wants

Words stand between white space; every line ends in ``<eos>``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stn_fast.data.splits import DataSet, Split
from stn_fast.errors import UserError
from stn_fast.files import cache_root, replace

END, UNKNOWN = "<eos>", "<unk>"
FORMAT = 1  # counts the layouts of cached corpora and the rules by which words become tokens


class Corpus(NamedTuple):
    """Texts as word numbers (N,) int64, N counting the ends of lines; number k is ``words[k]``.

    Numbers follow the count in the training text, the commonest word first; words equally common, their first
    appearance.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    words: tuple[str, ...]

    def data_set(self) -> DataSet:
        """Every word of each text as a target once, its input the word before; that of the first is an end of line."""
        end = self.words.index(END)
        return DataSet(*(predictions(tokens, end) for tokens in (self.train, self.valid, self.test)))

    def unknown_share(self) -> float:
        """The share of the test text that is read as ``<unk>``, without which its perplexity says little."""
        if UNKNOWN not in self.words:
            return 0.0
        return (self.test == self.words.index(UNKNOWN)).double().mean().item()


def predictions(tokens: Tensor, before: int) -> Split:
    """Targets ``tokens`` (N,), in the order of the text; inputs (N,) the word before each, ``before`` for the first."""
    text = torch.cat([tokens.new_tensor([before]), tokens])
    return Split(text[:-1], text[1:])


def load(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    *,
    min_count: int = 1,
    train_fraction: float = 1.0,
    cache: bool = True,
) -> Corpus:
    """The corpus in three UTF-8 files.

    A word that the vocabulary lacks is ``<unk>``, where the vocabulary has that: because the training text does, or
    by ``min_count``.

    Args:
        train, valid, test: the files.
        min_count: rarer words of the training text are ``<unk>``; 1 keeps all.
        train_fraction: the share of the training text that is used, from its start; the vocabulary is that part's.
        cache: keep the result under ``cache_root``, by the checksums of the files, and read it from there.

    Raises:
        UserError: a file cannot be read, holds no word or is not UTF-8; a word is in no vocabulary; or an argument is
            out of range.
    """
    paths = [Path(path) for path in (train, valid, test)]
    return corpus_of([read(path) for path in paths], list(map(str, paths)), min_count, train_fraction, cache)


def read(path: Path) -> bytes:
    """The contents of ``path``; a ``UserError`` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path} ({error.strerror}); name a text file") from None


def corpus_of(
    texts: Sequence[bytes], names: Sequence[str], min_count: int = 1, train_fraction: float = 1.0, cache: bool = True
) -> Corpus:
    """The corpus of the contents of three files, as ``load``; ``names`` stand for them in errors."""
    if min_count < 1:
        raise UserError(f"min_count = {min_count}: must be at least 1, which keeps every word")
    if not 0 < train_fraction <= 1:
        raise UserError(f"train_fraction (--train-fraction) = {train_fraction}: must be above 0 and at most 1")
    try:
        root = cache_root() if cache else None
    except UserError:  # the cache saves time and nothing else
        root = None
    if root is None:
        return _built(texts, names, min_count, train_fraction)
    digests = [hashlib.sha256(contents).hexdigest() for contents in texts]
    key = [FORMAT, *digests, min_count, float(train_fraction)]
    path = root / "corpora" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.corpus"
    if (corpus := _restored(path)) is None:
        corpus = _built(texts, names, min_count, train_fraction)
        _keep(path, corpus)
    return corpus


def _built(texts: Sequence[bytes], names: Sequence[str], min_count: int, train_fraction: float) -> Corpus:
    decoded = [_decoded(contents, name) for contents, name in zip(texts, names, strict=True)]
    train, valid, test = map(_words, decoded)
    train = train[: math.ceil(train_fraction * len(train))]
    words = vocabulary(train, min_count)
    numbers = {word: number for number, word in enumerate(words)}
    if UNKNOWN not in numbers:
        for text, name in zip(decoded[1:], names[1:], strict=True):
            _check_known(text, numbers, name)
    return Corpus(_numbered(train, numbers), _numbered(valid, numbers), _numbered(test, numbers), words)


def _decoded(contents: bytes, name: str) -> str:
    try:
        text = contents.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = contents[error.start]
        raise UserError(
            f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start:,} cannot be decoded; convert the file"
        ) from None
    if not text or text.isspace():
        raise UserError(f"{name} is empty; it needs at least one word")
    return text if text.endswith("\n") else text + "\n"


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {END} ").split()


def vocabulary(train: Iterable[str], min_count: int = 1) -> tuple[str, ...]:
    """The distinct words, the commonest first, with ``<eos>``; those rarer than ``min_count`` count as ``<unk>``."""
    counts = Counter(train)
    counts[END] += 0
    if min_count > 1:
        rare = [word for word, count in counts.items() if count < min_count and word not in (END, UNKNOWN)]
        counts[UNKNOWN] += sum(map(counts.pop, rare))
    return tuple(sorted(counts, key=counts.__getitem__, reverse=True))


def _check_known(text: str, numbers: dict[str, int], name: str) -> None:
    for line, words in enumerate(map(str.split, text.split("\n")), start=1):
        for word in words:
            if word not in numbers:
                raise UserError(
                    f"{name}, line {line}: the word {word!r} is not in the training text, which has no {UNKNOWN} to "
                    "take its place; min_count = 2 makes one of every word seen only once"
                )


def _numbered(words: list[str], numbers: dict[str, int]) -> Tensor:
    unknown = numbers.get(UNKNOWN, -1)
    return torch.tensor([numbers.get(word, unknown) for word in words], dtype=torch.int64)


def _keep(path: Path, corpus: Corpus) -> None:
    """Writes the corpus whole or not at all. Where the disk refuses, the next load is as slow as this one."""
    buffer = io.BytesIO()
    arrays = {name: getattr(corpus, name).numpy().astype(np.int32) for name in ("train", "valid", "test")}
    words = np.frombuffer("\n".join(corpus.words).encode(), np.uint8)
    np.savez(buffer, words=words, **arrays)
    contents = buffer.getvalue()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, hashlib.sha256(contents).digest() + contents)


def _restored(path: Path) -> Corpus | None:
    """The corpus in ``path``, or None where there is none or it is not as it was written."""
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    digest, contents = contents[:32], contents[32:]
    if hashlib.sha256(contents).digest() != digest:
        return None
    with np.load(io.BytesIO(contents), allow_pickle=False) as arrays:
        train, valid, test = (torch.from_numpy(arrays[name]).long() for name in ("train", "valid", "test"))
        return Corpus(train, valid, test, tuple(arrays["words"].tobytes().decode().split("\n")))
