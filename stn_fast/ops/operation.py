"""One mechanism for every operation that kernels compute: its registration, its gradients, and the way past them.

torch.library.custom_op is what torch.compile, torch.export and the dispatch modes need, and its dispatch in eager mode
takes longer than sampling a batch of hyperparameters does. Where nobody is tracing, the same functions run behind a
plain torch.autograd.Function instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The parameters of a function one by one: a `GatedParameters` is six of them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = get_type_hints(function)
        self.kinds: dict[str, str] = {}
        self.places: dict[str, list[int]] = {}  # of every parameter of the function
        self._pieces: list[tuple[int, bool]] = []  # ends of runs of parameters, and whether they are a GatedParameters
        for name in inspect.signature(function).parameters:
            before, gated = len(self.kinds), hints[name] is GatedParameters
            if gated:
                self.kinds |= {f"{name}_{field}": _KINDS[kind] for field, kind in _OF_PARAMETERS.items()}
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
        """As torch.library takes it."""
        return f"({', '.join(f'{kind} {name}' for name, kind in self.kinds.items())}) -> {returned}"

    def grouped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called with its arguments one by one."""
        if not any(gated for _, gated in self._pieces):
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

    Called with the arguments of `forward`, laid out as that wants them, tensors first, every `GatedParameters` as its
    six tensors (``*parameters``). It has no tangents: where `transforms.in_transform`, compute the definition instead.

    Args:
        name: of the operation; its backward pass is `stn_fast::name_backward`.
        forward: computes the outputs, a tensor or a tuple of them. Its annotations become the schema.
        outputs: their names.
        fake: like `forward`, on shapes alone.
        backward: takes by name what it needs: ``d_`` and the name of an output for its gradient, annotated as `Tensor |
            None` where it may be missing; names of outputs and of parameters of `forward`; ``wanted``, at last, whether
            each gradient is. It returns one for each that may be wanted, None where it isn't. The bias of a
            GatedParameters is None there: no gradient reads it. An operation without `backward` is linear in its first
            tensor, and its own transpose.
        differentiable: names of the parameters that have gradients; by default the first.
        check: called as `forward` before it is in a trace, which may be given other sizes than it was made with.
        promised: computes instead of `forward` in a trace, with results laid out as `fake` promises.
        fake_backward: gives what gradients are like, one for each that may be wanted; by default the inputs themselves.
        kept_if: {name: flag}: an output or input that backward is given only where that argument is true, else None.
        passed: {input: output}: inputs whose gradient is that of an output as it is.
        finish: called with the gradients and what was kept for backward, returns the gradients that autograd gets.
        library: whether torch's own convolutions or products take part, which need a full team of threads.
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
        fake_backward: Callable[..., Any] | None = None,
        kept_if: Mapping[str, str] = MappingProxyType({}),
        passed: Mapping[str, str] = MappingProxyType({}),
        finish: Callable[..., Any] | None = None,
        library: bool = False,
    ) -> None:
        inputs = self._inputs = _Signature(forward)
        self._count = len(inputs.kinds)
        self._compute = _reaching_memory(inputs.grouped(forward), library)
        in_trace = _reaching_memory(inputs.grouped(promised or forward), library)
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
        self._finish = finish
        self._passed = {inputs.places[name][0]: outputs.index(of) for name, of in passed.items()}
        # Places among the inputs, or after them among the outputs, and that of a flag; None for what is left out.
        self._kept_tensors: list[tuple[int | None, int | None]] = []
        self._kept_options: list[int] = []
        self._wanted: list[int] = []
        self._of_outputs: list[int] = []
        self._ignored: list[int] = []
        if backward is None:
            self._transpose()
        else:
            self._gradients(name, backward, outputs, differentiable, kept_if, fake_backward, library)
        self.registered.register_autograd(
            partial(self._differentiate, self._registered_backward), setup_context=self._keep
        )
        self._eager = _eager_function(self)

    def _transpose(self) -> None:
        tensors = self._inputs.tensors
        self._wanted, self._of_outputs = [0], [0]
        self._kept_tensors = [(place, None) for place in range(1, tensors)]
        self._kept_options = list(range(tensors, self._count))

        def transposed(compute: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: [compute(arguments[0].contiguous(), *arguments[1:-1])]

        self._compute_backward = transposed(self._compute)
        self._registered_backward = transposed(self.registered)

    def _gradients(
        self,
        name: str,
        backward: Callable[..., Any],
        outputs: Sequence[str],
        differentiable: Sequence[str],
        kept_if: Mapping[str, str],
        fake_backward: Callable[..., Any] | None,
        library: bool,
    ) -> None:
        inputs, taken = self._inputs, _Signature(backward)
        places = inputs.places | {output: [self._count + i] for i, output in enumerate(outputs)}
        gradients = {f"d_{output}": i for i, output in enumerate(outputs)}
        of_inputs = [place for parameter in differentiable for place in inputs.places[parameter]]
        biases = {place for place, key in enumerate(inputs.kinds) if key.endswith("_bias") and "response" not in key}
        self._wanted = of_inputs
        self._of_outputs = [gradients[key] for key in taken.places if key in gradients]
        self._ignored = [i for i in gradients.values() if i not in self._of_outputs]
        kept = [key for key in taken.places if key not in gradients and key != "wanted"]
        for key in kept:
            flag = inputs.places[kept_if[key]][0] if key in kept_if else None
            for place in places[key]:
                if place < inputs.tensors or place >= self._count:
                    self._kept_tensors.append((None if place in biases else place, flag))
                else:
                    self._kept_options.append(place)
        compute = _reaching_memory(taken.grouped(backward), library)

        def compute_wanted(*arguments: Any) -> list[Tensor]:
            return [gradient for gradient in compute(*arguments) if gradient is not None]

        def compute_apart(*arguments: Any) -> list[Tensor]:
            # Each in memory of its own, as results of a registered operation must be.
            given = {id(argument) for argument in arguments}
            return [g if owns_storage(g) and id(g) not in given else g.clone() for g in compute_wanted(*arguments)]

        def like_inputs(*arguments: Any) -> list[Tensor]:
            at = {place: i for i, (place, _) in enumerate(self._kept_tensors)}
            shift = len(self._of_outputs)

            def like(place: int) -> Tensor:
                if place in biases:  # is not kept, and has a number for every row of the weight before it
                    weight = arguments[shift + at[place - 1]]
                    return weight.new_empty(weight.shape[0])
                return arguments[shift + at[place]]

            return [like(place) for place in of_inputs]

        likes = taken.grouped(fake_backward) if fake_backward is not None else like_inputs

        def fake(*arguments: Any) -> list[Tensor]:
            wanted = arguments[-1]
            return [torch.empty_like(like) for like, w in zip(likes(*arguments), wanted, strict=True) if w]

        self._compute_backward = compute_wanted
        self._registered_backward = torch.library.custom_op(
            f"stn_fast::{name}_backward", compute_apart, mutates_args=(), schema=taken.schema("Tensor[]")
        )
        self._registered_backward.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        """The outputs of `forward`, differentiable."""
        if traced(*arguments[: self._inputs.tensors]):
            return self.registered(*arguments)
        return self._eager(*arguments) if torch.is_grad_enabled() else self._compute(*arguments)

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What computes the outputs and the wanted gradients where nobody traces."""
        return self._compute, self._compute_backward

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What backward is given, in the order in which it takes it."""
        outputs = output if isinstance(output, tuple) else (output,)
        both = (*inputs, *outputs)
        ctx.save_for_backward(
            *[
                None if place is None or (flag is not None and not inputs[flag]) else both[place]
                for place, flag in self._kept_tensors
            ]
        )
        ctx.options = [inputs[place] for place in self._kept_options]
        if self._ignored:
            ctx.mark_non_differentiable(*[outputs[i] for i in self._ignored])
        ctx.set_materialize_grads(False)

    def _differentiate(self, compute: Callable[..., Any], ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        """The gradients of all inputs, by a function that computes those that are wanted."""
        wanted = [ctx.needs_input_grad[place] for place in self._wanted]
        gradients = [d_outputs[i] for i in self._of_outputs]
        found: list[Any] = [None] * self._count
        for place, output in self._passed.items():
            if ctx.needs_input_grad[place]:
                found[place] = d_outputs[output]
        if not any(wanted) or all(gradient is None for gradient in gradients):
            return tuple(found)
        kept = ctx.saved_tensors  # read once: under torch.utils.checkpoint a second look is an error
        computed: Iterable[Any] = compute(*gradients, *kept, *ctx.options, wanted)
        remaining = iter(computed)
        for place, wants in zip(self._wanted, wanted, strict=True):
            if wants:
                found[place] = next(remaining)
        if self._finish is not None:
            found = self._finish(found, kept, ctx.options)
        return tuple(found)


def _reaching_memory(compute: Callable[..., Any], library: bool) -> Callable[..., Any]:
    return reads_memory(any_team(compute) if library else compute)


def _eager_function(operation: Operation) -> Callable[..., Any]:
    """The operation without the dispatcher in between.

    Where a graph of the backward pass itself is needed (create_graph=True), the registered one computes it, which
    differentiates or raises; the plain one would be taken for a constant. So it is where a dispatch mode must see it.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operation._compute(*inputs)
            operation._keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = [gradient for gradient in gradients if gradient is not None]
            must_see = torch.is_grad_enabled() or (len(given) > 0 and traced(*given))
            compute = operation._registered_backward if must_see else operation._compute_backward
            return operation._differentiate(compute, ctx, *gradients)

    return Eager.apply
