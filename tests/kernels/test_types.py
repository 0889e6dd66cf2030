"""Functions of kernels/ that the host calls have types, so that the type checker sees how ops/ calls them."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def compiled(function):
    """Whether Triton compiles it."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_functions_that_the_host_calls_have_types(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and not compiled(function):
            of = function.args
            given = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
            untyped = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped, (function.name, untyped)
            assert function.returns is not None, function.name


def test_the_type_checker_finds_the_kernels_where_python_does():
    assert (KERNELS.parent / "stn_fast" / "kernels").resolve() == KERNELS
