"""What a call of the C++ core is passed."""

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for one that is absent."""
    return 0 if tensor is None else tensor.data_ptr()
