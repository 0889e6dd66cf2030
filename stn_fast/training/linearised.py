"""A model linearised in its hyperparameters, for the response step of Δ-STN."""

from __future__ import annotations

from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from stn_fast.conversion.folding import tuned_in
from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.tangents import split


class Linearised:
    """f(0) + J·h instead of f(h): the model's outputs at h = 0, and their first-order change along its response.

    It is called with the arguments of the model, a HyperBatch with the response h among them; a converted model, inside
    ``using`` of one. Other attributes and methods are those of the model, which are not linearised. Every floating
    point tensor in the outputs is linearised, 16-bit ones in float32; so the model must return logits, and the loss
    must be computed from them outside of it.

    Gated layers, dropout and noise of this package have tangents of their own. Other modules need operations that
    torch can differentiate in forward mode; compiled ones are run eagerly, and attention by torch's plain
    implementation. Gradients flow through the tangents to the response parameters. The weights must not require a
    gradient.

    Raises:
        RuntimeError: a module has no tangent, and the message names it; none of the outputs depends on h; or an output
            is a single number, as a loss is.
        TypeError: the outputs hold something else than tensors, numbers and text in tuples, lists, dicts and named
            tuples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # a copy asks for it before it is there
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with (
            forward_ad.dual_level(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH),
        ):  # fmt: skip
            try:
                outputs = self._outputs(*arguments, **named)
            except (NotImplementedError, RuntimeError) as error:
                if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                    raise
                raise RuntimeError(self._without_tangent(error.__traceback__, error)) from error
            leaves, structure = pytree.tree_flatten(outputs)
            parts = [split(leaf) if isinstance(leaf, Tensor) else (_constant(leaf), None) for leaf in leaves]
        if all(tangent is None for _, tangent in parts):
            raise RuntimeError(
                "no output of the model changes with the hyperparameters: it needs gated layers, such as HyperLinear, "
                "called with the HyperBatch; and an operation registered by torch.library.custom_op has no tangent"
            )
        return pytree.tree_unflatten([_sum(primal, tangent) for primal, tangent in parts], structure)

    def _outputs(self, *arguments: Any, **named: Any) -> Any:
        """Those of the model, with their tangents."""
        arguments, named = pytree.tree_map_only(
            HyperBatch, HyperBatch.linearised, (arguments, named), is_leaf=lambda one: isinstance(one, HyperBatch)
        )
        tuned = tuned_in(self._model)
        with nullcontext() if tuned is None or tuned.current is None else tuned.using(tuned.current.linearised()):
            return self._model(*arguments, **named)

    def _without_tangent(self, trace: TracebackType | None, error: Exception) -> str:
        """The message of an error that was raised inside of a module: it names the innermost one."""
        names = {id(module): name for name, module in self._model.named_modules()}
        inside = "the model"
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if names.get(id(module)):
                inside = f"{names[id(module)]!r} ({type(module).__name__})"
            trace = trace.tb_next
        first = str(error).splitlines()[0]
        return (
            f"{inside} has no tangent, which the linearised response needs: {first} Write it with operations that have "
            "one, give its autograd.Function a jvp, or use linearize=False"
        )


def _constant(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, int | float | str):
        return leaf
    raise TypeError(
        f"the model returns a {type(leaf).__name__}, whose tensors can't be linearised: return tensors in tuples, "
        "lists, dicts or named tuples, or register the class with torch.utils._pytree"
    )


def _sum(primal: Any, tangent: Tensor | None) -> Any:
    if tangent is None:
        return primal
    if primal.ndim == 0:
        raise RuntimeError(
            "the model returns a single number that depends on the hyperparameters, such as a loss, which has no "
            "minimum once it is linearised: return logits, and compute the loss from them outside of the model"
        )
    return primal.to(torch.promote_types(primal.dtype, torch.float32)) + tangent
