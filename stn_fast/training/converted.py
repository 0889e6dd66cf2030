"""The steps of converted models, whole and as single passes, and a check of their optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stn_fast.conversion.additions import WeightDecay
from stn_fast.conversion.converted import Converted
from stn_fast.conversion.folding import tuned_of
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.modes import evaluating
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.distributed import StepKind
from stn_fast.training.methods import SelfTuning
from stn_fast.training.parameters import check_used, hold_parameters, is_response, listed
from stn_fast.training.task import with_weight_decay


class ConvertedSelfTuning(SelfTuning):
    """The steps of a converted model: they tune its own λ, and its layers use the hyperparameters of each pass."""

    name = "stn"
    _examples = 0  # of this process, in the last pass
    responds = "compute it from outputs of the model, in a loop of passes inside `with tuner.validating(...)`"

    def _in_use(self, hyper: HyperBatch) -> AbstractContextManager[None]:
        tuned = tuned_of("SelfTuner", self.model)
        if not tuned.location.is_set_to(self.location):
            raise RuntimeError(
                "SelfTuner: the model's hyperparameters have other memory than when the tuner was made, as after "
                "load_state_dict(..., assign=True) or a move to another device; make a new SelfTuner"
            )
        return super()._in_use(hyper)

    def _made_by(self) -> dict[str, Any]:
        return super()._made_by() | {"method": self.name}

    def _check_ready(self, call: str) -> None:
        if self.sharding is None and any(map(is_sharded, self.model.parameters())):
            raise RuntimeError(
                f"{call}: the model has been sharded since the tuner was made: call stn.convert, fully_shard, and then "
                "make the optimizer and the tuner, in this order"
            )
        super()._check_ready(call)

    def with_weight_decay(self, loss: Tensor, hyper: HyperBatch) -> Tensor:
        """The training loss with the penalty of the model's weights."""
        decayed = with_weight_decay if self.sharding is None else self.sharding.with_weight_decay
        return decayed(loss, self.model, hyper)

    @contextmanager
    def training_pass(self, batch_size: int, step: int, antithetic: bool) -> Iterator[HyperBatch]:
        """Inside, the model is in training mode and uses the perturbed hyperparameters of a training step.

        As in ``train_step``, running statistics don't change in antithetic passes, and it is an error at the end of the
        first pass if some hyperparameters were not looked up.
        """
        self._check_ready("training")
        self._reshard()
        hyper = self._perturbation(batch_size, "training pass", step, antithetic)
        with self._passing(hyper, statistics=not antithetic):
            yield hyper

    @torch.no_grad()
    def _perturbation(self, batch_size: int, kind: StepKind, step: int, antithetic: bool) -> HyperBatch:
        return self._perturbed(self._draw_of_pass(batch_size, kind, step), antithetic)

    def _draw_of_pass(self, batch_size: int, kind: StepKind, step: int) -> dict[str, Any]:
        """As `_draw`, for the examples of this process."""
        self._examples, first_example = batch_size, 0
        if self.processes is not None:
            counts = self.processes.counts(batch_size, kind, step, self.location.device)
            if len({*counts}) > 1:
                raise ValueError(
                    f"process_group: the processes have {', '.join(map(str, counts))} examples, but in passes, "
                    "DistributedDataParallel averages gradients as if they had as many: give each an equal share of "
                    "every batch, by drop_last or a sampler, or call tuner.step"
                )
            first_example = self.processes.rank * batch_size
        return dict(batch_size=batch_size, seed=self.seed, step=step, first_example=first_example)

    @contextmanager
    def _passing(self, hyper: HyperBatch, statistics: bool) -> Iterator[None]:
        """Inside, the model is in training mode and uses `hyper`; running statistics change if `statistics` is true."""
        with self._modes.resumed(), self._in_use(hyper), ExitStack() as stack:
            if not statistics:
                stack.callback(self._buffers.keep(), None)
            yield
        if self._checks_used:
            unused = [name for name in decays_of(self.model) if name not in hyper.used]
            if unused:
                raise ValueError(f"training: add tuner.penalty() to the loss, which the tuned {listed(unused)} needs")
            check_used(hyper, self.model)
            self._checks_used = False

    @contextmanager
    def validation_pass(self, batch_size: int, step: int) -> Iterator[HyperBatch]:
        """Inside, the model is in evaluation mode, its weights are held, and it uses hyperparameters with gradients."""
        self._check_ready("validating")
        self._reshard()
        hyper = self._validation_hyper(self._draw_of_pass(batch_size, "validation pass", step))
        with evaluating(self.model), hold_parameters(self.model.parameters()), self._in_use(hyper):
            yield hyper

    def hyper_step(self, loss: Tensor, step: int, backward: Callable[..., Any] | None = None) -> Tensor:
        """Updates location and raw scale on F, computed in a validation pass; returns it detached."""
        self._check_ready("hyper_step")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"hyper_step: the loss must be a tensor of one number, the mean over examples, got {got}")
        gradients = self._gradients(loss.to(torch.promote_types(loss.dtype, torch.float32)), backward)
        loss, gradients = self._averaged(loss.detach(), gradients, self._examples)
        self._move(loss, gradients, step, lambda where: None)
        return loss

    def shorten(self, optimizer: torch.optim.Optimizer, responses: Sequence[Tensor]) -> None:
        """Divides the gradients of the response as `ResponseSteps.shorten` does."""
        trained = [one for one in _parameters(optimizer) if one.grad is not None]
        self._response_steps.shorten(trained, responses, self.processes)

    @property
    def response_has_gradients(self) -> bool:
        """Whether a parameter of the response has a gradient."""
        return any(parameter.grad is not None for parameter in self._of_response)

    @cached_property
    def _of_response(self) -> list[nn.Parameter]:
        return response_parameters(self.model)


