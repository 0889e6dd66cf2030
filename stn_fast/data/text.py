"""Word-level corpora from plain text files, with a vocabulary built from the training text; cached.

    corpus = text.load("train.txt", "valid.txt", "test.txt")
    corpus.words[corpus.train[0]]                       # the first word
    data = corpus.data_set()                            # the data of a task

Words are separated by white space; every line ends in ``<eos>``.
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
FORMAT = 1  # version of the layout of cached corpora and of the tokenisation


class Corpus(NamedTuple):
    """Texts as word numbers (N,) int64, including ends of lines; number k is ``words[k]``.

    Words are numbered by their count in the training text, the most frequent first, then by their first occurrence.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    words: tuple[str, ...]

    def data_set(self) -> DataSet:
        """Each word of a text is a target once, with the word before it as input (``<eos>`` for the first word)."""
        end = self.words.index(END)
        return DataSet(*(predictions(tokens, end) for tokens in (self.train, self.valid, self.test)))

    def unknown_share(self) -> float:
        """The fraction of the test text that is read as ``<unk>``, which is needed to interpret its perplexity."""
        if UNKNOWN not in self.words:
            return 0.0
        return (self.test == self.words.index(UNKNOWN)).double().mean().item()


def predictions(tokens: Tensor, before: int) -> Split:
    """Targets ``tokens`` (N,), in order; inputs (N,) are the words before them, ``before`` for the first."""
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

    Words that are not in the vocabulary are read as ``<unk>``, if the vocabulary has it: either because it occurs in
    the training text, or because of ``min_count``.

    Args:
        train, valid, test: the files.
        min_count: words that occur less often in the training text are read as ``<unk>``; 1 keeps all words.
        train_fraction: the fraction of the training text to use, from its start; the vocabulary is that of this part.
        cache: whether to cache the result under ``cache_root``, by the checksums of the files.

    Raises:
        UserError: a file cannot be read, is empty or is not UTF-8; a word is not in the vocabulary and there is no
            ``<unk>``; or an argument is out of range.
    """
    paths = [Path(path) for path in (train, valid, test)]
    return corpus_of([read(path) for path in paths], list(map(str, paths)), min_count, train_fraction, cache)


def read(path: Path) -> bytes:
    """The contents of ``path``; raises ``UserError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path} ({error.strerror}); name a text file") from None


def corpus_of(
    texts: Sequence[bytes], names: Sequence[str], min_count: int = 1, train_fraction: float = 1.0, cache: bool = True
) -> Corpus:
    """The corpus of the contents of three files, as ``load``; errors call them by ``names``."""
    if min_count < 1:
        raise UserError(f"min_count = {min_count}: must be at least 1, which keeps every word")
    if not 0 < train_fraction <= 1:
        raise UserError(f"train_fraction (--train-fraction) = {train_fraction}: must be above 0 and at most 1")
    try:
        root = cache_root() if cache else None
    except UserError:  # the cache only saves time
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
    """The distinct words and ``<eos>``, most frequent first; words rarer than ``min_count`` count as ``<unk>``."""
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
                    f"{name}, line {line}: the word {word!r} is not in the training text, and there is no {UNKNOWN} to "
                    "replace it; min_count = 2 reads every word that occurs only once as one"
                )


def _numbered(words: list[str], numbers: dict[str, int]) -> Tensor:
    unknown = numbers.get(UNKNOWN, -1)
    return torch.tensor([numbers.get(word, unknown) for word in words], dtype=torch.int64)


def _keep(path: Path, corpus: Corpus) -> None:
    """Writes the corpus atomically. Errors of the disk are ignored; the next load is then as slow as this one."""
    buffer = io.BytesIO()
    arrays = {name: getattr(corpus, name).numpy().astype(np.int32) for name in ("train", "valid", "test")}
    words = np.frombuffer("\n".join(corpus.words).encode(), np.uint8)
    np.savez(buffer, words=words, **arrays)
    contents = buffer.getvalue()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, hashlib.sha256(contents).digest() + contents)


def _restored(path: Path) -> Corpus | None:
    """The corpus in ``path``; None if the file is missing or damaged."""
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
