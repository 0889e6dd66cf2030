"""How much arithmetic the library products behind a call are."""

from collections.abc import Callable
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop


def _in_place(total: object, left: object, right: object, *_: object, **__: object) -> int:
    return addmm_flop(total, left, right)


def flops_of(function: Callable[[], object]) -> int:
    """Twice the multiply-adds of torch's products, also of those inside of an operation.

    A dispatch mode sees registered operations alone; so the operations are told that there is none.
    """
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place})
    with mock.patch("stn_fast.ops.transforms.is_in_torch_dispatch_mode", return_value=False), counting as counter:
        function()
    return counter.get_total_flops()