class ConvertedDeltaSelfTuning(ConvertedSelfTuning, DeltaSelfTuning):
    """The same by Δ-STN."""

    name = "delta-stn"

    @contextmanager
    def training_pass(self, batch_size: int, step: int, antithetic: bool) -> Iterator[HyperBatch]:
        """The pass of a general step: the hyperparameters are not perturbed, and the response is held."""
        if self.processes is not None:
            raise ValueError(
                "training: delta-stn can't share a batch between processes in passes, because its pass of the response "
                "does not call the model that DistributedDataParallel returns: call tuner.step, or use method='stn'"
            )
        self._check_ready("training")
        hyper = self._general_hyper(self._draw_of_pass(batch_size, "training pass", step))
        with hold_parameters(self._response), self._passing(hyper, statistics=True):
            yield hyper
        self._note_reach()

    @contextmanager
    def response_pass(self, batch_size: int, step: int, antithetic: bool) -> Iterator[HyperBatch]:
        """The pass of a response step: the weights are held, and running statistics don't change."""
        self._check_ready("responding")
        hyper = self._perturbation(batch_size, "response pass", step, antithetic)
        with hold_parameters(self._general), self._passing(hyper, statistics=False):
            yield hyper
        if self.response_has_gradients:
            self._check_reach()

    @property
    def linearised(self) -> Any:
        """What to call in place of the model in a response pass."""
        return self._linearised


TuningMethod = Literal["stn", "delta-stn"]
METHODS = {kind.name: kind for kind in (ConvertedSelfTuning, ConvertedDeltaSelfTuning)}


def check_method(method: TuningMethod, space: HyperparameterSpace, with_options: bool) -> None:
    """Raises ValueError if there is no such method, or if it can't have the space or the options of Δ-STN."""
    if method not in METHODS:
        raise ValueError(f"SelfTuner: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method == "stn" and with_options:
        raise ValueError("SelfTuner: response_optimizer and linearize are options of method='delta-stn'")
    others = [one.name for one in space if one.response != "shifted"]
    if method == "delta-stn" and others:
        raise ValueError(
            f"SelfTuner: delta-stn centres the response, so hyperparameters must have response='shifted', and "
            f"{listed(others)} {'has' if len(others) == 1 else 'have'} another one"
        )


def response_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the response of the model's layers."""
    return [parameter for name, parameter in model.named_parameters() if is_response(name)]


def check_converted(model: nn.Module, tuned: TunedHyperparameters) -> None:
    """Raises ValueError naming converted layers that plain ones have replaced since."""
    now = dict(model.named_modules())
    plain = [(name, now[name]) for name in tuned.converted if name in now and not isinstance(now[name], Converted)]
    if replaced := [f"{name} ({type(one).__name__})" for name, one in plain if list(one.parameters(recurse=False))]:
        raise ValueError(
            f"SelfTuner: {listed(replaced)} had been converted, and the plain layer there now does not respond: "
            "replace layers before the conversion"
        )


def check_optimizers(
    model: nn.Module, optimizer: torch.optim.Optimizer, response_optimizer: torch.optim.Optimizer
) -> None:
    """Raises TypeError or ValueError if one is no optimizer, is another model's, or lacks what it has to train."""
    for name, one in (("optimizer", optimizer), ("response_optimizer", response_optimizer)):
        if not isinstance(one, torch.optim.Optimizer):
            does = "be" if name == "optimizer" else "make"
            raise TypeError(
                f"SelfTuner: {name} must {does} a torch.optim.Optimizer, made with the parameters of the converted "
                f"model, got {type(one).__name__}"
            )
    held, of_response = ({id(parameter) for parameter in _parameters(one)} for one in (optimizer, response_optimizer))
    wanted = {name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if held.isdisjoint(wanted.values()):
        order = ", after fully_shard" if any(map(is_sharded, model.parameters())) else ""
        raise ValueError(
            f"SelfTuner: the optimizer holds none of the model's parameters: make it with this model's{order}"
        )
    if not any(parameter in held for name, parameter in wanted.items() if not is_response(name)):
        raise ValueError("SelfTuner: the optimizer holds only parameters of the response: give it the weights, too")
    missing = [name for name, parameter in wanted.items() if is_response(name) and parameter not in of_response]
    if missing:
        which, how = (
            ("optimizer", "make it after stn.convert, with all parameters of the converted model")
            if optimizer is response_optimizer
            else ("response_optimizer", "make it with all parameters that it is given")
        )
        raise ValueError(f"SelfTuner: the {which} lacks {listed(missing)}, parameters of the response: {how}")
    groups = optimizer.param_groups + response_optimizer.param_groups
    decays = [group["weight_decay"] for group in groups if group.get("weight_decay")]
    names = decays_of(model)
    if decays and names:
        warnings.warn(
            f"the optimizer decays weights by {decays[0]}, in addition to the tuned {listed(names)}, and the response "
            "too: make it with weight_decay=0",
            stacklevel=3,
        )


def decays_of(model: nn.Module) -> list[str]:
    """The hyperparameters that decay weights of a converted model."""
    tuned = tuned_of("SelfTuner", model)
    added = [one.hyperparameter for one in tuned.added if isinstance(one.addition, WeightDecay)]
    return [name for name in tuned.space.names if name in ("weight_decay", *added)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
