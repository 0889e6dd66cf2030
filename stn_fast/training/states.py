"""Nested states as JSON and safetensors: read back equal, and reading runs no code."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stn_fast.errors import UserError
from stn_fast.extras import extra
from stn_fast.ops.arguments import is_sharded
from stn_fast.ops.memory import address_to_compare
from stn_fast.values import from_json

# What JSON lacks is an object with one key of these.
TENSOR, FLOAT, TUPLE, PAIRS, COUNTER, ORDERED = "$tensor", "$float", "$tuple", "$pairs", "$counter", "$ordered"

RESERVED = "__metadata__"  # in a safetensors file, the name of something else


class Unreadable(ValueError):
    """Text or bytes that are not a state."""


def encoded(state: Any) -> tuple[bytes, dict[str, Tensor]]:
    """(text, tensors): the state as JSON, in which tensors are named, and the tensors, contiguous and not copied.

    A state consists of None, bool, int, float, str, dense tensors, lists, tuples, dicts with any of these as keys,
    OrderedDicts, also those of `nn.Module.state_dict`, and Counters. Equal tensors in one place in memory, such as tied
    parameters, are stored once, and are one tensor when they are read; sharded ones are returned as they are.

    Raises:
        UserError: another type is in it, or a tensor of a dtype that safetensors lacks; the message says where.
    """
    encoder = _Encoder()
    tree = encoder.encoded(state, "")
    return json.dumps(tree, allow_nan=False).encode(), encoder.tensors


def decoded(text: bytes, tensors: dict[str, Tensor]) -> Any:
    """The state that `encoded` was given.

    Raises:
        Unreadable: the text is not one of `encoded`, or its tensors are missing.
    """
    try:
        return _decoded(from_json(text, strict=True), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:  # RecursionError is one too
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def copied(tensors: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory. Those of ``into`` with its name and shape are overwritten: new memory is slow."""
    copies = {}
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor)
    return copies


def to_safetensors(tensors: dict[str, Tensor]) -> list[Any]:
    """Contiguous tensors as the contents of a safetensors file, in parts: a header, and their memory.

    safetensors itself would copy the memory twice, and keep Python's other threads waiting.
    """
    header, memory, begin = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].element_size(), reverse=True):  # to align them
        numbers = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
        end = begin + numbers.nbytes
        header[name] = {"dtype": _stored_as(tensor.dtype), "shape": [*tensor.shape], "data_offsets": [begin, end]}
        memory.append(numbers)
        begin = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *memory]


def from_safetensors(contents: bytes, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors in the contents of a safetensors file, in memory of their own.

    Raises:
        Unreadable: it is not such a file.
    """
    with extra("safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load
    try:
        return {name: tensor.to(device, copy=True) for name, tensor in load(contents).items()}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


@cache
def _stored_as(dtype: torch.dtype) -> str | None:
    """The name of the dtype in safetensors files; None if this version of safetensors can't write and read it."""
    with extra("safetensors"):
        from safetensors.torch import save
    try:
        contents = save({"x": torch.empty(1, dtype=dtype)})
        if from_safetensors(contents, "cpu")["x"].dtype != dtype:
            return None
        header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])["x"]
    except (LookupError, TypeError, RuntimeError, Unreadable):
        return None
    return header["dtype"] if header["shape"] == [1] else None  # some have two numbers in a byte


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets its address

    def encoded(self, value: Any, place: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if isinstance(value, float):  # also those of NumPy
            return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if kind in (list, tuple):
            items = [self.encoded(item, _within(place, i)) for i, item in enumerate(value)]
            return items if kind is list else {TUPLE: items}
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encoded(item, _within(place, key)) for key, item in value.items()}
        if kind in (dict, Counter):
            return {PAIRS if kind is dict else COUNTER: self._pairs(value.items(), place)}
        if kind is OrderedDict:
            metadata = self.encoded(getattr(value, "_metadata", None), _within(place, "_metadata"))
            return {ORDERED: [self._pairs(value.items(), place), metadata]}
        raise UserError(f"a checkpoint can't hold {place or 'a state'}, a {kind.__module__}.{kind.__qualname__}")

    def _pairs(self, items: Iterable[tuple[Any, Any]], place: str) -> list[Any]:
        return [
            [self.encoded(key, f"a key of {place}"), self.encoded(item, _within(place, key))] for key, item in items
        ]

    def _tensor(self, tensor: Tensor, place: str) -> dict[str, Any]:
        if is_sharded(tensor):  # each process has another part, so where it is tells nothing
            self.tensors[place] = tensor.detach()
            return {TENSOR: place}
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"a checkpoint can't hold {place}, a tensor that is not dense")
        if _stored_as(tensor.dtype) is None:
            raise UserError(f"a checkpoint can't hold {place}, a tensor of {tensor.dtype}")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        strides = tensor.stride()
        where = (address_to_compare(tensor), tensor.dtype, tensor.shape, strides, tensor.device)
        order = sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True)
        if not tensor.permute(order).is_contiguous():
            order = list(range(tensor.ndim))
        name = self._names.get(where) if tensor.numel() else None
        if name is None:
            name = place
            while name in self.tensors or name == RESERVED:  # where keys have slashes
                name += "/"
            self._names[where] = name
            self._kept.append(tensor)
            self.tensors[name] = tensor.permute(order).contiguous()
        return {TENSOR: name} if order == sorted(order) else {TENSOR: name, "order": order}


def _within(place: str, key: object) -> str:
    return f"{place}/{key}" if place else str(key)


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decoded(item, tensors) for key, item in value.items()}
    content = value[tag]
    if tag == TENSOR:
        tensor, order = tensors[content], value.get("order")
        return tensor if order is None else tensor.permute([order.index(dim) for dim in range(len(order))])
    if tag == FLOAT:
        return float(content)
    if tag == TUPLE:
        return tuple(_decoded(item, tensors) for item in content)
    if tag == ORDERED:
        pairs, metadata = content
        ordered: OrderedDict[Any, Any] = OrderedDict(_decoded(pairs, tensors))
        if metadata is not None:
            ordered._metadata = _decoded(metadata, tensors)  # type: ignore[attr-defined]
        return ordered
    if tag in (PAIRS, COUNTER):
        pairs = dict(_decoded(content, tensors))
        return pairs if tag == PAIRS else Counter(pairs)
    raise ValueError(f"unknown tag {tag!r}")
