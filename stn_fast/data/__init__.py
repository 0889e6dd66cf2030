"""Data sets, as tensors that live on the device."""

from stn_fast.data.splits import DataSet, Split, checked

__all__ = ["DataSet", "Split", "checked"]
