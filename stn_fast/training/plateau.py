"""Decides from the validation losses of past epochs when to decay the learning rate and when to stop."""

from __future__ import annotations

from typing import Any, NamedTuple

from stn_fast.training.config import OptimizerConfig


class Stop(NamedTuple):
    """The first epoch after which a run had to end, and the key of the configuration that ended it."""

    epoch: int
    key: str


class Plateau:
    """The papers' non-monotonic trigger for learning rate decay, and the two criteria that end a run.

    The learning rate is multiplied by ``decay_factor`` after every epoch whose loss is no better than the best loss
    from ``decay_patience`` or more epochs before, which may be several epochs in a row. The run ends after ``patience``
    epochs without a new best loss, or once the learning rate is below ``min_learning_rate``.

    This class only computes the new rate; the method applies it. Epoch 0 is the evaluation before training.
    """

    def __init__(self, optimizer: OptimizerConfig, patience: int | None) -> None:
        self.optimizer, self.patience = optimizer, patience
        self.losses: list[float] = []
        self.decays: list[int] = []  # the epochs after which the learning rate was decayed
        self.stop: Stop | None = None

    def add(self, loss: float) -> float | None:
        """The new learning rate after an epoch with this validation loss; None if it doesn't change."""
        self.losses.append(loss)
        before = self.losses[: -self.optimizer.decay_patience]
        falls = bool(self.optimizer.decay_factor < 1 and before and loss >= min(before))
        if falls:
            self.decays.append(len(self.losses) - 1)
        self.stop = self._first_stop()
        return self._rate_after(len(self.decays)) if falls else None

    def _rate_after(self, decays: int) -> float:
        return self.optimizer.learning_rate * self.optimizer.decay_factor**decays

    def _first_stop(self) -> Stop | None:
        stops = []
        best = 0
        for epoch, loss in enumerate(self.losses):
            best = epoch if loss < self.losses[best] else best
            if self.patience is not None and epoch - best >= self.patience:
                stops.append(Stop(epoch, "schedule.patience"))
                break
        for count, epoch in enumerate(self.decays, start=1):
            if self._rate_after(count) < self.optimizer.min_learning_rate:
                stops.append(Stop(epoch, "optimizer.min_learning_rate"))
                break
        return min(stops, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "decays": list(self.decays)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.decays = list(state["losses"]), list(state["decays"])
        self.stop = self._first_stop()
