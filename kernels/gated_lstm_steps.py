"""A gated LSTM over a sequence step by step: one library product and one kernel each, launched or replayed.

A pass works in fixed buffers: the weights [W; R] side by side, the state, one step's products, and a table of where the
tensors of the sequence are. So all launches of a pass can be captured in a CUDA graph whose arguments never change:
`replay` keeps one for every size that it meets, with buffers of its own. What a sequence leaves behind (gates, states,
gradients) never lies in such a buffer: it's safe with autograd, and costs the graph no memory. A graph is never made
while a caller captures one: `launch` allocates from the caller's pool then, waits for nothing, and becomes part of it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from .gated_lstm_cell import (
    STEP_CONFIG,
    gated_lstm_addresses_kernel,
    gated_lstm_bwd_step_kernel,
    gated_lstm_fwd_step_kernel,
)

# Graphs that are kept, with buffers little larger than [W; R] each; the one used longest ago makes place for another.
MAX_GRAPHS = 16


class Sizes(NamedTuple):
    """T, B, H."""

    steps: int
    batch: int
    hidden: int

    def order(self, reverse: bool) -> range:
        return range(self.steps - 1, -1, -1) if reverse else range(self.steps)


class ForwardInputs(NamedTuple):
    """gates (T, B, 4H) hold x's share; shift is None without bias. cells and response are None where not kept."""

    gates: Tensor
    h_0: Tensor
    c_0: Tensor
    weight: Tensor
    response_weight: Tensor
    scale: Tensor
    shift: Tensor | None
    y: Tensor
    cells: Tensor | None
    response: Tensor | None


class BackwardInputs(NamedTuple):
    """gates are the activated ones; dc (B, H) is the gradient of the last cell state; d_gates is to be written."""

    dy: Tensor
    gates: Tensor
    cells: Tensor
    c_0: Tensor
    weight: Tensor
    response_weight: Tensor
    scale: Tensor
    dc: Tensor | None
    d_gates: Tensor


class Pass(Protocol):
    """One direction of a sequence in fixed buffers."""

    def fill(self, inputs: Any) -> None:
        """Brings a sequence in; only queues work."""

    def launch(self) -> None:
        """Queues all steps. Allocates nothing and waits for nothing."""

    def results(self) -> tuple[Tensor | None, ...]:
        """What is left in the buffers, in memory of its own."""


def _options(sizes: Sizes) -> tuple[tuple[int], dict[str, object]]:
    grid = (triton.cdiv(sizes.batch * sizes.hidden, STEP_CONFIG.kwargs["BLOCK"]),)
    return grid, STEP_CONFIG.kwargs | {"num_warps": STEP_CONFIG.num_warps}


