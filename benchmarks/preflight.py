"""Measures this machine's GPU: versions, copy bandwidth, rates of matrix products.

    python -m benchmarks.preflight --json machine.json

The figures of `benchmarks.summary` are to be read in relation to these measured ceilings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stn_fast.command_line import run_command
from stn_fast.kernels.cooperative import unavailable
from stn_fast.values import to_json

PACKAGES = (
    *("torch", "triton", "numpy", "cuda-bindings", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis"),
    *("pillow", "pyyaml", "safetensors", "scikit-learn", "tqdm", "matplotlib"),
)
COPIED_BYTES = 2**31
PRODUCT_SIZE = 8192
PRECISIONS = {"bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee")}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part, "missing" where one isn't there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def device() -> dict[str, Any]:
    """The current CUDA device, as the driver describes it."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "shared_memory_bytes": properties.shared_memory_per_block_optin,
        "torch_built_for": torch.version.cuda,
    }


def seconds_on_device(call: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a call between two events, after three calls that aren't counted."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy on the device, of numbers drawn at random."""
    source = torch.randn(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / seconds_on_device(lambda: target.copy_(source))


def product_rate(precision: str) -> float:
    """Operations a second of torch's product of two square matrices of numbers drawn at random."""
    dtype, float32 = PRECISIONS[precision]
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = float32
    try:
        return 2 * PRODUCT_SIZE**3 / seconds_on_device(lambda: torch.mm(a, b))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0, or 2 where torch sees no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"versions": versions(), "cuda_cpp": unavailable() or "compiles"}
    for name, version in found["versions"].items():
        print(f"{name:<16}{version}")
    print(f"CUDA C++ kernels: {found['cuda_cpp']}")
    if not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 2
    found |= device()
    print(", ".join(f"{key} {found[key]}" for key in device()))
    found["copy_bytes_per_second"] = copy_bandwidth()
    print(f"copy, read and written: {found['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    found["product_operations_per_second"] = {}
    for precision in PRECISIONS:
        rate = found["product_operations_per_second"][precision] = product_rate(precision)
        print(f"product {PRODUCT_SIZE}^3 {precision}: {rate / 1e12:.0f} TFLOP/s")
    if options.json:
        options.json.write_text(to_json(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
