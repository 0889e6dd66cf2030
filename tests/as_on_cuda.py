"""A plugin for `pytest --collect-only -p tests.as_on_cuda`: what a machine with a GPU and nothing built would run.

Collecting touches no device, so it is enough that torch claims to have one, and that the C++ core can't be imported.
"""

import sys

import torch

torch.cuda.is_available = lambda: True
sys.modules["stn_fast._C"] = None
