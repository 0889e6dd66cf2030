"""Passes: training and validation of a converted model in loops that call backward, zero_grad and step themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stn_fast.checks import switch, whole_number
from stn_fast.hyperparameters import HyperBatch
from stn_fast.training.converted import ConvertedDeltaSelfTuning, ConvertedSelfTuning
from stn_fast.training.distributed import CHECK_EVERY
from stn_fast.training.pass_rows import PassRows


class Record(NamedTuple):
    """A validation step: the number of training steps before it, its loss, and the location after it."""

    step: int
    loss: Tensor
    location: Tensor


class Passes:
    """The passes of `SelfTuner`, and the numbers of its draws and steps.

    Attributes:
        draws: how many numbers of random draws have been used; each pass and each step has its own.
        trained: training steps so far, those of an optimizer after passes among them.
        validated: updates of the hyperparameters so far.
    """

    def __init__(self, method: ConvertedSelfTuning, check_rows: bool) -> None:
        self.method = method
        self._rows = PassRows(method.model, check_rows, method.in_any_process)
        self.draws = self.trained = self.validated = 0
        self._records: list[Record] = []
        self._inside = ""  # the pass that is open
        self._of_weights_only = self._responded = False  # whether passes `training` came before any `responding`
        self._called = False  # whether the model has been called in the open training pass
        self._in_use: HyperBatch | None = None  # the hyperparameters of an open training pass
        self._to_repeat: tuple[int, int] | None = None  # number and batch size of the last draw, until it is repeated
        # Since the last step of the optimizer: whether there was a training pass, and h of the perturbed ones.
        self._passed, self._responses = False, list[Tensor]()
        self._of_weights, self._of_response = (
            _called(method.kinds[kind].optimizer) for kind in (method.training_kinds[0], method.training_kinds[-1])
        )
        for optimizer in {self._of_weights, self._of_response}:
            optimizer.register_step_pre_hook(self._before_step)

    @contextmanager
    def training(self, batch_size: int, *, antithetic: bool = False) -> Iterator[None]:
        """A pass of a training step: inside, each example of the model's input has its own perturbed hyperparameters.

            with tuner.training(len(x)):
                loss = F.cross_entropy(model(x), y) + tuner.penalty()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        Run the backward pass inside, too. Gradient accumulation enters it for each part of the batch, which gets a draw
        of its own; clipping, schedulers and a GradScaler are used as in any other loop, and the `clip`, `precision` and
        `skip_nonfinite` of the tuner do not apply. Inside, the model is in training mode; afterwards, also after an
        error, it is in the mode before.

        When the optimizer steps, the gradients of the response are first divided as in `train_step`, see `SelfTuning`:
        after the clipping, and only if the step is taken. A hook of the optimizer does this, so no call can be
        forgotten, and it is an error to step inside. Its ``step`` must not be given a closure that enters a pass, and
        ``zero_grad`` must set gradients to None, as it does by default.

        Args:
            batch_size: number of examples.
            antithetic: whether to repeat the draw of the pass before with the opposite perturbation λ − σε, as the
                second pass of `train_step` does; halve both losses for the same gradient. Running statistics are those
                of the pass before. It needs the same examples.

        Raises:
            ValueError: `batch_size` is not an int >= 1, or not that of the draw to repeat; in the first pass, a
                hyperparameter was not used, the model is called with another number of examples, or `check_rows`
                refuses how it calls its layers.
            RuntimeError: another pass is open, gradients are switched off, or there is no draw to repeat.
        """
        if antithetic and isinstance(self.method, ConvertedDeltaSelfTuning):
            raise ValueError("training: this pass of delta-stn is not perturbed: give antithetic=True to responding")
        with (
            self._training("training", self.method.training_pass, batch_size, antithetic),
            self._rows.checked("training", batch_size),
        ):
            yield
        self._passed = True
        self._of_weights_only = not self._responded

    @contextmanager
    def responding(self, batch_size: int, *, antithetic: bool = False) -> Iterator[Callable[..., Any]]:
        """The pass of a response step of Δ-STN, which gives gradients to the response only.

        With ``method="delta-stn"``, the pass `training` gives gradients to the weights only, at the current
        hyperparameters. The step of the response follows, with the optimizer of the response:

            with tuner.responding(len(x)) as linearised:
                loss = F.cross_entropy(linearised(x), y) + tuner.penalty()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        It gives what to call in place of the model: its outputs are linearised in the perturbation, see `Linearised`.
        ``zero_grad`` must set gradients to None, as it does by default, so that an optimizer of both steps the
        response only. Arguments and errors are those of `training`; an error, too, if something cuts the tangents.

        Raises:
            RuntimeError: the method is not delta-stn.
        """
        method = self.method
        if not isinstance(method, ConvertedDeltaSelfTuning):
            raise RuntimeError('responding: only SelfTuner(..., method="delta-stn") has passes of the response')
        with self._training("responding", method.response_pass, batch_size, antithetic):
            yield method.linearised
        self._of_weights_only, self._responded = False, True

    @contextmanager
    def _training(
        self, call: str, opened: Callable[..., AbstractContextManager[HyperBatch]], batch_size: int, antithetic: bool
    ) -> Iterator[None]:
        batch_size = whole_number(call, "batch_size", batch_size, 1)
        self._check_closed(call)
        number = self._repeated(call, batch_size) if switch(call, "antithetic", antithetic) else self.draws
        if not self.method.response_has_gradients:  # those of earlier passes were not used
            self._responses.clear()
        with opened(batch_size, number, antithetic) as hyper, self._open(call):
            self.draws = max(self.draws, number + 1)
            self._to_repeat = None if antithetic or hyper.centred else (number, batch_size)
            self._in_use, self._called = hyper, False
            handle = self.method.model.register_forward_pre_hook(self._note_call)
            try:
                yield
            finally:
                handle.remove()
        if not hyper.centred:
            self._responses.append(hyper.response)

    @contextmanager
    def validating(self, batch_size: int) -> Iterator[None]:
        """The pass of a validation step: inside, hyperparameters get gradients through the response, and weights none.

            with tuner.validating(len(x)):
                loss = F.cross_entropy(model(x), y)
            tuner.hyper_step(loss)

        Inside, the model is in evaluation mode; afterwards, also after an error, everything is as before.

        Raises:
            ValueError: `batch_size` is not an int >= 1; in the first pass of all, as for `training`.
            RuntimeError: another pass is open, or gradients are switched off.
        """
        batch_size = whole_number("validating", "batch_size", batch_size, 1)
        self._check_closed("validating")
        with self.method.validation_pass(batch_size, self.draws), self._open("validating"):
            self.draws += 1
            with self._rows.checked("validating", batch_size):
                yield

    def hyper_step(self, loss: Tensor, backward: Callable[..., Any] | None = None) -> Tensor:
        """Updates the hyperparameters down the gradient of ``loss`` − τ·entropy, which only they get.

        Args:
            loss: a tensor of one number, the mean over the examples of one or several `validating` passes. It must not
                be scaled by a GradScaler. If the model uses activation checkpointing, call this inside of the pass.
            backward: computes the gradients, called as ``backward(tensor, inputs=[...])`` like ``Tensor.backward``, by
                default `torch.autograd.grad`. Lightning Fabric in mixed precision needs ``fabric.backward``.

        Returns the loss, detached.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; on CUDA, of an earlier step.
            RuntimeError: the loss does not depend on the hyperparameters, or a training pass is open.
            TypeError: it is not a tensor of one number.
            ValueError: processes that share the batch have different numbers of examples.
        """
        if self._inside != "validating":
            self._check_closed("hyper_step")
        if self._of_weights_only and isinstance(self.method, ConvertedDeltaSelfTuning):
            warnings.warn(
                "hyper_step: with delta-stn, the response is trained by passes of `tuner.responding`, and there has "
                "been none, so the hyperparameters have no gradient to follow",
                stacklevel=2,
            )
            self._of_weights_only, self._responded = False, True  # say it once
        loss = self.method.hyper_step(loss, self.draws - 1, backward)
        self._record(loss)
        return loss

    def penalty(self) -> Tensor:
        """½·weight_decay·‖W_eff‖² of the converted layers, averaged over the examples of the open training pass.

        With additions of `stn_fast.WeightDecay`, each layer has its own hyperparameter. 0 if none decays weights.

        Raises:
            RuntimeError: no training pass is open; the validation loss has no penalty. Or the model is sharded, and has
                not been called in the pass: its gradients are added to those of the penalty, in this order.
        """
        if self._in_use is None:
            raise RuntimeError("penalty: it belongs to the training loss: call it inside `with tuner.training(...)`")
        if self.method.sharding is not None and not self._called:
            raise RuntimeError("penalty: call the sharded model first, and then penalty in the same pass")
        return self.method.with_weight_decay(self._in_use.values.new_zeros(()), self._in_use)

    def _record(self, loss: Tensor) -> None:
        self.validated += 1
        self._records.append(Record(self.trained, loss, self.method.location.detach().clone()))
        self._compare()

    def _compare(self) -> None:
        """Checks now and then that processes that share the batches hold the same numbers."""
        if (self.trained + self.validated) % CHECK_EVERY == 0:
            self.check_equal()

    def check_equal(self) -> None:
        """Compares λ, ρ and all parameters, bit for bit, with those of the processes of ``process_group``.

        Every 100th step does so by itself. All processes must call it, as before the first one saves a state. Without
        a process group it does nothing.

        Raises:
            stn_fast.training.distributed.ProcessesDiffer: in all processes; the message names what differs.
        """
        self.method.check_equal(self.trained + self.validated)

    def _history(self) -> list[dict[str, Any]]:
        """The validation steps as plain numbers, with locations by name."""
        names = self.method.space.names
        return [
            {"step": step, "loss": loss.item(), "location": dict(zip(names, location.tolist(), strict=True))}
            for step, loss, location in self._records
        ]

    def _load_history(self, history: list[dict[str, Any]]) -> None:
        names, location = self.method.space.names, self.method.location
        self._records = [
            Record(
                one["step"],
                torch.tensor(one["loss"], dtype=torch.float64),
                location.new_tensor([one["location"][name] for name in names]),
            )
            for one in history
        ]

    def _check_closed(self, call: str) -> None:
        if self._inside:
            raise RuntimeError(f"{call}: the pass `with tuner.{self._inside}(...)` is still open: leave it first")

    @contextmanager
    def _open(self, name: str) -> Iterator[None]:
        self._inside = name
        try:
            yield
        finally:
            self._inside, self._in_use = "", None

    def _repeated(self, call: str, batch_size: int) -> int:
        """The number of the draw to repeat."""
        if self._to_repeat is None:
            raise RuntimeError(f"{call}: antithetic=True repeats the draw of the pass before, once")
        number, examples = self._to_repeat
        if batch_size != examples:
            raise ValueError(f"{call}: antithetic=True needs the examples of the pass before, {examples}")
        return number

    def _note_call(self, *_: Any) -> None:
        self._called = True

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called by each optimizer; `train_step` leaves nothing to do here.

        Raises:
            RuntimeError: a training pass is open, whose draw the step needs.
        """
        if self._inside in ("training", "responding"):
            raise RuntimeError(f"leave `with tuner.{self._inside}(...)` before the optimizer steps")
        if optimizer is self._of_response and self._responses:
            self.method.shorten(optimizer, self._responses)
            self._responses.clear()
        if optimizer is self._of_weights and self._passed:
            self.trained, self._passed = self.trained + 1, False
            self._compare()

    def _forget_passes(self) -> None:
        """Leaves nothing to repeat, and nothing to do for the next step of an optimizer."""
        self._to_repeat, self._passed = None, False
        self._responses.clear()


def _called(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a wrapper, such as that of Accelerate, calls."""
    inner = getattr(optimizer, "optimizer", None)
    return _called(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer
