"""Nested states as JSON and safetensors: equal after a round trip, and never a silent change of a type."""

import json
import math
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from stn_fast.errors import UserError
from stn_fast.training import states

VALUES = {
    "nothing": None,
    "numbers": [True, 0, -(2**63), 2**80, 0.1, -0.0, math.inf, -math.inf, 5e-324],
    "texts": ["", "é\n\0", "$tensor", "\ud800"],
    "nested": {"a": {"b": [[], {}, ()]}},
    "pair": (0.9, 0.999),
    "steps": {0: {"step": 1.0}, 1: {}, (1, "x"): None, None: 2, 0.5: 3},
    "tags": {"$tensor": "text", "plain": 1},
    "milestones": Counter({30: 2, 80: 1}),
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
}


def round_trip(state):
    text, tensors = states.encoded(state)
    return states.decoded(text, states.from_safetensors(b"".join(states.to_safetensors(tensors)), "cpu"))


def assert_equal(got, want):
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert [*got] == [*want]
        assert [*map(type, got)] == [*map(type, want)]
        for one, other in zip(got.values(), want.values(), strict=True):
            assert_equal(one, other)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_equal(one, other)
    else:
        assert repr(got) == repr(want)


@pytest.mark.parametrize("name", VALUES)
def test_values_read_back_equal_and_of_the_same_types(name):
    assert_equal(round_trip(VALUES[name]), VALUES[name])


def test_a_value_that_is_not_a_number_stays_one():
    assert math.isnan(round_trip({"loss": math.nan})["loss"])


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 3, 2, 2)])
def test_tensors_keep_numbers_dtype_and_shape(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    back = round_trip([tensor])[0]
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_tensors_are_stored_in_memory_as_they_were(order):
    tensor = torch.randn(5, 4, 3, 2).permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    back = round_trip({"filters": tensor})["filters"]
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_parts_of_a_tensor_hold_only_their_own_numbers():
    whole = torch.randn(4, 3)
    state = {
        "halves": whole.chunk(2),
        "column": whole[:, 1],
        "negative": torch._neg_view(whole),
        "one": whole[0, 0].expand(5),
    }
    _, tensors = states.encoded(state)
    assert sum(tensor.numel() for tensor in tensors.values()) == 6 + 6 + 4 + 12 + 5
    back = round_trip(state)
    for one, other in zip([*back.pop("halves"), *back.values()], [*state.pop("halves"), *state.values()], strict=True):
        assert torch.equal(one, other)


def test_tied_parameters_are_stored_once_and_stay_tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    _, tensors = states.encoded(network.state_dict())
    assert len(tensors) == 3
    back = round_trip(network.state_dict())
    assert back["0.weight"] is back["1.weight"]


def test_the_state_of_a_module_keeps_the_versions_that_loading_asks_for():
    network = nn.Sequential(nn.BatchNorm1d(3))
    back = round_trip(network.state_dict())
    assert back._metadata == network.state_dict()._metadata
    assert back._metadata["0"] == {"version": 2}
    network.load_state_dict(back)


def test_names_of_tensors_say_where_they_are_and_do_not_collide():
    text, tensors = states.encoded({"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1)})
    assert [*tensors] == ["a/b", "a/b/"]
    assert {**json.loads(text)} == {"a": {"b": {"$tensor": "a/b"}}, "a/b": {"$tensor": "a/b/"}}


@pytest.mark.parametrize("state", [{"__metadata__": torch.ones(2)}, {"__metadata__": {"": torch.ones(2)}}])
def test_a_tensor_may_be_called_as_the_metadata_of_safetensors(state):
    assert str(round_trip(state)) == str(state)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bits8], ids=str)
def test_a_dtype_that_safetensors_lacks_is_refused_by_place(dtype):
    with pytest.raises(UserError, match=f"a checkpoint can't hold model/weight, a tensor of {dtype}"):
        states.encoded({"model": {"weight": torch.empty(2, dtype=dtype)}})


class Other:
    pass


@pytest.mark.parametrize("value", [Other(), {1, 2}, b"bytes", 1j, torch.float32, len, torch.eye(2).to_sparse()])
def test_other_types_are_refused_by_place(value):
    with pytest.raises(UserError, match="a checkpoint can't hold scheduler/0/best, a "):
        states.encoded({"scheduler": [{"best": value}]})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b'{"$tensor": "absent"}',
        b'{"$tensor": ["here"]}',
        b'{"$tensor": "here", "order": [0]}',
        b'{"$tensor": "here", "order": [1, 1]}',
        b'{"$tensor": "here", "order": 1}',
        b'{"$float": "many"}',
        b'{"$float": null}',
        b'{"$tuple": 1}',
        b'{"$pairs": [[1]]}',
        b'{"$pairs": [[[], 1]]}',
        b'{"$ordered": 1}',
        b'{"$code": "print(1)"}',
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_a_text_of_anything_else_is_unreadable(text):
    with pytest.raises(states.Unreadable):
        states.decoded(text, {"here": torch.ones(2, 2)})


HEADER = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def safetensors_file(header, data=b"\0" * 8):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\x80\x04N.",  # a pickle
        safetensors_file(HEADER, b"\0" * 7),
        safetensors_file({"x": HEADER["x"] | {"shape": [2**60, 2**60]}}),
        safetensors_file({"x": HEADER["x"] | {"dtype": "object"}}),
        safetensors_file({"x": HEADER["x"] | {"data_offsets": [0, 2**62]}}),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_file_of_anything_else_is_unreadable(contents):
    assert states.from_safetensors(safetensors_file(HEADER), "cpu")["x"].tolist() == [0, 0]
    with pytest.raises(states.Unreadable):
        states.from_safetensors(contents, "cpu")
