"""Data sets, as tensors on the device."""

from stn_fast.data.dataset import from_dataset
from stn_fast.data.download import data_root
from stn_fast.data.fingerprint import fingerprint
from stn_fast.data.residency import placed
from stn_fast.data.splits import DataSet, Images, Split, checked, fraction, split_validation

__all__ = [
    "DataSet",
    "Images",
    "Split",
    "checked",
    "data_root",
    "fingerprint",
    "fraction",
    "from_dataset",
    "placed",
    "split_validation",
]
