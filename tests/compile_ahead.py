"""Compiles kernels for real GPUs on a machine without one, in processes of their own.

The processes are new because the tests' own runs Triton's interpreter, where every jit function, nested ones included,
has become an interpreted one. Nothing here imports triton before TRITON_INTERPRET is set.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may use


@dataclass(frozen=True)
class Job:
    """One kernel, as one launch would specialise it."""

    kernel: str  # "module:function"
    label: str
    capability: int
    types: dict[str, str]  # of the arguments that aren't constants
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 3
    divisible: frozenset[str] = field(default_factory=frozenset)  # integers known to be multiples of 16


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int
    shared: int
    tensor_cores: str  # "wgmma", "mma.sync" or ""


def compile_job(job: Job) -> Usage | str:
    """What the compiled kernel uses, or the compiler's complaint."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    names = function.arg_names
    signature = {n: "constexpr" if n in job.constants else job.types[n] for n in names}
    multiples = {n for n in names if signature[n].startswith("*")} | (job.divisible & job.types.keys())
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in job.constants.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in multiples if signature[n] != "constexpr"},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    except Exception as error:  # the test that asks for this job shows it
        return f"{type(error).__name__}: {error}"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    ptx = compiled.asm["ptx"]
    tensor_cores = "wgmma" if "wgmma.mma_async" in ptx else "mma.sync" if "mma.sync" in ptx else ""
    return Usage(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared, tensor_cores)


def _compile_for_real() -> None:
    os.environ["TRITON_INTERPRET"] = "0"


def compile_all(jobs: list[Job], processes: int = 2) -> list[Usage | str]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_compile_for_real) as pool:
        return list(pool.map(compile_job, jobs))
