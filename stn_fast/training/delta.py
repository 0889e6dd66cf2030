"""Δ-STN: self-tuning with a response that is centred at the current hyperparameters, and linearised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stn_fast.checks import switch
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.training.batches import Batch
from stn_fast.training.linearised import Linearised
from stn_fast.training.methods import Kind, SelfTuning
from stn_fast.training.optimizers import (
    MakeOptimizer,
    default_optimizer,
    learning_rate,
    set_learning_rate,
)
from stn_fast.training.parameters import hold_parameters, is_response
from stn_fast.training.precision import float32_products
from stn_fast.training.task import Objective

GENERAL = 1 << 62  # added to the seed of general steps, so that they and response steps draw different numbers


class DeltaSelfTuning(SelfTuning):
    """Δ-STN (Bae and Grosse, NeurIPS 2020, algorithm 1): a better conditioned `SelfTuning`.

    The response input is h = λ̃ − λ, so W and b are the weights at the current hyperparameters λ. ``train_step``
    consists of two steps on the same batch:

    1. the general step, ``general_step``: h = 0, regularisation at λ; updates everything but the response;
    2. the response step, ``response_step``: the outputs f(0) + J·(λ̃ − λ), regularisation at λ̃, whose draws are
       independent of those of the general step; updates the response parameters of gated layers only.

    Penalties of the training objective that read the weights themselves, such as weight decay, are not linearised. The
    validation step is that of `SelfTuning` with the same h, also not linearised. Evaluations use W and b.

    In response steps the training objective is called with the model wrapped in `Linearised`. It must call it to get
    all that depends on the weights, and compute the loss itself: a loss that the model returned would be linearised
    too, and have no minimum. Parameters of the response are recognised by their names, those of this package's gated
    layers. Running statistics are those of general steps.

    Args:
        model, space, training_objective, validation_objective, and options: as for `SelfTuning`. The ``response`` of
            every hyperparameter is taken to be "shifted".
        response_optimizer: makes the optimizer of the response parameters; by default as ``optimizer`` makes that of
            the other ones.
        linearize: if False, response steps use f(λ̃ − λ) instead of its linearisation.

    Raises:
        ValueError: an argument is out of range, or the model has no gated layers.
        RuntimeError: in the first response step, something cuts the tangents between a gated layer and the loss.
    """

    training_kinds = ("general_step", "response_step")

    def __init__(
        self,
        model: nn.Module,
        space: HyperparameterSpace,
        training_objective: Objective,
        validation_objective: Objective,
        *,
        optimizer: MakeOptimizer = default_optimizer,
        response_optimizer: MakeOptimizer | None = None,
        linearize: bool = True,
        **options: Any,
    ) -> None:
        named = list(model.named_parameters())
        self._response = [parameter for name, parameter in named if is_response(name)]
        self._general = [parameter for name, parameter in named if not is_response(name)]
        if not self._response:
            raise ValueError("DeltaSelfTuning: the model has no gated layers, such as HyperLinear")
        self.linearize = switch("DeltaSelfTuning", "linearize", linearize)
        self.response_optimizer = (response_optimizer or optimizer)(self._response)
        shifted = space.with_response("shifted")
        super().__init__(model, shifted, training_objective, validation_objective, optimizer=optimizer, **options)
        rates = learning_rate(self.response_optimizer), self.learning_rate
        self._rate_of_response = rates[0] / rates[1] if rates[1] else 1.0
        self._linearised: Any = Linearised(model) if linearize else model
        self._checks_reach = True
        self._reached: set[str] = set()  # parameters that had a gradient in the last general step

    def _add_training_kinds(self) -> None:
        self._add_kind("general_step", Kind(self._general_step, self.optimizer))
        self._add_kind("response_step", Kind(self._response_step, self.response_optimizer, "response"))

    def _trained(self) -> list[nn.Parameter]:
        return self._general

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"linearize": self.linearize}

    @property
    def center(self) -> Tensor:
        return self.location.detach()

    def unperturbed(self, batch_size: int) -> HyperBatch:
        return self.space.at(self.location.detach(), batch_size=batch_size, centred=True)

    def train_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """A general step, and a response step on the same batch; arguments and errors as of `Method.train_step`.

        Returns the loss of the general step. If that one is not finite, and so is skipped, there is no response step.
        On CUDA, where the host does not wait for it, each of the two is skipped, and counted, by itself.
        """
        batch, again = self.views(batch)
        loss, self.response_loss = self.general_step(batch, step, first_example=first_example), None
        if self.took_step:
            self.response_loss = self.response_step(again, step, first_example=first_example)
        return loss

    @property
    def training_passes(self) -> int:
        """One of the general step, and those of the response step."""
        return 1 + super().training_passes

    def views(self, batch: Any) -> list[Batch]:
        """The batch, and one like it for the response step, whose state is not carried on."""
        (batch,) = super().views(batch)
        return [batch, batch.like(batch.parts())]

    def general_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """The first part of ``train_step``."""
        return self._begun("general_step", self._general_step, batch, step, first_example)

    def response_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """The second part of ``train_step``; returns the loss of the linearised outputs.

        A batch with a state, such as a window of a text, must be a copy of its own, as from ``views``.
        """
        return self._begun("response_step", self._response_step, batch, step, first_example)

    def _begun(self, call: str, body: Any, batch: Any, step: int | Tensor, first_example: int) -> Tensor:
        batch = self.begin(call, batch)
        with float32_products(self.precision):
            return body(batch, step, first_example)

    def _general_step(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        where = batch, step, first_example
        with hold_parameters(self._response):
            loss = self._minimise(
                "training", self.model, self.optimizer, where, lambda draw: [self._general_hyper(draw)]
            )
        self._note_reach()
        return loss

    def _general_hyper(self, draw: dict[str, Any]) -> HyperBatch:
        """The hyperparameters of a general step."""
        return self.space.at(self.location.detach(), **draw | {"seed": self.seed ^ GENERAL}, centred=True)

    def _response_step(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        where = batch, step, first_example
        # Running statistics are those of general steps.
        with self._buffers.unchanged(), hold_parameters(self._general):
            loss = self._minimise("response", self._linearised, self.response_optimizer, where, self._training_hypers)
        self._check_reach()
        return loss

    def _note_reach(self) -> None:
        """Records which parameters have a gradient, until the first response step has been checked."""
        if self._checks_reach:
            self._reached = {name for name, one in self.model.named_parameters() if one.grad is not None}

    def _check_reach(self) -> None:
        """Raises RuntimeError if gradients reached weights in the general step before, but not their response."""
        if not self._checks_reach:
            return
        for name, parameter in self.model.named_parameters():
            if "response_weight" not in name or name.replace("response_weight", "weight") not in self._reached:
                continue
            if parameter.grad is None and parameter.requires_grad:
                raise RuntimeError(
                    f"the response step gives no gradient to {name}, although the loss depends on its layer: something "
                    "between that layer and the loss cuts tangents, such as an operation registered by "
                    "torch.library.custom_op, a detach, or checkpointing with use_reentrant=True. Use linearize=False "
                    "if it must stay"
                )
        self._checks_reach = False

    @property
    def learning_rate(self) -> float:
        """Learning rate of the weights; setting it scales that of the response by the same factor."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        set_learning_rate(self.response_optimizer, rate * self._rate_of_response)

    def _optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return super()._optimizers_by_name() | {"response_optimizer": self.response_optimizer}
