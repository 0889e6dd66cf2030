"""A model linearised in its hyperparameters, for the response step of Δ-STN."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.tangents import split


class Linearised(nn.Module):
    """f(0) + J·h instead of f(h): the model's outputs at h = 0, and their first-order change along its response.

    It is called as the model is, with a HyperBatch among the arguments, and has the model's attributes. Every floating
    point tensor in the outputs is linearised. Gated layers, dropout and noise of this package have tangents of their
    own; other modules need operations that torch can differentiate in forward mode.

    Gradients with respect to the response parameters flow through the tangents. No gradient must be asked for the
    weights, as h = 0 leaves f(0) without any of the response.

    Raises:
        RuntimeError: a module has no tangent, and the message names it; or none of the outputs depends on h.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with forward_ad.dual_level():
            arguments, named = pytree.tree_map_only(
                HyperBatch, HyperBatch.linearised, (arguments, named), is_leaf=lambda one: isinstance(one, HyperBatch)
            )
            try:
                outputs = self.model(*arguments, **named)
            except (NotImplementedError, RuntimeError) as error:
                if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                    raise
                raise RuntimeError(self._without_tangent(error.__traceback__, error)) from error
            leaves, structure = pytree.tree_flatten(outputs)
            tangents = [split(leaf)[1] if isinstance(leaf, Tensor) else None for leaf in leaves]
            if all(tangent is None for tangent in tangents):
                raise RuntimeError(
                    "no output of the model changes with the hyperparameters: it needs gated layers, such as "
                    "HyperLinear, called with the HyperBatch; and an operation registered by torch.library.custom_op "
                    "has no tangent"
                )
            sums = [
                leaf if tangent is None else split(leaf)[0] + tangent
                for leaf, tangent in zip(leaves, tangents, strict=True)
            ]
        return pytree.tree_unflatten(sums, structure)

    def _without_tangent(self, trace: TracebackType | None, error: Exception) -> str:
        """The message of an error that was raised inside of a module: it names the innermost one."""
        names = {id(module): name for name, module in self.model.named_modules()}
        inside = "the model"
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if id(module) in names:
                inside = f"{names[id(module)]!r} ({type(module).__name__})" if names[id(module)] else inside
            trace = trace.tb_next
        first = str(error).splitlines()[0]
        return (
            f"{inside} has no tangent, which the linearised response needs: {first} Write it with operations that have "
            "one, give its autograd.Function a jvp, or use linearize=False"
        )
