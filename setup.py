"""Builds stn_fast._C from csrc/ and installs kernels/ as stn_fast.kernels; metadata is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()

# OpenMP shares torch's thread pool on Linux, whose torch wheels carry libgomp. Elsewhere the core runs on one thread.
openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []

core = Pybind11Extension(
    "stn_fast._C",
    sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", *openmp],
    extra_link_args=openmp,
)

setup(
    packages=sorted({*find_packages(include=["stn_fast", "stn_fast.*"]), "stn_fast.kernels"}),
    package_dir={"stn_fast.kernels": "kernels"},
    package_data={"stn_fast": ["py.typed", "*.pyi"], "stn_fast.kernels": ["cuda/*", "tuned/*.json"]},
    ext_modules=[core],
)
