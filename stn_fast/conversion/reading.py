"""Finding code that reads the rate or the parameters of a module itself, instead of calling the module."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What code may ask a parameter for without computing with it.
METADATA = frozenset((
    "_version", "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad", "is_complex",
    "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_nested", "is_quantized",
    "is_sparse", "itemsize", "layout", "names", "nbytes", "ndim", "ndimension", "nelement", "numel", "requires_grad",
    "shape", "size", "stride",
))  # fmt: skip
NOT_IN_A_PASS = ("__init__", "extra_repr", "__repr__")


def reads(parent: type[nn.Module], child: str, attribute: str) -> bool:
    """Whether a method of the class contains ``self.<child>.<attribute>``, by its bytecode."""
    return any((child, attribute) in pairwise(_attributes(code)) for code in _codes(parent))


def rates_in(module: nn.Module) -> dict[str, float]:
    """Dropout rates that are numbers, and that a method of the module reads: {"attention_dropout": 0.1}"""
    rates = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
    rates = {key: value for key, value in rates.items() if 0 < value < 1}
    read = {name for code in _codes(type(module)) for name in _attributes(code)} if rates else set()
    return {key: value for key, value in rates.items() if key in read}


def _codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Of the methods that may run in a forward pass."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and name not in NOT_IN_A_PASS:
                yield from nested(code)


def nested(code: CodeType) -> Iterator[CodeType]:
    """With the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@lru_cache(maxsize=4096)
def _attributes(code: CodeType) -> tuple[str | None, ...]:
    """The names of attributes that are read, in order, with None for every other instruction."""
    return tuple(step.argval if step.opname == "LOAD_ATTR" else None for step in dis.get_instructions(code))


class ReadParameters(TorchFunctionMode):
    """Inside, notes which of these parameters are read while no module that may read them is running.

    Args:
        owners: the module and the name of each parameter, by its id.

    Attributes:
        running: how many modules are running that may.
        found: the module, the name of its parameter and the name of the function that read it, for the first one.
    """

    def __init__(self, owners: Mapping[int, tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.owners, self.running = owners, 0
        self.found: tuple[nn.Module, str, str] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.running == 0 and self.found is None and _name(func) not in METADATA:
            leaves = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            owner = next((self.owners[id(leaf)] for leaf in leaves if id(leaf) in self.owners), None)
            self.found = owner and (*owner, _name(func))
        return func(*args, **kwargs)


def _name(func: Any) -> str:
    """Of a function of torch, or of the attribute that it gets."""
    return getattr(func.__self__ if func.__name__ == "__get__" else func, "__name__", "?")
