"""Registration and gradients of every operation with kernels, and a bypass of the dispatcher in eager mode.

torch.compile, torch.export and dispatch modes need torch.library.custom_op, but its dispatch in eager mode takes longer
than sampling a batch of hyperparameters. So without tracing, a plain torch.autograd.Function calls the same functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters
from stn_fast.ops.memory import owns_storage, reads_memory
from stn_fast.ops.openmp import any_team
from stn_fast.ops.transforms import traced

_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
    float: "float",
    list[int]: "SymInt[]",
    list[bool]: "bool[]",
    list[float]: "float[]",
}
_OF_PARAMETERS = get_type_hints(GatedParameters)


class _Signature:
    """The parameters of a function, with each `GatedParameters` replaced by its fields."""

    def __init__(self, function: Callable[..., Any], absent: Collection[str] = ()) -> None:
        """The fields `absent` of a GatedParameters may be None."""
        hints = get_type_hints(function)
        self.kinds: dict[str, str] = {}
        self.places: dict[str, list[int]] = {}  # positions of every parameter of the function
        self.gated: set[str] = set()  # which of them are a GatedParameters
        self._pieces: list[tuple[int, bool]] = []  # ends of runs of parameters, and whether they are a GatedParameters
        for name in inspect.signature(function).parameters:
            before, gated = len(self.kinds), hints[name] is GatedParameters
            if gated:
                self.gated.add(name)
                for field, kind in _OF_PARAMETERS.items():
                    self.kinds[f"{name}_{field}"] = "Tensor?" if field in absent else _KINDS[kind]
            else:
                self.kinds[name] = _KINDS[hints[name]]
            self.places[name] = list(range(before, len(self.kinds)))
            if self._pieces and not gated and not self._pieces[-1][1]:
                self._pieces.pop()
            self._pieces.append((len(self.kinds), gated))
        of_tensors = [kind.startswith("Tensor") for kind in self.kinds.values()]
        self.tensors = sum(of_tensors)
        if not all(of_tensors[: self.tensors]):
            raise TypeError(f"{function} must take its tensors first")

    def schema(self, returned: str) -> str:
        """The schema for torch.library."""
        return f"({', '.join(f'{kind} {name}' for name, kind in self.kinds.items())}) -> {returned}"

    def grouped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A version of `function` that takes the fields of each GatedParameters as separate arguments."""
        if not self.gated:
            return function
        pieces = self._pieces

        def run(*flat: Any) -> Any:
            grouped: list[Any] = []
            start = 0
            for stop, gated in pieces:
                if gated:
                    grouped.append(GatedParameters._make(flat[start:stop]))
                else:
                    grouped += flat[start:stop]
                start = stop
            return function(*grouped)

        return run


