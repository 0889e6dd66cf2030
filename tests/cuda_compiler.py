"""Whether tests of CUDA C++ kernels can run here."""

import pytest
import torch

from stn_fast.kernels.cooperative import unavailable


def require_compiler() -> None:
    """Skips a test where cuda.bindings or NVRTC is missing, but fails it where there is a CUDA device.

    There, nothing else would show that these kernels are never used.
    """
    reason = unavailable()
    if reason is None:
        return
    message = f"cuda.bindings and NVRTC, which compile kernels/cuda, can't be used: {reason}"
    if torch.cuda.is_available():
        pytest.fail(f"{message}. torch's CUDA builds depend on both: see `pip check`", pytrace=False)
    pytest.skip(message, allow_module_level=True)
