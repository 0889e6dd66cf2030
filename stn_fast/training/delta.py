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
from stn_fast.training.optimizers import MakeOptimizer, default_optimizer, make_capturable, set_learning_rate
from stn_fast.training.parameters import hold_parameters, is_gate, is_response
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

    The training objective is called with a model that `Linearised` wraps in response steps, and must get everything
    that depends on the hyperparameters by calling it.

    Args:
        model, space, training_objective, validation_objective, and options: as for `SelfTuning`. The ``response`` of
            every hyperparameter is taken to be "shifted".
        response_optimizer: makes the optimizer of the response parameters.
        linearize: if False, response steps use f(λ̃ − λ) instead of its linearisation.
        zero_gates: whether to set all gates to 0 first, as published. False keeps a response that has been trained.

    Raises:
        ValueError: an argument is out of range, or the model has no gated layers.
    """

    training_kinds = ("general_step", "response_step")

    def __init__(
        self,
        model: nn.Module,
        space: HyperparameterSpace,
        training_objective: Objective,
        validation_objective: Objective,
        *,
        response_optimizer: MakeOptimizer = default_optimizer,
        linearize: bool = True,
        zero_gates: bool = True,
        **options: Any,
    ) -> None:
        named = list(model.named_parameters())
        self._response = [parameter for name, parameter in named if is_response(name)]
        self._general = [parameter for name, parameter in named if not is_response(name)]
        if not self._response:
            raise ValueError("DeltaSelfTuning: the model has no gated layers, such as HyperLinear")
        self.linearize = switch("DeltaSelfTuning", "linearize", linearize)
        if switch("DeltaSelfTuning", "zero_gates", zero_gates):
            with torch.no_grad():
                for name, parameter in named:
                    if is_gate(name):
                        parameter.zero_()
        super().__init__(model, space.with_response("shifted"), training_objective, validation_objective, **options)
        self.response_optimizer = response_optimizer(self._response)
        del self.kinds["train_step"]
        self._add_kind("general_step", Kind(self._general_step, self.optimizer))
        self._add_kind("response_step", Kind(self._response_step, self.response_optimizer))
        self._linearised = Linearised(model) if linearize else model

    def _trained(self) -> list[nn.Parameter]:
        return self._general

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"linearize": self.linearize}

    @property
    def _center(self) -> Tensor:
        return self.location.detach()

    def unperturbed(self, batch_size: int) -> HyperBatch:
        return self.space.at(self.location.detach(), batch_size=batch_size, centred=True)

    def train_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """A general step, and a response step on the same batch; arguments and errors as of `Method.train_step`.

        Returns the loss of the general step. If that one is not finite, and so is skipped, there is no response step.
        On CUDA, where the host does not wait for it, each of the two is skipped, and counted, by itself.
        """
        skipped, (batch, again) = self.skipped_steps, self.views(batch)
        loss = self.general_step(batch, step, first_example=first_example)
        if self.skipped_steps == skipped:
            self.response_step(again, step, first_example=first_example)
        return loss

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
        draw = self._draw(batch, step, first_example) | {"seed": self.seed ^ GENERAL}
        hyper = self.space.at(self.location.detach(), **draw, centred=True)
        with hold_parameters(self._response):
            return self._minimise("training", self.model, self.optimizer, batch, hyper)

    def _response_step(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        hyper = self._training_hyper(self._draw(batch, step, first_example))
        with hold_parameters(self._general):
            return self._minimise("response", self._linearised, self.response_optimizer, batch, hyper)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the weights; setting it scales that of the response by the same factor."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        factor = rate / super().learning_rate
        for group in self.response_optimizer.param_groups:
            set_learning_rate_of = float(group["lr"]) * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(set_learning_rate_of)
            else:
                group["lr"] = set_learning_rate_of
        set_learning_rate(self.optimizer, rate)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "response_optimizer": self.response_optimizer.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.response_optimizer.load_state_dict(state["response_optimizer"])
        make_capturable(self.response_optimizer)