class Operation:
    """An operation on tensors, its gradients, and its registration as `stn_fast::name`.

    It is called with the arguments of `forward`: tensors first, with the strides that `forward` expects, and each
    `GatedParameters` as separate tensors (``*parameters``). It has no tangents: if `transforms.in_transform`, compute
    the definition instead.

    Args:
        name: name of the operation; its backward pass is `stn_fast::name_backward`.
        forward: computes the outputs, a tensor or a tuple of them. Its annotations become the schema.
        outputs: names of the outputs.
        fake: like `forward`, but computes only shapes.
        backward: takes what it needs by name: ``d_`` and the name of an output for its gradient, annotated as `Tensor |
            None` if it may be missing; names of outputs and of parameters of `forward`; and last ``wanted``, which
            tells for each gradient whether it is needed. It returns the gradients of all tensors of `differentiable`,
            with any value for those that are not needed. An operation without `backward` is linear in its first tensor,
            and its own transpose.
        differentiable: names of the parameters that have gradients.
        check: called with the arguments of `forward` when a trace is run, because sizes may differ from those traced.
        promised: replaces `forward` in a trace; its results must have the strides of those of `fake`.
        unread: fields of a `GatedParameters` that `backward` doesn't read. They are not saved, and are None there.
        fake_backward: returns a tensor like each gradient; by default the inputs themselves.
        kept_if: {name: flag}: an output or input that backward gets only if the argument `flag` is true, else None.
        passed: {input: output}: inputs whose gradient is equal to that of an output.
        finish: called with the gradients and what was saved for backward; returns the gradients for autograd.
        library: whether it uses torch's own convolutions or products, which need a full team of OpenMP threads.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        *,
        outputs: Sequence[str],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        differentiable: Sequence[str] = (),
        check: Callable[..., None] | None = None,
        promised: Callable[..., Any] | None = None,
        unread: Collection[str] = ("bias",),
        fake_backward: Callable[..., Any] | None = None,
        kept_if: Mapping[str, str] = MappingProxyType({}),
        passed: Mapping[str, str] = MappingProxyType({}),
        finish: Callable[..., Any] | None = None,
        library: bool = False,
    ) -> None:
        inputs = self._inputs = _Signature(forward)
        self._name, self._count = name, len(inputs.kinds)
        self._compute = _reaching_memory(inputs.grouped(forward), library)
        in_trace = self._compute if promised is None else _reaching_memory(inputs.grouped(promised), library)
        checks = inputs.grouped(check) if check is not None else None

        def run(*arguments: Any) -> Any:
            if checks is not None:
                checks(*arguments)
            return in_trace(*arguments)

        returned = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
        self.registered = torch.library.custom_op(
            f"stn_fast::{name}", run, mutates_args=(), schema=inputs.schema(returned)
        )
        self.registered.register_fake(inputs.grouped(fake))
        # Positions: inputs, then outputs, then a None for what backward doesn't get.
        self._places = inputs.places | {output: [self._count + i] for i, output in enumerate(outputs)}
        self._none = self._count + len(outputs)
        self._passed = [(inputs.places[key][0], outputs.index(of)) for key, of in passed.items()]
        self._finish = finish
        if backward is None:
            self._transpose()
        else:
            self._differentiate_by(backward, outputs, differentiable, unread, fake_backward, library)
        self._flagged = [
            (self._kept.index(self._places[key][0]), inputs.places[flag][0]) for key, flag in kept_if.items()
        ]
        self.registered.register_autograd(
            partial(self._backward, self._registered_backward, False), setup_context=self._keep
        )
        self._eager = _eager_function(self)

    def _transpose(self) -> None:
        tensors = self._inputs.tensors
        self._wanted, self._of_outputs, self._ignored = [0], [0], list[int]()
        self._kept, self._options = list(range(1, tensors)), list(range(tensors, self._count))

        def transposed(compute: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: [compute(arguments[0].contiguous(), *arguments[1:-1])]

        self._compute_backward = transposed(self._compute)
        self._registered_backward = transposed(self.registered)

    def _differentiate_by(
        self,
        backward: Callable[..., Any],
        outputs: Sequence[str],
        differentiable: Sequence[str],
        unread: Collection[str],
        fake_backward: Callable[..., Any] | None,
        library: bool,
    ) -> None:
        inputs, taken = self._inputs, _Signature(backward, unread)
        gradients = {f"d_{output}": i for i, output in enumerate(outputs)}
        *named, last = taken.places
        unknown = [key for key in named if key not in gradients and key not in self._places]
        if unknown or last != "wanted":
            raise TypeError(f"{self._name}: backward takes {unknown or last}, which nothing of forward is called")
        self._wanted = [place for parameter in differentiable for place in inputs.places[parameter]]
        self._of_outputs = [gradients[key] for key in named if key in gradients]
        self._ignored = [i for i in gradients.values() if i not in self._of_outputs]
        self._kept, self._options = list[int](), list[int]()
        for key in named:
            if key in gradients:
                continue
            for position, place in enumerate(self._places[key]):
                left_out = key in inputs.gated and GatedParameters._fields[position] in unread
                is_tensor = place < inputs.tensors or place >= self._count
                (self._kept if is_tensor else self._options).append(self._none if left_out else place)
        compute = _reaching_memory(taken.grouped(backward), library)

        def compute_apart(*arguments: Any) -> list[Tensor]:
            # Results of a registered operation must not share memory.
            given = {id(argument) for argument in arguments}
            wanted = zip(compute(*arguments), arguments[-1], strict=True)
            return [g if owns_storage(g) and id(g) not in given else g.clone() for g, wants in wanted if wants]

        def like_inputs(*arguments: Any) -> list[Tensor]:
            kept = dict(zip(self._kept, arguments[len(self._of_outputs) :], strict=False))

            def bias(place: int) -> Tensor:
                """A bias is not saved, so its shape comes from the weight before it."""
                weight = kept[place - 1]
                return weight.new_empty(weight.shape[0])

            return [kept[place] if place in kept else bias(place) for place in self._wanted]

        likes = taken.grouped(fake_backward) if fake_backward is not None else like_inputs

        def fake(*arguments: Any) -> list[Tensor]:
            wanted = zip(likes(*arguments), arguments[-1], strict=True)
            return [torch.empty_like(like) for like, wants in wanted if wants]

        self._compute_backward = compute
        self._registered_backward = torch.library.custom_op(
            f"stn_fast::{self._name}_backward", compute_apart, mutates_args=(), schema=taken.schema("Tensor[]")
        )
        self._registered_backward.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        """The outputs of `forward`, differentiable."""
        if traced(*arguments[: self._inputs.tensors]):
            return self.registered(*arguments)
        return self._eager(*arguments) if torch.is_grad_enabled() else self._compute(*arguments)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves the arguments of backward, in its order."""
        outputs = output if isinstance(output, tuple) else (output,)
        everything = (*inputs, *outputs, None)
        kept = [everything[place] for place in self._kept]
        for position, flag in self._flagged:
            if not inputs[flag]:
                kept[position] = None
        ctx.save_for_backward(*kept)
        ctx.options = [inputs[place] for place in self._options]
        if self._ignored:
            ctx.mark_non_differentiable(*[outputs[i] for i in self._ignored])
        ctx.set_materialize_grads(False)

    def _backward(
        self, compute: Callable[..., Any], of_all: bool, ctx: Any, *d_outputs: Tensor | None
    ) -> tuple[Any, ...]:
        """The gradients of all inputs; `compute` returns all entries if `of_all`, else only those needed."""
        needed = ctx.needs_input_grad
        found: list[Any] = [None] * self._count
        for place, output in self._passed:
            found[place] = d_outputs[output] if needed[place] else None
        wanted = [needed[place] for place in self._wanted]
        gradients = [d_outputs[i] for i in self._of_outputs]
        if True not in wanted or all(gradient is None for gradient in gradients):
            return tuple(found)
        kept = ctx.saved_tensors  # read only once: reading twice is an error under torch.utils.checkpoint
        computed = compute(*gradients, *kept, *ctx.options, wanted)
        places = self._wanted if of_all else [place for place in self._wanted if needed[place]]
        for place, gradient in zip(places, computed, strict=True):
            if needed[place]:
                found[place] = gradient
        return tuple(found if self._finish is None else self._finish(found, kept, ctx.options))


