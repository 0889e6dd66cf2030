"""kernels/cuda is compiled here for real GPUs, by NVRTC and on a machine without one, for the sizes it is made for.

No stack means no spilled register; the products must use tensor cores. With -s the registers of each are shown.
"""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import triton
from compile_ahead import SHARED_MEMORY, Usage
from cuda_compiler import require_compiler

from stn_fast.kernels.cooperative import compile_kernels
from stn_fast.kernels.gated_lstm_persistent import SOURCE, Limits, plan_backward, plan_forward

require_compiler()

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MULTIPROCESSORS = {80: 108, 90: 132}
RESERVED = {80: 0, 90: 1024}  # bytes that the compiler adds to a block's own
# B, H: the layers of the benchmarks, sizes of one and odd ones, and the most that registers are planned for.
SIZES = [(40, 650), (80, 1150), (20, 200), (1, 1), (17, 13), (33, 331), (128, 650), (128, 512)]


def expressions(capability: int) -> dict[str, int]:
    """Every kernel of every size that fits, with the shared memory that its launch asks for."""
    limits = Limits(MULTIPROCESSORS[capability], SHARED_MEMORY[capability])
    found = {}
    for batch, hidden in SIZES:
        forward, backward = plan_forward(batch, hidden, limits), plan_backward(batch, hidden, limits)
        if isinstance(forward, str) or isinstance(backward, str):
            continue
        # Nothing kept; everything.
        for flags in ("false, false, false", "true, true, true"):
            found[f"stn_fast::gated_lstm_forward<{forward.shape}, {flags}>"] = forward.shared_bytes
        found[f"stn_fast::gated_lstm_backward<{backward.shape}>"] = backward.shared_bytes
    return found


@cache
def usages(capability: int, folder: Path) -> dict[str, Usage]:
    """What each kernel uses, from one compilation of all."""
    wanted = expressions(capability)
    compiled = compile_kernels(SOURCE, tuple(wanted), divmod(capability, 10))
    cubin = folder / f"sm_{capability}.cubin"
    cubin.write_bytes(compiled.code)
    report, code = (
        subprocess.run([TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    used = dict(re.findall(r"Function (\S+):\s*(REG.*)", report))
    bodies = dict(re.findall(r"Function : (\S+)(.*?)(?=\n\s*Function :|\Z)", code, flags=re.DOTALL))
    found = {}
    for expression, shared in wanted.items():
        name = compiled.symbols[expression].decode()
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", used[name])}
        assert "BPT.TRAP" in bodies[name], f"{expression} would wait for a lost block for ever"
        tensor_cores = "mma.sync" if "HMMA.16816.F32.BF16" in bodies[name] else ""
        found[expression] = Usage(
            numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"] + shared, tensor_cores
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_fits_and_uses_tensor_cores(capability, folder):
    for expression, usage in usages(capability, folder).items():
        print(f"sm_{capability} {expression}: {usage}")
        assert usage.stack == usage.local == 0, f"{expression} spills"
        assert usage.registers <= 255
        assert usage.shared <= SHARED_MEMORY[capability] + RESERVED[capability], expression
        assert usage.tensor_cores == "mma.sync", expression


def test_the_layers_of_the_benchmarks_are_among_them():
    assert {f"Shape<{hidden}," in " ".join(expressions(90)) for hidden in (650, 1150, 200)} == {True}
    assert "Shape<650," in " ".join(expressions(80))
