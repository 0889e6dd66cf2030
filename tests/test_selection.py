"""`make test-gpu` reaches every kernel: the tests that it selects use each module that defines one."""

import ast
import importlib
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGES = ("stn_fast.kernels", "stn_fast.ops")


@cache
def tree(file):
    return ast.parse(file.read_text())


def file_of(module):
    """The file of a module among kernels and operations, None of any other."""
    package, _, name = module.rpartition(".")
    if package not in PACKAGES:
        return None
    file = Path(importlib.import_module(package).__file__).with_name(f"{name}.py")
    return file if file.exists() else None


def imports(file, package):
    """The modules of kernels and operations that a file names in its imports, inside of functions too."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if file_of(name))


def reached(files):
    """All modules that some files import, directly or not."""
    found, waiting = set(), {name for file in files for name in imports(file, "")}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(imports(file_of(name), name.rpartition(".")[0])) - found
    return found


def takes_backend(file):
    """Whether some test of a file is run on every backend, and so selected."""
    functions = (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef))
    return any("backend" in [arg.arg for arg in f.args.args] for f in functions if f.name.startswith("test_"))


def kernels():
    """(module, function) of everything that is launched."""
    folder = Path(importlib.import_module("stn_fast.kernels").__file__).parent
    for file in sorted(folder.glob("*.py")):
        for node in tree(file).body:
            is_kernel = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            if is_kernel and ast.unparse(node.decorator_list[0]).startswith("triton.jit"):
                yield f"stn_fast.kernels.{file.stem}", node.name


def test_every_kernel_is_reached_by_tests_that_run_on_a_gpu(request):
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    own = [file for file in TESTS.glob("kernels/test_*.py") if file.stem not in conftest._WITHOUT_DEVICE]
    files = own + [file for file in TESTS.glob("ops/test_*.py") if takes_backend(file)]
    modules = reached(files)
    found = list(kernels())
    assert ("stn_fast.kernels.weight_decay", "decay_moments_kernel") in found
    assert [kernel for kernel in found if kernel[0] not in modules] == []
