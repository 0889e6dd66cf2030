"""The fingerprint of a data set: equal for equal contents, wherever and however they are stored, and for no others."""

import hashlib

import numpy as np
import pytest
import torch

from stn_fast.data import DataSet, Split, digits, fingerprint, text


def split(seed=0, examples=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (examples, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(examples))


DATA = DataSet(split(0), split(1), split(2))


def changed(data, part, **tensors):
    return data._replace(**{part: getattr(data, part)._replace(**tensors)})


def test_a_digest_is_the_sha_256_of_dtype_shape_and_values():
    inputs, targets = torch.tensor([[1.5], [-2.0]]), torch.tensor([3, 4])
    expected = hashlib.sha256(
        b"torch.float32 (2, 1)\n"
        + np.array([1.5, -2.0], np.float32).tobytes()
        + b"torch.int64 (2,)\n"
        + np.array([3, 4], np.int64).tobytes()
    )
    data = DataSet(*[Split(inputs, targets)] * 3)
    assert fingerprint(data)["train"] == f"sha256:{expected.hexdigest()}"


@pytest.mark.parametrize("part", DataSet._fields)
@pytest.mark.parametrize(
    "change",
    [
        lambda split: {"inputs": split.inputs ^ (torch.arange(split.inputs.numel()).view_as(split.inputs) == 7).byte()},
        lambda split: {"targets": split.targets.flip(0)},
        lambda split: {"inputs": split.inputs.float()},
        lambda split: {"inputs": split.inputs.transpose(2, 3).contiguous().view_as(split.inputs)},
        lambda split: {"inputs": split.inputs.view(6, 3, 5, 4)},
        lambda split: {name: part[:-1] for name, part in split._asdict().items()},
        lambda split: {name: part.flip(0) for name, part in split._asdict().items()},
    ],
    ids=["one bit", "targets", "dtype", "layout", "shape", "length", "order"],
)
def test_another_split_has_another_digest_and_the_others_keep_theirs(part, change):
    before, after = fingerprint(DATA), fingerprint(changed(DATA, part, **change(getattr(DATA, part))))
    assert [name for name in before if before[name] != after[name]] == [part]


@pytest.mark.parametrize(
    "same",
    [
        lambda tensor: tensor.clone(),
        lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
        lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor,
        lambda tensor: torch.cat([tensor, tensor])[len(tensor) :],
        lambda tensor: tensor.flip(0).flip(0),
    ],
    ids=["copy", "strided", "channels_last", "offset", "twice flipped"],
)
def test_the_same_values_stored_otherwise_have_the_same_digest(same):
    again = DataSet(*(Split(*map(same, part)) for part in DATA))
    assert fingerprint(again) == fingerprint(DATA)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.complex64).conj(),
        torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
        torch.zeros(2, 3).requires_grad_(),
        torch.zeros(0, 3),
    ],
    ids=["bfloat16", "bool", "conjugate", "negative", "requires_grad", "empty"],
)
def test_every_kind_of_tensor_has_a_digest(inputs):
    data = DataSet(*[Split(inputs, torch.zeros(len(inputs)))] * 3)
    assert fingerprint(data)["train"].startswith("sha256:")


def test_the_values_of_a_conjugate_view_count_and_not_what_it_is_a_view_of():
    numbers = torch.complex(torch.zeros(2), torch.ones(2))
    of_view, of_copy, of_base = (
        fingerprint(DataSet(*[Split(inputs, torch.zeros(2))] * 3))["train"]
        for inputs in (numbers.conj(), numbers.conj().resolve_conj(), numbers)
    )
    assert of_view == of_copy != of_base


def test_texts_with_equal_numbers_differ_only_in_their_vocabulary(tmp_path):
    found = []
    for words in ("red green blue", "one two three"):
        first, second, third = words.split()
        files = [tmp_path / name for name in ("train", "valid", "test")]
        for file in files:
            file.write_text(f"{first} {second} {first}\n{third} {second} {first}\n")
        corpus = text.load(*files, cache=False)
        found.append(fingerprint(corpus.data_set(), corpus.words))
    one, other = found
    assert [part for part in one if one[part] != other[part]] == ["vocabulary"]


def test_the_fingerprint_depends_on_word_boundaries():
    assert fingerprint(DATA, ["a", "b c"])["vocabulary"] != fingerprint(DATA, ["a b", "c"])["vocabulary"]
    assert "vocabulary" not in fingerprint(DATA)


def test_a_data_set_read_again_has_the_same_fingerprint():
    assert fingerprint(digits.load()) == fingerprint(digits.load())
