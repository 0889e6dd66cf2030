"""CUDA graphs without CUDA: operations are recorded as they are called, and called again on the same memory.

What a real graph keeps of its capture is kept here too: the tensors that operations read and wrote, and every number
that the host gave them. So a step that is replayed on a stale batch, number, learning rate or state shows.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_EMPTY = {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.empty_strided.default, _ATEN.new_empty.default}


class RecordedGraphs:
    """In place of `stn_fast.training.capture.CudaGraphs`."""

    def __init__(self):
        self.captured = 0

    @contextmanager
    def on_capture_stream(self):
        yield

    def capture(self, function):
        self.captured += 1
        with torch.random.fork_rng([]), _Recording() as recording:
            result = function()
        recording.take_back()
        return result, recording.replay


def _tensors(values):
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _written(func, args, kwargs):
    """The tensors that an operation writes to, of those that it is given."""
    if func is _ATEN.native_batch_norm.default:  # its schema does not say so
        return _tensors(args[3:5])
    given = zip(func._schema.arguments, args, strict=False)
    named = [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    writes = [value for argument, value in [*given, *named] if argument.alias_info and argument.alias_info.is_write]
    return _tensors(writes)


def _is_view(func):
    return any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._calls, self._before, self._made = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if id(tensor) not in self._before:
                self._before[id(tensor)] = tensor, tensor.detach().clone()
        outcome = func(*args, **kwargs)
        if not _is_view(func) and func not in _EMPTY:
            self._calls.append((func, args, kwargs, outcome, torch.is_grad_enabled()))
            memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            self._made += [one for one in _tensors(outcome) if one.untyped_storage().data_ptr() not in memory]
        return outcome

    @torch.no_grad()
    def take_back(self):
        """As if nothing had been computed: what was written to is as before, and what was made holds nothing."""
        for tensor in self._made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        for tensor, before in self._before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, outcome, grad_mode in self._calls:
            # oneDNN's LSTM asks whether a gradient may be wanted, below autograd, which has been recorded already.
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad_mode):
                again = func(*args, **kwargs)
            for kept, new in zip(_tensors(outcome), _tensors(again), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
