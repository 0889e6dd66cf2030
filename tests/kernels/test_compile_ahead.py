"""Every kernel in every shipped configuration is compiled for real GPUs here, on a machine without one, and may ship.

That is: no register spilled, no stack, shared memory that fits, tensor cores in the matrix kernels, and no message of
ptxas that wgmma instructions run one after the other. With the installed Triton each tile and each value of each
constant of a kernel is compiled once; with the oldest supported one, each tile that uses wgmma, and each kernel, for
sm_90; with both, all by `make compile-ahead`.
"""

import os
from dataclasses import replace

import pytest
from compile_ahead import OLDEST_TRITON, SHARED_MEMORY, Job, Usage, compile_all, problems, read_log
from shipped_kernels import FEWER_JOBS, JOBS, TESTED_JOBS

PROCESSES = max(2, (os.cpu_count() or 2) // 2)
KERNELS = sorted({job.kernel for job in JOBS.values()})
RELEASES = {"installed": (None, TESTED_JOBS), "oldest": (OLDEST_TRITON, FEWER_JOBS)}


def skip_if_missing(folder):
    if folder is not None and not folder.is_dir():
        pytest.skip(f"no Triton in {folder}: `make triton-oldest` installs it")


@pytest.fixture(scope="module", params=RELEASES)
def compiled(request):
    """Each job, planted ones included, with what it uses or the compiler's complaint."""
    folder, jobs = RELEASES[request.param]
    skip_if_missing(folder)
    every = [*jobs.values(), *(job for job, _ in PLANTED)]
    return list(zip(every, compile_all(every, PROCESSES, folder), strict=True))


@pytest.fixture(scope="module")
def rejected(compiled):
    """What is wrong with each configuration that may not ship, by kernel and label."""
    by_kernel = {kernel: {} for kernel in KERNELS}
    for job, usage in compiled[: -len(PLANTED)]:
        if found := problems(job, usage):
            by_kernel[job.kernel][job.label] = found
    return by_kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_of_a_kernel_may_ship(kernel, rejected):
    assert not rejected[kernel]


def test_every_value_of_a_constant_is_compiled():
    def values(jobs):
        return {(job.kernel, name, value) for job in jobs.values() for name, value in job.constants.items()}

    assert values(TESTED_JOBS) == values(JOBS)


def test_the_oldest_triton_compiles_every_kernel():
    assert {job.kernel for job in FEWER_JOBS.values()} == {job.kernel for job in JOBS.values()}


def test_kernels_with_float32_products_are_compiled_in_each_precision():
    found = {}
    for job in JOBS.values():
        if "PRECISION" in job.constants:
            found.setdefault(job.kernel, set()).add(job.constants["PRECISION"])
    assert "stn_fast.kernels.gates:gate_tables_kernel" in found
    assert all(precisions == {"ieee", "tf32"} for precisions in found.values())


FORWARD = JOBS["fwd-sm90-bf16-ieee-128x128x64-w8-s3-aligned"]
DX = JOBS["bwd_dx-sm90-bf16-ieee-128x128x64-w8-s3-aligned"]
PLANTED = [
    (replace(FORWARD, label="spills", num_warps=4), "of stack"),
    (replace(DX, label="too large", constants={**DX.constants, "BLOCK_N": 256}), "of shared memory, more than"),
    (replace(DX, label="no tensor cores", types={**DX.types, "p_dy": "*fp32", "p_weight": "*fp32",
        "p_response_weight": "*fp32", "p_dx": "*fp32"}, constants={**DX.constants, "BLOCK_M": 32, "BLOCK_N": 32,
        "BLOCK_K": 16}), "wgmma expected"),
    (Job("planted_kernels:serialised_kernel", "serialised", 90, {"p_a": "*bf16", "p_b": "*bf16", "p_out": "*fp32",
        "K": "i32"}, {"BLOCK": 64}, 4, divisible=frozenset("K")), "ptxas: C75"),
    (Job("planted_kernels:missing_kernel", "missing", 90, {}, {}, 4), "AttributeError"),
]  # fmt: skip


def test_planted_configurations_are_rejected(compiled):
    for (_, complaint), (job, usage) in zip(PLANTED, compiled[-len(PLANTED) :], strict=True):
        assert any(complaint in problem for problem in problems(job, usage)), (job.label, usage)


def test_another_triton_than_the_one_asked_for_is_not_used(tmp_path):
    with pytest.raises(Exception, match=r"terminated abruptly|no Triton in"):
        compile_all([FORWARD], 1, tmp_path)


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, {stack} bytes cumulative stack size
"""
C7510 = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function 'k'\n"
)


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (LOG.format(stack=16, stores=0, loads=0), "16 B of stack, 0 B spilled"),
        (LOG.format(stack=0, stores=8, loads=12), "0 B of stack, 20 B spilled"),
        (LOG.format(stack=0, stores=0, loads=0) + C7510, "C7510) Potential Performance Loss"),
        (LOG.format(stack=0, stores=0, loads=0), None),
    ],
    ids=["stack", "spill", "serialised", "neither"],
)
def test_what_ptxas_says_is_read(log, complaint):
    registers, stack, spilled, messages = read_log(log)
    assert registers == 168
    found = problems(FORWARD, Usage(registers, stack, spilled, SHARED_MEMORY[90], "wgmma", 8, messages))
    assert found == [] if complaint is None else complaint in found[0]
