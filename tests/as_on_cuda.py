"""A plugin for `pytest --collect-only -p as_on_cuda`: the tests that a machine with a CUDA device would run.

Collecting touches no device, so it is enough that torch claims to have one.
"""

import torch

torch.cuda.is_available = lambda: True
