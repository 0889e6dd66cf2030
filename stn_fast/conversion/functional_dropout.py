"""Finding dropout that the code of a module calls as a function, such as ``F.dropout(x, self.p, self.training)``."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from stn_fast.conversion.reading import NOT_IN_A_PASS, nested

LEFT = ("torch.", "stn_fast.")  # packages whose own modules have rules, or are listed as modules


class _Rate(NamedTuple):
    """The argument that is the rate: its place, its name, and its default; None if it has none."""

    place: int
    name: str
    default: float | None


RATES: dict[Any, _Rate] = {
    function: _Rate(1, "p", 0.5)
    for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
}
RATES |= {getattr(torch, name): _Rate(1, "p", None) for name in ("dropout", "alpha_dropout", "feature_dropout")}
RATES |= {getattr(torch, f"{name}_"): _Rate(1, "p", None) for name in ("dropout", "alpha_dropout", "feature_dropout")}
RATES |= {F.scaled_dot_product_attention: _Rate(4, "dropout_p", 0.0)}
NAMES, ATTRIBUTES = ("LOAD_GLOBAL", "LOAD_DEREF"), ("LOAD_ATTR", "LOAD_METHOD")
UNKNOWN = "a rate that it computes"


def functional_dropouts(module: nn.Module) -> tuple[str, ...]:
    """What the methods of its class call to drop activations, and at which rate: ("dropout at self.p = 0.2",)

    Left out are rates of 0, and those of the modules in it, which are reported as rates that it reads.
    """
    found = [shown for function in _methods(type(module)) for shown in _dropouts_of(function, module)]
    return tuple(dict.fromkeys(found))


def _methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Those that may run in a forward pass; overridden ones too if those that override them call `super`."""
    seen: dict[str, bool] = {}  # whether a method of this name calls those that it overrides
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            function = getattr(value, "__func__", function)  # of a static method
            if not isinstance(function, FunctionType) or name in NOT_IN_A_PASS or not seen.get(name, True):
                continue
            seen[name] = "super" in function.__code__.co_names
            if not f"{base.__module__}.".startswith(LEFT):
                yield function


def _dropouts_of(function: FunctionType, module: nn.Module) -> Iterator[str]:
    loaded = _loaded(function)
    tree = _tree(function) if loaded else None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    called = [(_value(call.func, function), call) for call in calls]
    for one in loaded:
        own = [call for value, call in called if value is one]
        shown = [_shown(call, RATES[one], tree, module) for call in own if tree is not None] or [UNKNOWN]
        yield from (f"{one.__name__} at {rate}" for rate in shown if rate is not None)


@lru_cache(maxsize=4096)
def _loaded(function: FunctionType) -> tuple[Any, ...]:
    """The functions of dropout that its bytecode loads: from a global name, and attributes of modules of Python."""
    found: list[Any] = []
    for code in nested(function.__code__):
        value: Any = None
        for step in dis.get_instructions(code):
            if step.opname in NAMES:
                value = _named(step.argval, function)
            elif step.opname in ATTRIBUTES and isinstance(value, ModuleType):
                value = getattr(value, step.argval, None)
            else:
                value = None
            if _is_dropout(value):
                found.append(value)
    return tuple(dict.fromkeys(found))


def _is_dropout(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and any(value is one for one in RATES)


@lru_cache(maxsize=4096)
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    """Its source; None if there is none, as for code that was typed in."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _value(node: ast.expr, function: FunctionType) -> Any:
    """What an expression such as nn.functional.dropout is; None if it is not a name in a module of Python."""
    if isinstance(node, ast.Name):
        return _named(node.id, function)
    if isinstance(node, ast.Attribute) and isinstance(owner := _value(node.value, function), ModuleType):
        return getattr(owner, node.attr, None)
    return None


def _named(name: str, function: FunctionType) -> Any:
    """What a name that is not local is, if it is known."""
    if name in function.__code__.co_freevars:
        try:
            return (function.__closure__ or ())[function.__code__.co_freevars.index(name)].cell_contents
        except ValueError:  # it has no value yet
            return None
    return function.__globals__.get(name)


def _shown(call: ast.Call, rate: _Rate, tree: ast.FunctionDef, module: nn.Module) -> str | None:
    """The rate of a call; None if it is 0, or that of a module."""
    off = _argument(call, 2, "training") if rate.name == "p" else None
    if isinstance(off, ast.Constant) and off.value is False:
        return None
    node = _argument(call, rate.place, rate.name)
    if node is None:
        given = any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords)
        if given or rate.default is None:
            return UNKNOWN
        return f"{rate.default:g}" if rate.default else None
    return _shown_value(node, tree, module)


def _argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    named = next((one.value for one in call.keywords if one.arg == name), None)
    return call.args[place] if named is None and len(call.args) > place else named


def _shown_value(node: ast.expr, tree: ast.FunctionDef, module: nn.Module) -> str | None:
    values = [node]
    if isinstance(node, ast.IfExp):  # such as self.p if self.training else 0.0
        values = [node.body, node.orelse]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "float":
        values = node.args
    elif isinstance(node, ast.Name):
        values = _assigned(node.id, tree) or values
    if values != [node]:
        shown = (_shown_value(one, tree, module) for one in values)
        return next((one for one in shown if one is not None), None)
    if isinstance(node, ast.Constant):
        return f"{node.value:g}" if isinstance(node.value, int | float) and node.value else None
    return _shown_attribute(ast.unparse(node), module)


def _assigned(name: str, tree: ast.FunctionDef) -> list[ast.expr]:
    """What the code assigns to a local name; nothing if that depends on the name itself."""
    assignments = [one for one in ast.walk(tree) if isinstance(one, ast.Assign)]
    values = [one.value for one in assignments if any(ast.unparse(target) == name for target in one.targets)]
    names = {one.id for value in values for one in ast.walk(value) if isinstance(one, ast.Name)}
    return [] if names - {"self", "float"} else values


def _shown_attribute(path: str, module: nn.Module) -> str | None:
    first, *names = path.split(".")
    if first != "self" or not names or not all(name.isidentifier() for name in names):
        return f"{path}, {UNKNOWN}"
    value: Any = module
    for name in names:
        if isinstance(value, _DropoutNd | nn.Identity) or type(value).__name__.endswith("DropPath"):
            return None
        value = getattr(value, name, None)
    if isinstance(value, int | float):
        return f"{path} = {value:g}" if value else None
    return None if value is None else f"{path}, {UNKNOWN}"
