"""Compiles kernels for real GPUs on a machine without one, in processes of their own.

The processes are new because the tests' own runs Triton's interpreter, where every jit function, nested ones included,
has become an interpreted one, and because they may use another release of Triton than the one installed. Nothing here
imports triton before TRITON_INTERPRET and the path are set.
"""

import contextlib
import hashlib
import importlib
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may use
# Where `make triton-oldest` installs the oldest release that is supported, apart from the installed one.
OLDEST_TRITON = Path(__file__).resolve().parent.parent / "build/triton-oldest"


@dataclass(frozen=True)
class Job:
    """One kernel, as one launch would specialise it."""

    kernel: str  # "module:function"
    label: str
    capability: int
    types: Mapping[str, str]  # of the arguments that aren't constants
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 3
    divisible: frozenset[str] = field(default_factory=frozenset)  # integers known to be multiples of 16
    tensor_cores: bool = False  # whether products must run on them


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int  # bytes
    local: int  # bytes of spilled registers, stored and loaded
    shared: int  # bytes
    tensor_cores: str  # "wgmma", "mma.sync" or ""
    wgmma: int = 0  # how many of these instructions
    messages: tuple[str, ...] = ()  # ptxas on wgmma that it runs one after the other, C75xx
    hash: str = ""  # of the instructions


def read_log(log: str) -> tuple[int, int, int, tuple[str, ...]]:
    """(registers, bytes of stack, bytes of spills, messages C75xx) from what `ptxas -v` says of one kernel."""
    registers, stack, stores, loads = (
        int(re.search(pattern, log).group(1))  # type: ignore[union-attr]
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill stores",
                        r"(\d+) bytes spill loads")
    )  # fmt: skip
    return registers, stack, stores + loads, tuple(re.findall(r"\(?(C75\d\d\b.*)", log))


def hash_of(ptx: str, shared: int = 0) -> str:
    """SHA-256 of the instructions and the bytes of shared memory, without the files and lines that they come from."""
    instructions = ptx.partition("\t.section\t.debug")[0]
    lines = re.sub(r"^\s*(\.loc|\.file|//|\$L__(tmp|func_begin|func_end)).*\n", "", instructions, flags=re.MULTILINE)
    return hashlib.sha256(f"{shared}\n{lines}".encode()).hexdigest()


def compile_job(job: Job) -> Usage | str:
    """What the compiled kernel uses, or the compiler's complaint."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    log = io.StringIO()
    try:
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
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    except Exception as error:  # the test that asks for this job shows it
        return f"{type(error).__name__}: {error}"
    registers, stack, spilled, messages = read_log(log.getvalue())
    ptx = compiled.asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    tensor_cores = "wgmma" if wgmma else "mma.sync" if "mma.sync" in ptx else ""
    return Usage(
        registers,
        stack,
        spilled,
        compiled.metadata.shared,
        tensor_cores,
        wgmma,
        messages,
        hash_of(ptx, compiled.metadata.shared),
    )


def problems(job: Job, usage: Usage | str) -> list[str]:
    """Why a compiled kernel may not ship; empty if it may."""
    if isinstance(usage, str):
        return [usage]
    found = [f"ptxas: {message}" for message in usage.messages]
    if usage.stack or usage.local:
        found.append(f"{usage.stack} B of stack, {usage.local} B spilled")
    if usage.shared > SHARED_MEMORY[job.capability]:
        found.append(f"{usage.shared} B of shared memory, more than {SHARED_MEMORY[job.capability]}")
    wanted = "wgmma" if job.capability == 90 else "mma.sync"
    if job.tensor_cores and usage.tensor_cores != wanted:
        found.append(f"{wanted} expected, {usage.tensor_cores or 'no tensor cores'} used")
    return found


def _prepare(triton_folder: str | None) -> None:
    """Sets up a new process; `triton_folder` holds the Triton to use in place of the installed one."""
    os.environ.update(TRITON_INTERPRET="0", TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
    if triton_folder is None:
        return
    sys.path.insert(0, triton_folder)
    triton = importlib.import_module("triton")
    if not Path(triton.__file__ or "").is_relative_to(triton_folder):
        raise ImportError(f"no Triton in {triton_folder}: {triton.__file__} was imported")


def compile_all(jobs: Iterable[Job], processes: int = 2, triton_folder: Path | None = None) -> list[Usage | str]:
    """What each job uses, or the compiler's complaint, in order; `triton_folder` as `pip install --target` fills it."""
    context = multiprocessing.get_context("spawn")
    folder = None if triton_folder is None else str(triton_folder.resolve())
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare, initargs=(folder,)) as pool:
        return list(pool.map(compile_job, jobs))