def _reaching_memory(compute: Callable[..., Any], library: bool) -> Callable[..., Any]:
    return reads_memory(any_team(compute) if library else compute)


def _eager_function(operation: Operation) -> Callable[..., Any]:
    """The operation without the dispatcher in between.

    Where a graph of the backward pass itself is needed (create_graph=True), the registered one computes it, which
    differentiates or raises; the plain one would be taken for a constant. So it is where a dispatch mode must see it.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operation._compute(*inputs)
        output = tuple(_writable(y, inputs) for y in output) if isinstance(output, tuple) else _writable(output, inputs)
        operation._keep(ctx, inputs, output)
        return output

    def backward(ctx: Any, *gradients: Any) -> Any:
        given = [gradient for gradient in gradients if gradient is not None]
        if torch.is_grad_enabled() or (given and traced(*given)):
            return operation._backward(operation._registered_backward, False, ctx, *gradients)
        return operation._backward(operation._compute_backward, True, ctx, *gradients)

    # Its name is that of the node in a graph.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    make: Any = type(torch.autograd.Function)
    return make(operation._name, (torch.autograd.Function,), methods).apply


def _writable(output: Any, inputs: Sequence[Any]) -> Any:
    """The output, not as a view of a temporary tensor: autograd would refuse to change it in place, as ReLU may do."""
    if not isinstance(output, Tensor) or not output._is_view():
        return output
    base = output._base
    if any(base is one or base is one._base for one in inputs if isinstance(one, Tensor)):
        return output
    return torch.ops.aten._unsafe_view(output, output.shape)
