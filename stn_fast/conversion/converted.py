"""Converted: the base class of converted modules, and the registration of their response parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import start_gate, start_response
from stn_fast.ops.gates import Factors, GatedParameters, response_input


class Converted(nn.Module):
    """Base class of converted modules, which use the hyperparameters of their model.

    `convert` changes the class of a module to a subclass of this one and of the module's own class. The subclass
    overrides `forward`, which is called with the arguments of the plain module, and `folded` if it has gated
    parameters.

    Attributes:
        tuned: the model's `TunedHyperparameters`; not a child of this module.
        dotted_name: name of this module in the model.
        plain_class: its class before the conversion.
        example_dim: the dimension of its input that counts examples.
        decay_name: the hyperparameter that decays its weights, if the model was converted with a `WeightDecay`; None if
            they are not decayed.
    """

    tuned: TunedHyperparameters
    dotted_name: str
    plain_class: type[nn.Module]
    example_dim: int
    decay_name: str | None

    @property
    def hyper(self) -> HyperBatch | None:
        """The HyperBatch in use; None in evaluation mode outside `using`, for the current hyperparameters.

        Raises:
            RuntimeError: none is in use, in training mode.
        """
        if self.tuned.current is None and self.training:
            raise no_batch_in_use(self)
        return self.tuned.current

    def response(self, like: Tensor) -> Tensor:
        """The response input: (B, n), or (n,) if all examples share it; in the dtype and on the device of `like`."""
        hyper = self.hyper
        return self.tuned.response().to(like) if hyper is None else response_input(hyper, like)

    def gating(self, like: Tensor) -> HyperBatch | Tensor:
        """What gated operations take: a HyperBatch that is centred, which they make use of, or else `response`."""
        hyper = self.hyper
        return hyper if hyper is not None and hyper.centred else self.response(like)

    def rows_per_example(self, x: Tensor, dim: int, examples: int) -> int:
        """k, if dimension `dim` of x counts k consecutive rows for each of the examples.

        Raises:
            ValueError: it is not a multiple of the examples.
        """
        rows = x.shape[dim] if dim < x.ndim else 0
        if rows == examples:
            return 1
        if rows < examples or rows % examples:
            raise self.wrong_rows(x, dim, examples)
        return rows // examples

    def wrong_rows(self, x: Tensor, dim: int, examples: int) -> ValueError:
        """The error that dimension `dim` of x does not count the examples."""
        name = self.dotted_name
        return ValueError(
            f"{name or 'the model'} ({self.plain_class.__name__}): dimension {dim} of its input {tuple(x.shape)} must "
            f"count the {examples} examples of the HyperBatch, or several consecutive rows of each. If another "
            f"dimension counts them, declare it: convert(model, example_dims={{{name!r}: 1}}). If none does, leave the "
            f"module out: convert(model, exclude={name!r})"
        )

    def takes_any_examples(self, shape: Sequence[int]) -> bool:
        """Whether an input of this shape is of no example in particular, so that each gets a result."""
        return False

    def split(self, x: Tensor, examples: int) -> Tensor:
        """x with its example dimension split into (B, k), if each example has several rows."""
        rows = self.rows_per_example(x, self.example_dim, examples)
        return x if rows == 1 else x.unflatten(self.example_dim, (examples, rows))

    def response_of_rows(self, x: Tensor, like: Tensor) -> Tensor:
        """The response input (N, n) of each row of x (N, ...), or (n,)."""
        h = self.response(like)
        return h if is_shared(h) else h.repeat_interleave(self.rows_per_example(x, 0, len(h)), 0)

    def gating_of_rows(self, x: Tensor, like: Tensor, dim: int = 0) -> HyperBatch | Tensor:
        """`gating` of each row of x, which dimension `dim` counts."""
        given = self.gating(like)
        if is_shared(given):
            return given
        rows = self.rows_per_example(x, dim, len(given))
        return given.repeat_interleave(rows, 0) if isinstance(given, Tensor) else given.repeated(rows)

    def folded(self, response: Tensor) -> dict[str, Tensor]:
        """The parameters, by name, with which the plain module equals this one at one response input (n,)."""
        return {}

    def revert(self, values: dict[str, float]) -> None:
        """Changes this module back to a plain one; `values` are the hyperparameters that it is folded at."""
        for name in [name for name in self._parameters if name.startswith(RESPONSE)]:
            del self._parameters[name]
        plain = self.plain_class
        for name in ATTRIBUTES:
            self.__dict__.pop(name, None)
        self.__class__ = plain  # type: ignore[assignment]


def no_batch_in_use(module: Any) -> RuntimeError:
    """The error that a module with `dotted_name` and `plain_class` is called in training mode outside `using`."""
    return RuntimeError(
        f"{module.dotted_name or 'the model'} ({module.plain_class.__name__}) is in training mode, in which every "
        "example has its own hyperparameters: train with stn.SelfTuner, call the model inside `with "
        "model.tuned_hyperparameters.using(hyper):`, or call model.eval() to use the current hyperparameters"
    )


def is_shared(given: HyperBatch | Tensor) -> bool:
    """Whether it is one response input (n,) for all examples, instead of a row for each."""
    return isinstance(given, Tensor) and given.ndim == 1


RESPONSE = tuple(GatedParameters._fields[2:])
# What a conversion stores on a module besides parameters.
ATTRIBUTES = (
    "tuned", "dotted_name", "plain_class", "example_dim", "num_hyperparameters", "response_rank", "name", "stream",
    "streams", "decay_name",
)  # fmt: skip


def change_class(
    module: nn.Module, converted: type[Converted], tuned: TunedHyperparameters, name: str, example_dim: int = 0
) -> None:
    """Makes ``module`` a ``converted`` one. `tuned` is stored as a plain attribute, so that it is no child of it."""
    attributes: dict[str, Any] = dict(tuned=tuned, dotted_name=name, plain_class=type(module), example_dim=example_dim)
    module.__dict__.update(attributes)
    module.__class__ = converted


def register_response(
    module: nn.Module,
    n: int,
    *,
    outputs: int,
    factors: Factors | None = None,
    bound: float = 0.0,
    ending: str = "",
    plain: tuple[Tensor, Tensor | None] | None = None,
) -> None:
    """Registers R, Gw, and r and Gb if there is a bias; with factors, A and B in place of R.

    They start as in `GatedLayer`, and are of the dtype of the weight and on its device. All names end with ``ending``,
    such as "_ih_l0". ``plain`` are weight and bias; by default, the parameters with these names and the ending.
    """
    weight, bias = plain or (getattr(module, f"weight{ending}"), getattr(module, f"bias{ending}", None))
    shapes = GatedParameters.shapes(weight.shape, outputs, n, factors)
    for name, shape in zip(RESPONSE, shapes[2:], strict=False):
        if "bias" in name and bias is None:
            continue
        if name == "response_bias" and bias is not None:
            shape = bias.shape
        parameter = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        if "gate" in name:
            start_gate(parameter)
        module.register_parameter(f"{name}{ending}", parameter)
    if factors is None:
        module.register_parameter(f"response_projection{ending}", None)
    start_response(getattr(module, f"response_weight{ending}"), getattr(module, f"response_projection{ending}"), bound)
    module.__dict__["num_hyperparameters"] = n
    module.__dict__["response_rank"] = None if factors is None else factors[0][1]
