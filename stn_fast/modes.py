"""Training and evaluation mode of a model whose submodules may differ in mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class TrainingModes:
    """The modes that a model's modules had when the model itself was last in training mode.

    A submodule that was in evaluation mode then, such as a frozen batch norm, stays in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, list(model.modules())
        self._seen = [True] * len(self._modules)
        self.note()

    def note(self) -> None:
        """Records the modes if the model is in training mode."""
        if self._model.training:
            self._seen = [module.training for module in self._modules]

    def now(self) -> tuple[bool, ...]:
        """The mode of each module."""
        return tuple(module.training for module in self._modules)

    def resume(self) -> None:
        """Restores the recorded modes of a model in evaluation mode; a model in training mode doesn't change."""
        if self._model.training:
            return self.note()
        self._model.train()
        for module, training in zip(self._modules, self._seen, strict=True):
            module.training = training

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside, the modes are those of `resume`; afterwards, the mode of each module is restored."""
        before = self.now()
        self.resume()
        try:
            yield
        finally:
            for module, training in zip(self._modules, before, strict=True):
                module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode; afterwards, the mode of each of its modules is restored."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def in_evaluation(model: nn.Module) -> frozenset[str]:
    """The names of the modules in evaluation mode."""
    return frozenset(name for name, module in model.named_modules() if not module.training)


def train_without(model: nn.Module, frozen: frozenset[str]) -> None:
    """Puts the model in training mode, and the modules of `in_evaluation` in evaluation mode."""
    model.train()
    for name, module in model.named_modules():
        if name in frozen:
            module.training = False