class Forward:
    """Writes y and what is kept, from x's share of the gates. The cell state is in float32 from step to step."""

    def __init__(self, inputs: ForwardInputs, reverse: bool) -> None:
        steps, batch, wide = inputs.gates.shape
        self.sizes, self.reverse = Sizes(steps, batch, wide // 4), reverse
        self.save, self.save_response = inputs.cells is not None, inputs.response is not None
        new = inputs.gates.new_empty
        self.addresses = new(5, dtype=torch.int64)
        self.weights = new(2 * wide, wide // 4)
        self.products, self.scale = new(batch, 2 * wide), new(batch, wide)
        self.shift = None if inputs.shift is None else new(batch, wide)
        self.h, self.cell = new(batch, wide // 4), new(batch, wide // 4, dtype=torch.float32)

    def fill(self, inputs: ForwardInputs) -> None:
        y = inputs.y
        kept = (y if tensor is None else tensor for tensor in (inputs.cells, inputs.response))
        gated_lstm_addresses_kernel[(1,)](self.addresses, inputs.gates, y, *kept, y)
        torch.cat([inputs.weight, inputs.response_weight], out=self.weights)
        self.scale.copy_(inputs.scale)
        if self.shift is not None and inputs.shift is not None:
            self.shift.copy_(inputs.shift)
        self.h.copy_(inputs.h_0)
        self.cell.copy_(inputs.c_0)

    def launch(self) -> None:
        grid, options = _options(self.sizes)
        for t in self.sizes.order(self.reverse):
            torch.mm(self.h, self.weights.T, out=self.products)
            gated_lstm_fwd_step_kernel[grid](
                self.addresses, self.products, self.scale, self.shift, self.cell, self.h, t, *self.sizes[1:],
                HAS_SHIFT=self.shift is not None, SAVE=self.save, SAVE_RESPONSE=self.save_response, **options,
            )  # fmt: skip

    def results(self) -> tuple[Tensor]:
        """(c_n,)"""
        return (self.cell.to(self.h.dtype, copy=True),)


class Backward:
    """Writes d_gates of all steps. The gradient of the cell state is in float32 from step to step."""

    def __init__(self, inputs: BackwardInputs, reverse: bool, want_h_0: bool) -> None:
        steps, batch, wide = inputs.gates.shape
        self.sizes, self.reverse, self.want_h_0 = Sizes(steps, batch, wide // 4), reverse, want_h_0
        new = inputs.gates.new_empty
        self.addresses = new(5, dtype=torch.int64)
        self.weights = new(2 * wide, wide // 4)
        self.scale, self.d_both = new(batch, wide), new(batch, 2 * wide)
        self.dh, self.dc = new(batch, wide // 4), new(batch, wide // 4, dtype=torch.float32)

    def fill(self, inputs: BackwardInputs) -> None:
        dy, gates, cells, c_0, *_ = inputs
        gated_lstm_addresses_kernel[(1,)](self.addresses, dy, gates, cells, c_0, inputs.d_gates)
        torch.cat([inputs.weight, inputs.response_weight], out=self.weights)
        self.scale.copy_(inputs.scale)
        self.dh.zero_()
        if inputs.dc is None:
            self.dc.zero_()
        else:
            self.dc.copy_(inputs.dc)

    def launch(self) -> None:
        grid, options = _options(self.sizes)
        order = self.sizes.order(self.reverse)
        for position in range(self.sizes.steps - 1, -1, -1):
            before = order[position - 1] if position else -1
            gated_lstm_bwd_step_kernel[grid](
                self.addresses, self.dh, self.dc, self.scale, self.d_both, order[position], before,
                *self.sizes[1:], **options,
            )  # fmt: skip
            if position or self.want_h_0:
                torch.mm(self.d_both, self.weights, out=self.dh)

    def results(self) -> tuple[Tensor | None, Tensor]:
        """(dh_0 where wanted, dc_0 in float32)"""
        return self.dh.clone() if self.want_h_0 else None, self.dc.clone()


class _Captured(NamedTuple):
    prepared: Pass
    graph: torch.cuda.CUDAGraph
    device: torch.device


_captured: OrderedDict[Hashable, _Captured] = OrderedDict()
# A library product keeps its scratch memory by the stream it was captured on, so every stream has another to capture
# on: graphs that run one after the other may share that memory, others may not.
_capture_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}
# Held from filling the buffers until the results are taken out, all of which only queues work: of two threads on one
# stream, one would fill them for the other.
_lock = threading.Lock()


def _library_settings() -> tuple[object, ...]:
    """What a captured product would keep, whatever is set afterwards."""
    matmul = torch.backends.cuda.matmul
    reduced = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    return (matmul.fp32_precision, *reduced)


def run(prepare: Callable[[], Pass], inputs: Any) -> tuple[Tensor | None, ...]:
    """The results of a pass, launch by launch."""
    prepared = prepare()
    prepared.fill(inputs)
    prepared.launch()
    return prepared.results()


def replay(
    key: tuple[Hashable, ...], device: torch.device, prepare: Callable[[], Pass], inputs: Any
) -> tuple[Tensor | None, ...]:
    """The results of a pass, run as one CUDA graph.

    `key` says all that doesn't change from call to call: what `prepare` makes. The first call of a key runs the pass
    launch by launch, which also compiles its kernels, and captures it for the later ones.
    """
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    key = (*key, *stream, *_library_settings())
    with _lock:
        known = _captured.get(key)
        if known is not None:
            _captured.move_to_end(key)
            known.prepared.fill(inputs)
            known.graph.replay()
            return known.prepared.results()
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare()
            prepared.fill(inputs)
            prepared.launch()
            results = prepared.results()
            graph = torch.cuda.CUDAGraph()
            if stream not in _capture_streams:
                _capture_streams[stream] = torch.cuda.Stream(device)
            # Other threads, of a data loader say, may allocate meanwhile.
            with torch.cuda.graph(graph, stream=_capture_streams[stream], capture_error_mode="thread_local"):
                prepared.launch()
        _captured[key] = _Captured(prepared, graph, device)
        if len(_captured) > MAX_GRAPHS:
            _, oldest = _captured.popitem(last=False)
            torch.cuda.synchronize(oldest.device)  # it may be running
        return results
