"""One-pass hypergradients of an optimizer's own hyperparameters: its learning rate, momentum and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.checks import real_number, whole_number
from stn_fast.hyperparameter import Hyperparameter
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.modes import evaluating
from stn_fast.training.batches import Batch
from stn_fast.training.finite import Attempt, gradient_norms
from stn_fast.training.methods import FixedHyperparameters
from stn_fast.training.optimizers import (
    MakeOptimizer,
    default_hyper_optimizer,
    learning_rate,
    make_capturable,
    set_learning_rate,
)
from stn_fast.training.parameters import parameter_names
from stn_fast.training.precision import float32_products
from stn_fast.training.task import Objective

RATE, MOMENTUM, DECAY = "optimizer.learning_rate", "optimizer.momentum", "optimizer.weight_decay"


class Tuned(NamedTuple):
    """The hyperparameters of an optimizer that are tuned, scalars."""

    rate: Tensor
    momentum: Tensor | float
    decay: Tensor | float


Update = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any], Tuned], Tensor]


def _sgd(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], tuned: Tuned) -> Tensor:
    buffer = state.get("momentum_buffer")
    velocity = gradient if buffer is None else tuned.momentum * buffer + gradient
    return tuned.rate * (velocity + tuned.decay * weight)


def _adam(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], tuned: Tuned) -> Tensor:
    first, (_, second), step = tuned.momentum, group["betas"], float(state.get("step", 0.0)) + 1
    mean = first * state.get("exp_avg", 0.0) + (1 - first) * gradient
    square = second * state.get("exp_avg_sq", 0.0) + (1 - second) * gradient**2
    # √square has no derivative at 0, where the gradient has always been 0.
    size = torch.where(square > 0, square, 1.0).sqrt() * (square > 0) / (1 - second**step) ** 0.5
    return tuned.rate * (mean / (1 - first**step) / (size + group["eps"]) + tuned.decay * weight)


def clipping(gradients: Sequence[Tensor], clip: float | None) -> Tensor | float:
    """The factor by which `torch.nn.utils.clip_grad_norm_` would multiply the gradients."""
    if clip is None:
        return 1.0
    with torch.no_grad():
        return (clip / (torch.linalg.vector_norm(gradient_norms(gradients)) + 1e-6)).clamp(max=1.0)


def neumann_series(
    vector: list[Tensor], product: Callable[[list[Tensor]], Iterable[Tensor]], terms: int
) -> list[Tensor]:
    """Σ_{j<terms} vector (I − M)ʲ, with ``product`` a function v → v M."""
    term = series = vector
    for _ in range(terms - 1):
        term = [before - by for before, by in zip(term, product(term), strict=True)]
        series = [total + new for total, new in zip(series, term, strict=True)]
    return series


UPDATES: dict[type[torch.optim.Optimizer], Update] = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam}


class OnePass(FixedHyperparameters):
    """Tunes an optimizer's learning rate, momentum and decoupled weight decay as it trains a plain network.

    An approximate hypergradient of the validation loss F by implicit differentiation (Clarke, Oldewage and
    Hernández-Lobato, ICLR 2022, section 3). One update of the weights is w ← w − u(w, φ), with the hyperparameters φ:

        SGD     u = rate · (momentum · buffer + ∇L(w) + weight_decay · w)
        Adam    u = rate · (m̂ / (√v̂ + ε) + weight_decay · w), with momentum as β₁

    and with the state of the optimizer and the factor by which ∇L is clipped treated as constant. Where u(w*, φ) = 0,
    dw*/dφ = −(∂u/∂w)⁻¹ ∂u/∂φ. The inverse is approximated by the first n terms of its Neumann series:

        dF/dφ ≈ −∇F(w)ᵀ Σ_{j<n} (I − ∂u/∂w)ʲ ∂u/∂φ.

    ``valid_step`` computes ∇F. The next ``train_step``, whose ∇L is needed anyway, computes the rest by differentiating
    twice, moves φ by ``hyper_optimizer`` and then updates the weights with the new φ. A momentum or weight decay of 0
    is not tuned.

    Learning rate and weight decay are softplus of the location, so about exp(location) where they are small; momentum
    is its sigmoid. All other hyperparameters stay at their first guesses, as in `FixedHyperparameters`. ``space``,
    ``location`` and everything reported contain the tuned ones under the names "optimizer.learning_rate",
    "optimizer.momentum" and "optimizer.weight_decay".

    Differences from the published code: u is that of the training step after the validation step, not before;
    logarithms are natural, not to base 10; weight decay is decoupled from momentum; ∇F is computed in evaluation mode;
    the learning rate has no upper bound.

    On CUDA, the host waits for the device at every step, and steps are not captured as CUDA graphs.

    Args:
        model, space, training_objective, and options: as for `FixedHyperparameters`.
        validation_objective: F.
        optimizer: makes a torch.optim.SGD or Adam, whose learning rate and momentum are the first guesses. Its own
            weight decay must be 0.
        hyper_optimizer: makes the optimizer of the location.
        weight_decay: first guess.
        neumann_terms: the number of terms, n.

    Raises:
        ValueError: an argument is out of range; accumulation is not 1; the optimizer is another one, or has several
            parameter groups, weight decay, Nesterov momentum, dampening, maximize, amsgrad or a learning rate of 0.
        RuntimeError: in a training step, an operation of the model can't be differentiated twice.
    """

    tunes = True
    waits = True
    uncapturable = "a CUDA graph would keep the optimizer's momentum, which this method tunes"

    def __init__(
        self,
        model: nn.Module,
        space: HyperparameterSpace,
        training_objective: Objective,
        validation_objective: Objective,
        *,
        hyper_optimizer: MakeOptimizer = default_hyper_optimizer,
        weight_decay: float = 1e-4,
        neumann_terms: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(model, space, training_objective, **options)
        if self.accumulation > 1:
            raise ValueError("OnePass: accumulation must be 1: second derivatives are those of the whole batch")
        self.validation_objective = validation_objective
        self.neumann_terms = whole_number("OnePass", "neumann_terms", neumann_terms, 1)
        self._decay = real_number("OnePass", "weight_decay", weight_decay)
        if self._decay < 0:
            raise ValueError(f"OnePass: weight_decay must be at least 0, got {weight_decay}")
        self._update, momentum = _checked(self.optimizer)
        self._network_space = self.space
        self.space = HyperparameterSpace([*self.space, *_tuned(self.learning_rate, momentum, self._decay)])
        self.location, self.raw_scale = self.space.initial_state(self.location.device)
        self.hyper_optimizer = hyper_optimizer([self.location.requires_grad_()])
        make_capturable(self.hyper_optimizer)
        self._validation_gradients: list[list[Tensor]] = []  # until the next training step uses them
        self.optimizer.register_step_pre_hook(self._decay_weights)
        self._install()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [*super().optimizers, self.hyper_optimizer]

    def _optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return super()._optimizers_by_name() | {"hyper_optimizer": self.hyper_optimizer}

    @property
    def _parameters(self) -> list[Tensor]:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "validation_objective": self.validation_objective,
            "neumann_terms": self.neumann_terms,
        }

    def _at(self, **draw: Any) -> HyperBatch:
        return self._network_space.at(self.location.detach()[: len(self._network_space)], **draw, centred=True)

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """Computes ∇F on one validation batch, in evaluation mode; the next training step uses the mean of these.

        Arguments and errors as for ``train_step``. Returns F, a detached scalar on the device.
        """
        batch = self.begin("valid_step", batch)
        parameters = self._parameters
        with float32_products(self.precision), evaluating(self.model):
            hyper = self._at(**self._draw(batch, step, first_example))
            loss = self._loss("validation", self.validation_objective, self.model, batch, hyper)
            gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
        loss = loss.detach().clone()
        self._average([*gradient, loss], batch.examples)
        norms = gradient_norms(gradient)
        name = partial(parameter_names, self.model, parameters)
        attempt = Attempt("validation", step, loss, norms, torch.linalg.vector_norm(norms), name)
        keep = partial(self._validation_gradients.append, list(gradient))
        self.guard.take(attempt, self.hyper_optimizer, keep, batch.undo)
        return loss

    def _train(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        if not (self._validation_gradients and self.location.is_cuda):
            return super()._train(batch, step, first_example)
        with torch.backends.cudnn.flags(enabled=False):  # its LSTM can't be differentiated twice
            return super()._train(batch, step, first_example)

    def _differentiate(self, loss: Tensor, step: int | Tensor, examples: int) -> None:
        validation, self._validation_gradients = self._validation_gradients, []
        of_all = loss.detach().clone()
        if validation:
            self._average([of_all], examples)
        if not validation or not of_all.isfinite():
            return super()._differentiate(loss, step, examples)
        parameters = self._parameters
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used: list[tuple[Tensor, Tensor, Tensor]] = []
        for parameter, gradient, *of_batches in zip(parameters, gradients, *validation, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()
            if gradient is not None:
                used.append((parameter, gradient, torch.stack(of_batches).mean(0)))
        if not used:
            return
        hypergradient = self._hypergradient(*(list(column) for column in zip(*used, strict=True)), examples=examples)

        def update() -> None:
            self.location.grad = hypergradient
            self.hyper_optimizer.step()

        attempt = Attempt(
            "hyperparameter", step, of_all, hypergradient, hypergradient.sum(), self._hyperparameter_names
        )
        self.guard.take(attempt, self.hyper_optimizer, update, lambda where: None)
        self._install()

    def _average(self, tensors: list[Tensor], examples: int) -> None:
        """Replaces means over ``examples`` by those over the examples of all processes that share the batch."""
        if self.processes is not None:
            self.processes.average_(tensors, examples)

    def _hypergradient(
        self, weights: list[Tensor], gradients: list[Tensor], validation: list[Tensor], *, examples: int
    ) -> Tensor:
        """dF/dlocation, from ∇L with its graph, the mean over ``examples``, and ∇F.

        Of several processes, each has the graph of its own examples. Its gradient gets the value of the whole batch's,
        so that averages of products with its derivatives are those of the whole batch.
        """
        if self.processes is not None:
            means = [gradient.detach().clone() for gradient in gradients]
            self._average(means, examples)
            gradients = [mean + (one - one.detach()) for mean, one in zip(means, gradients, strict=True)]
        clipped = clipping(gradients, self.clip)
        group, states = self.optimizer.param_groups[0], self.optimizer.state
        values = self.space.at(self.location, batch_size=1).values[0]
        named = dict(zip(self.space.names, values, strict=True))
        tuned = Tuned(named[RATE], named.get(MOMENTUM, 0.0), named.get(DECAY, 0.0))
        updates = [
            self._update(weight, gradient * clipped, states.get(weight, {}), group, tuned)
            for weight, gradient in zip(weights, gradients, strict=True)
        ]

        def product(vector: list[Tensor]) -> list[Tensor]:
            found = torch.autograd.grad(updates, weights, vector, retain_graph=True, materialize_grads=True)
            self._average(list(found), examples)
            return list(found)

        series = neumann_series(validation, product, self.neumann_terms)
        (hypergradient,) = torch.autograd.grad(updates, [self.location], series)
        return -hypergradient

    def _install(self) -> None:
        """Gives the optimizer its learning rate and momentum; weight decay is read as it steps."""
        values = self.space.values(self.location)
        set_learning_rate(self.optimizer, values[RATE])
        self._decay = values.get(DECAY, 0.0)
        for group in self.optimizer.param_groups:
            if MOMENTUM in values and "betas" in group:
                group["betas"] = values[MOMENTUM], group["betas"][1]
            elif MOMENTUM in values:
                group["momentum"] = values[MOMENTUM]

    @torch.no_grad()
    def _decay_weights(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * self._decay)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the weights now. Setting it moves the location."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        index = self.space.index(RATE)
        with torch.no_grad():
            self.location[index] = replace(self.space[RATE], init=rate).start
        self._install()

    def _state(self) -> dict[str, Any]:
        kept = [[part.clone() for part in gradient] for gradient in self._validation_gradients]
        return {**super()._state(), "validation_gradients": kept}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self._validation_gradients = [list(gradient) for gradient in state["validation_gradients"]]
        self._install()


def _checked(optimizer: torch.optim.Optimizer) -> tuple[Update, float]:
    """The function of one update of ``optimizer``, and its momentum."""
    kind = type(optimizer)
    if kind not in UPDATES:
        raise ValueError(f"OnePass: the optimizer must be torch.optim.SGD or Adam, got {kind.__name__}")
    if len(optimizer.param_groups) > 1:
        raise ValueError("OnePass: the optimizer must have one group of parameters, which share their learning rate")
    (group,) = optimizer.param_groups
    for name in ("weight_decay", "nesterov", "dampening", "maximize", "amsgrad"):
        if group.get(name):
            raise ValueError(f"OnePass: the optimizer must have {name}=0 or False, got {group[name]}")
    if not learning_rate(optimizer) > 0:
        raise ValueError("OnePass: the learning rate must be above 0 to be tuned")
    momentum = group["betas"][0] if "betas" in group else group["momentum"]
    if not 0 <= momentum < 1:
        raise ValueError(f"OnePass: momentum must be at least 0 and below 1, got {momentum}")
    return UPDATES[kind], momentum


def _tuned(rate: float, momentum: float, decay: float) -> list[Hyperparameter]:
    """Those that are tuned; "raw", so that a state fits whatever the first guesses were."""
    bounds = {RATE: (rate, None), MOMENTUM: (momentum, 1.0), DECAY: (decay, None)}
    return [
        Hyperparameter(name, init=first, low=0.0, high=high, per_example=False, response="raw")
        for name, (first, high) in bounds.items()
        if first > 0
    ]
