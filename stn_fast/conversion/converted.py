"""Converted: the base class of converted modules, and the registration of their response parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.conversion.in_model import InModel
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import start_gate, start_response
from stn_fast.ops.gates import Factors, GatedParameters, response_input


class Converted(InModel, nn.Module):
    """Base class of converted modules, which use the hyperparameters of their model.

    `convert` changes the class of a module to a subclass of this one and of the module's own class. The subclass
    overrides `forward`, which is called with the arguments of the plain module, and `folded` if it has gated
    parameters.

    Attributes:
        decay_name: the hyperparameter that decays its weights, if the model was converted with a `WeightDecay`; None if
            they are not decayed.
        response_bounds: by the endings of parameter names, the bounds of a random R: as published, it is uniform in
            ± bound, as W is in the gated layer of this kind.
        _tuned_attribute: name of the plain module's attribute that is the hyperparameter `name`, such as "p"; None for
            none. Others are those of `InModel`.
    """

    decay_name: str | None
    _tuned_attribute: str | None = None
    response_bounds: Mapping[str, float] = MappingProxyType({})

    @property
    def hyper(self) -> HyperBatch | None:
        """The HyperBatch in use; None in evaluation mode outside `using`, for the current hyperparameters.

        Raises:
            RuntimeError: none is in use, in training mode, or another thread uses one.
        """
        hyper = self.tuned.in_use()
        if hyper is None and self.training:
            raise self.no_batch_in_use()
        return hyper

    def response(self, like: Tensor) -> Tensor:
        """The response input: (B, n), or (n,) if all examples share it; in the dtype and on the device of `like`."""
        hyper = self.hyper
        return self.tuned.response().to(like) if hyper is None else response_input(hyper, like)

    def gating(self, like: Tensor) -> HyperBatch | Tensor:
        """What gated operations take: a HyperBatch that is centred, which they make use of, or else `response`."""
        hyper = self.hyper
        return hyper if hyper is not None and hyper.centred else self.response(like)

    def gated_linear(self, x: Tensor, parameters: GatedParameters, given: HyperBatch | Tensor) -> Tensor:
        """The gated linear map of x; each example may have several rows."""
        rows = x if is_shared(given) else self.split(x, len(given))
        projection = parameters.response_projection
        y = functional.gated_linear(rows, *parameters[:6], given, self.example_dim, response_projection=projection)
        return y.view(*x.shape[:-1], y.shape[-1])

    def response_of_rows(self, x: Tensor, like: Tensor) -> Tensor:
        """The response input (N, n) of each row of x (N, ...), or (n,)."""
        h = self.response(like)
        rows = 1 if is_shared(h) else self.rows_per_example(x, 0, len(h))
        return h if rows == 1 else h.repeat_interleave(rows, 0)

    def gating_of_rows(self, x: Tensor, like: Tensor, dim: int = 0) -> HyperBatch | Tensor:
        """`gating` of each row of x, which dimension `dim` counts."""
        given = self.gating(like)
        if is_shared(given):
            return given
        rows = self.rows_per_example(x, dim, len(given))
        if rows == 1:
            return given
        return given.repeat_interleave(rows, 0) if isinstance(given, Tensor) else given.repeated(rows)

    def folded(self, response: Tensor) -> dict[str, Tensor]:
        """The parameters, by name, with which the plain module equals this one at one response input (n,)."""
        return {}

    def separate(self) -> None:
        """Gives the weights memory of their own, if they share it with the response."""

    def revert(self, values: dict[str, float]) -> None:
        """Changes this module back to a plain one; `values` are the hyperparameters that it is folded at."""
        self.separate()
        attribute, hyperparameter = self._tuned_attribute, self.__dict__.get("name")
        for name in [name for name in self._parameters if name.startswith(RESPONSE)]:
            del self._parameters[name]
        plain = self.plain_class
        for name in ATTRIBUTES:
            self.__dict__.pop(name, None)
        self.__class__ = plain  # type: ignore[assignment]
        if attribute is not None and hyperparameter in values:
            setattr(self, attribute, values[hyperparameter])


def is_shared(given: HyperBatch | Tensor) -> bool:
    """Whether it is one response input (n,) for all examples, instead of a row for each."""
    return isinstance(given, Tensor) and given.ndim == 1


RESPONSE = tuple(GatedParameters._fields[2:])
# What a conversion stores on a module besides parameters.
ATTRIBUTES = (
    "tuned", "dotted_name", "plain_class", "example_dim", "num_hyperparameters", "response_rank", "name", "stream",
    "streams", "decay_name", "response_bounds",
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
    bound: float = 1.0,
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
    module.__dict__.setdefault("response_bounds", {})[ending] = bound
    module.__dict__["response_rank"] = None if factors is None else factors[0][1]
