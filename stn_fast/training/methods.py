"""Methods: the training step and the validation step, also for use in your own loop.

    method = SelfTuning(model, space, training_objective, validation_objective, seed=0)
    for step, (train_batch, valid_batch) in enumerate(batches):
        method.train_step(train_batch, 2 * step)
        method.valid_step(valid_batch, 2 * step + 1)

``step`` and ``seed`` together fix every random draw, so each step of a run needs a different number.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.checks import real_number, switch, whole_number
from stn_fast.conversion.folding import tuned_in
from stn_fast.described_space import described
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace, inverse_softplus
from stn_fast.modes import TrainingModes, evaluating
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.accumulation import finish, parts_of, weighted
from stn_fast.training.batches import Batch, as_batch
from stn_fast.training.capture import CapturedSteps
from stn_fast.training.checksums import bits, checksum
from stn_fast.training.config import Precision
from stn_fast.training.distributed import Processes, ProcessesDiffer
from stn_fast.training.finite import Attempt, Buffers, Guard, NonFiniteError, gradient_norms
from stn_fast.training.hyper_state import check_made_by, reorder, saved_order, without_description
from stn_fast.training.optimizers import (
    MakeOptimizer,
    default_hyper_optimizer,
    default_optimizer,
    learning_rate,
    make_capturable,
    set_learning_rate,
)
from stn_fast.training.parameters import (
    check_streams,
    check_used,
    hold_parameters,
    is_gate,
    is_response,
    listed,
    parameter_names,
)
from stn_fast.training.precision import autocasting, check_precision, float32_products
from stn_fast.training.response_steps import ResponseSteps
from stn_fast.training.sharding import Sharding
from stn_fast.training.task import Objective


class Kind(NamedTuple):
    """One kind of step: ``body(batch, step, first_example)`` computes it and updates by ``optimizer``.

    ``attempts`` is the `Attempt.kind` of its attempts.
    """

    body: Callable[[Batch, int | Tensor, int], Tensor]
    optimizer: torch.optim.Optimizer
    attempts: str = "training"


class Method(ABC):
    """Base class of all methods: the training step, checkpointing, checks for finite numbers, and settings.

    Args:
        model: a converted one, or one whose layers take the hyperparameters. The objectives call it, as
            `stn_fast.training.task.outputs` does.
        space: the hyperparameters.
        training_objective: the loss that ``train_step`` minimises.
        optimizer: makes the optimizer from the parameters to train. On CUDA it is made capturable, and the learning
            rate of a fused one becomes a tensor.
        clip: maximum Euclidean norm of the gradient of a training step; a longer gradient is scaled down to it. None
            for no limit.
        skip_nonfinite: how many steps in a row are skipped, each with a warning, if their loss or gradient is not
            finite. One more is an error; with 0, the first one is.
        seed: with ``step``, fixes dropout masks and noise.
        accumulation: number of parts (micro-batches) of a step, one after the other. The sum of their gradients is that
            of the whole batch, with the same draws for each example, so the numbers are the same up to rounding, and
            the activations of only one part are in memory. Batch norms normalise by the statistics of each part, and
            running statistics get the mean of these. Draws of torch's own layers, such as `nn.Dropout`, are others.
        precision: precision of the matrix products, convolutions and LSTMs of a step: "fp32"; "tf32", on CUDA; "bf16",
            autocast to bfloat16 around the objectives. Weights, hyperparameters, gradient norms and updates, and
            everything outside of steps, always use the dtype of the parameters.
        allow_unused: whether the training objective may ignore hyperparameters. By default it is an error if the first
            training step looks up some hyperparameters, as ``hyper["name"]`` does, but not others, because only the
            entropy would move those. If it looks up none, it is an error, too, for a converted model, and a warning for
            others. Set to True if the objective reads ``hyper.values`` itself.

    A step whose loss or gradient is not finite changes no weight, hyperparameter, optimizer state or running statistic,
    and `Batch.undo` of its batch is called. On CUDA, the device decides to skip the step, and the host does not wait:
    the error is raised at a later call, or by ``check_finite``, which waits for all steps. The host only waits at the
    first step, and at every step if a large optimizer is not fused (``fused=True``). Steps replayed by ``captured`` are
    counted too; steps in your own CUDA graphs are skipped but not counted.
    """

    tunes = False
    uncapturable: str | None = None  # why its steps can't be captured as CUDA graphs, if they can't
    waits = False  # whether the host waits for a CUDA device at every step
    training_kinds: Sequence[str] = ("train_step",)  # the kinds of steps that `train_step` consists of, in order

    def __init__(
        self,
        model: nn.Module,
        space: HyperparameterSpace,
        training_objective: Objective,
        *,
        optimizer: MakeOptimizer = default_optimizer,
        clip: float | None = 1.0,
        skip_nonfinite: int = 0,
        seed: int = 0,
        accumulation: int = 1,
        precision: Precision = "fp32",
        allow_unused: bool = False,
    ) -> None:
        who = type(self).__name__
        if clip is not None and not real_number(who, "clip", clip) > 0:
            raise ValueError(f"{who}: clip must be above 0, or None for no limit, got {clip}")
        self.model, self.space, self.training_objective, self.clip = model, space, training_objective, clip
        self.seed = whole_number(who, "seed", seed, 0)
        self.accumulation = whole_number(who, "accumulation", accumulation, 1)
        self.processes: Processes | None = None
        self.sharding: Sharding | None = None
        self.precision = check_precision(who, precision)
        self._checks_used = not switch(who, "allow_unused", allow_unused)
        check_streams(model)
        self.guard = Guard(whole_number(who, "skip_nonfinite", skip_nonfinite, 0), self.waits)
        self._modes, self._buffers = TrainingModes(model), Buffers(model)
        self._response_steps = ResponseSteps(model)
        trained = self._trained()
        self.optimizer = optimizer(trained)
        self.location, self.raw_scale = self._initial_state(trained[0].device)
        self.kinds: dict[str, Kind] = {}
        self.took_step = True  # whether the last training step was taken, as far as the host knows
        self.response_loss: Tensor | None = None  # of the last training step, if it had a response step
        self._add_training_kinds()

    def share(self, processes: Processes) -> None:
        """Makes this the method of one of several processes that share every batch; all must call it.

        Each gives a step its own examples of the batch, and as ``first_example`` the place of the first. Gradients,
        losses and the running statistics of batch norms are averaged over all examples, so that all processes have the
        same weights and hyperparameters, from now those of the first one. Batch norms normalise by the statistics of a
        process's own examples. Draws of torch's own layers, such as `nn.Dropout`, are not those of a single process.

        Raises:
            ValueError: the method does not support it.
        """
        processes.align(self.model)
        self.processes = processes

    def check_equal(self, step: int) -> None:
        """Compares the bits of λ, of ρ and of all parameters with those of the processes that share the batches.

        All of them must call it. Sharded parameters are left out, as each process has others of their rows. The host
        waits for the device. A process by itself does nothing.

        Args:
            step: the number of steps so far, for the message.

        Raises:
            ProcessesDiffer: in all processes; the message names what differs.
        """
        if self.processes is None:
            return
        parameters = {name: one for name, one in self.model.named_parameters() if not is_sharded(one)}
        state = [f"the {what} of {name!r}" for what in ("location", "scale") for name in self.space.names]
        numbers = [bits(self.location), bits(self.raw_scale), *(checksum(one)[None] for one in parameters.values())]
        names = [*state, *parameters]
        if differing := [names[k] for k in self.processes.differing(torch.cat(numbers))]:
            raise ProcessesDiffer(
                f"after step {step}, {listed(differing)} {'is' if len(differing) == 1 else 'are'} not bit for bit the "
                f"same in all {self.processes.size} processes, as it should be: something changes the numbers of one "
                "process only, such as code of your own, or a faulty device"
            )

    def shard(self, sharding: Sharding) -> None:
        """Makes this the method of a sharded model, whose steps the host decides on."""
        self.sharding, self.waits, self.guard.waits = sharding, True, True
        self.uncapturable = "the parameters of the model are sharded"

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that training steps update."""
        return list(self.model.parameters())

    def _initial_state(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Location and raw scale, leaf tensors that steps update in place; of a converted model, its buffers."""
        tuned = tuned_in(self.model)
        if tuned is None:
            return self.space.initial_state(device)
        return tuned.location.detach(), tuned.raw_scale.detach()

    def _in_use(self, hyper: HyperBatch) -> AbstractContextManager[Any]:
        """What the forward and backward passes with a batch of hyperparameters run in."""
        tuned = tuned_in(self.model)
        return nullcontext() if tuned is None else tuned.using(hyper)

    def _add_training_kinds(self) -> None:
        self._add_kind("train_step", Kind(self._train, self.optimizer))

    def _add_kind(self, call: str, kind: Kind) -> None:
        make_capturable(kind.optimizer)
        self.kinds[call] = kind

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of all kinds of steps."""
        return list(dict.fromkeys(kind.optimizer for kind in self.kinds.values()))

    def _optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        """The same, by the names that their states have in `state_dict`."""
        return {"optimizer": self.optimizer}

    def settings(self) -> dict[str, Any]:
        """All settings that a step depends on, by name, other than its batch, its number and the state."""
        return {
            "the modes of modules": self._modes.now(),
            "training_objective": self.training_objective,
            "clip": self.clip,
            "seed": self.seed,
            "accumulation": self.accumulation,
            "precision": self.precision,
        }

    def captured(self) -> CapturedSteps:
        """The steps as CUDA graphs: call ``train_step`` and ``valid_step`` of the result instead of these."""
        return CapturedSteps(self)

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped so far because the loss or a gradient was not finite."""
        return self.guard.skipped

    def check_finite(self) -> None:
        """Waits for the device and checks all steps so far.

        Raises:
            NonFiniteError: more steps in a row were not finite than ``skip_nonfinite`` allows.
        """
        self.guard.look(wait=True)

    def train_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """Updates the weights on one training batch: (inputs, targets), as from a DataLoader, or a `Batch`.

        A model in training mode keeps the modes of all its submodules. A model in evaluation mode is put back into
        training mode, each submodule in the mode that it had at the last step in training mode.

        Args:
            batch: anything that `stn_fast.training.batches.as_batch` accepts; the objective reads its ``inputs`` and
                ``targets``.
            step: the number that, with the seed, fixes the step's random draws.
            first_example: index of the batch's first example in the global batch. With it, processes that share a batch
                draw the same numbers for each example as a single process with the whole batch.

        Returns the loss, a detached scalar on the device.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; on CUDA, of an earlier step.
            TypeError: this is not a batch.
            ValueError: a hyperparameter is not used.
            RuntimeError: no gradient can be computed.
        """
        batch = self.begin("train_step", batch)
        with float32_products(self.precision):
            return self._train(batch, step, first_example)

    @property
    def training_passes(self) -> int:
        """How often a training step reads its batch. Products of a hypergradient are not counted."""
        return 1

    def views(self, batch: Any) -> list[Batch]:
        """The batch for each of ``training_kinds``, made before the first of them carries the batch's state on."""
        return [as_batch(batch, self.location.device)]

    def _train(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        """The step itself. After the first one, it never waits for a CUDA device."""
        where = batch, step, first_example
        return self._minimise("training", self.model, self.optimizer, where, self._training_hypers)

    def _minimise(
        self,
        kind: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        where: tuple[Batch, int | Tensor, int],
        hypers_of: Callable[[dict[str, Any]], Sequence[HyperBatch]],
    ) -> Tensor:
        """One step of ``optimizer`` on the training objective of ``model``; returns the loss.

        The objective is averaged over the passes with each of the hyperparameters of a draw. The state that the batch
        carries on, and running statistics, are those of the first pass.

        Args:
            where: the batch, and the numbers of the step and of its first example.
            hypers_of: makes the hyperparameters of each pass from the arguments of a draw.
        """
        batch, step, first_example = where
        put_back = self._buffers.keep()

        def undo(where: Tensor | None) -> None:
            put_back(where)
            batch.undo(where)

        parts, losses, statistics = parts_of(batch, self.accumulation), list[Tensor](), list[list[Tensor]]()
        responses: list[list[Tensor]] = []  # of each part, in each of its passes
        try:
            for part in parts:
                if responses:  # each part starts from the statistics before the step
                    put_back(None)
                hypers = hypers_of(self._draw(part.batch, step, first_example + part.first))
                responses.append([hyper.response for hyper in hypers])
                views = [part.batch, *(part.batch.like(part.batch.parts()) for _ in hypers[1:])]
                for number, (view, hyper) in enumerate(zip(views, hypers, strict=True)):
                    share = part.weight / len(hypers)
                    with self._buffers.unchanged() if number else nullcontext():
                        losses.append(self._pass(model, optimizer, view, hyper, step, share, first=not losses))
                if len(parts) > 1:
                    statistics.append([one.clone() for one in self._buffers.statistics()])
        except NonFiniteError:
            undo(None)
            raise
        finish(batch, parts)
        for statistic, *found in zip(self._buffers.statistics(), *statistics, strict=True) if statistics else ():
            statistic.copy_(weighted(found, parts))
        loss = sum(losses[1:], losses[0])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.processes is not None:
            loss = self._averaged_step(loss, parameters, batch.examples)
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if not trained:
            raise RuntimeError("the training loss depends on none of the parameters that the optimizer trains")
        norms = gradient_norms([parameter.grad for parameter in trained])
        norm = torch.linalg.vector_norm(norms)

        def update() -> None:
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
            of_passes = [one[0] if len(one) == 1 else torch.cat(one) for one in zip(*responses, strict=True)]
            self._response_steps.shorten(trained, of_passes, self.processes)
            optimizer.step()

        name = partial(parameter_names, self.model, trained)
        self.took_step = self.guard.take(Attempt(kind, step, loss, norms, norm, name), optimizer, update, undo)
        return loss

    def _averaged_step(self, loss: Tensor, parameters: Sequence[Tensor], examples: int) -> Tensor:
        """Averages the gradients and running statistics over the processes; returns the loss of the whole batch.

        Where the loss of only some processes depends on a parameter, its gradient is 0 in the others. It stays None
        where that of no process does. The host waits for a CUDA device only if it is None in this process.
        """
        assert self.processes is not None
        # The same in all processes, whatever their losses depend on. Sharded gradients are averages already.
        shared = [parameter for parameter in parameters if parameter.requires_grad and not is_sharded(parameter)]
        loss, used = loss.clone(), loss.new_ones(len(shared))
        unused = [k for k, parameter in enumerate(shared) if parameter.grad is None]
        for k in unused:
            shared[k].grad, used[k] = torch.zeros_like(shared[k]), 0
        for parameter in shared:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        gradients = [parameter.grad for parameter in shared if parameter.grad is not None]
        self.processes.average_([*gradients, *self._buffers.statistics(), loss, used], examples)
        if unused:
            used_anywhere = used.tolist()
            for k in unused:
                if used_anywhere[k] == 0:
                    shared[k].grad = None
        return loss

    def _pass(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        hyper: HyperBatch,
        step: int | Tensor,
        share: float,
        first: bool,
    ) -> Tensor:
        """A pass of a step, ``share`` of whose gradients it adds to ``.grad``; returns its share of the loss."""
        with self._in_use(hyper):
            loss = self._loss("training", self.training_objective, model, batch, hyper)
            if share != 1:
                loss = loss * share
            if self._checks_used:
                check_used(hyper, self.model)
                self._checks_used = False
            if not loss.requires_grad:
                raise RuntimeError(
                    "the training loss does not depend on any parameter that requires a gradient: compute it from the "
                    "model's outputs, and leave requires_grad on for the parameters to train"
                )
            if first:
                optimizer.zero_grad(set_to_none=True)
            self._differentiate(loss, step, batch.examples)
        return loss.detach()

    def _differentiate(self, loss: Tensor, step: int | Tensor, examples: int) -> None:
        """Computes the ``.grad`` of the parameters, from the mean over ``examples``."""
        loss.backward()

    def begin(self, call: str, batch: Any) -> Batch:
        """The host's work before a step: checks earlier steps, converts the batch, and restores training mode."""
        self._check_ready(call)
        self._reshard()
        if call != "valid_step":
            self._modes.resume()
        return as_batch(batch, self.location.device)

    def in_any_process(self, here: bool) -> bool:
        """Whether it is true here; of a sharded model, which all processes must call together, in any of them."""
        return here if self.sharding is None else self.sharding.anywhere(here)

    def _reshard(self) -> None:
        if self.sharding is not None:
            self.sharding.reshard()

    def _check_ready(self, call: str) -> None:
        """Raises NonFiniteError for an earlier step, or RuntimeError if gradients are switched off."""
        self.guard.look()
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{call} computes gradients, but torch.no_grad or torch.inference_mode is on: call it outside of them"
            )

    def _draw(self, batch: Batch, step: int | Tensor, first_example: int) -> dict[str, Any]:
        """Arguments of ``HyperparameterSpace.sample`` and ``at``: number of examples and RNG coordinates."""
        return dict(batch_size=batch.examples, seed=self.seed, step=step, first_example=first_example)

    def _loss(self, kind: str, objective: Objective, model: nn.Module, batch: Batch, hyper: HyperBatch) -> Tensor:
        with autocasting(self.precision, self.location.device):
            loss = batch.finish(objective(model, batch, hyper))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the {kind} loss must be a tensor of one number, the mean over examples, got {got}")
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    @abstractmethod
    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """Updates the hyperparameters on one validation batch; arguments as for ``train_step``."""

    def unperturbed(self, batch_size: int) -> HyperBatch:
        """The current hyperparameters, the same for every example, for evaluations."""
        return self.space.at(self.location.detach(), batch_size=batch_size)

    @abstractmethod
    def scales(self) -> Tensor:
        """σ of the perturbation of each hyperparameter, (n,); 0 without perturbation."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the weights at the next step. It is stored in the optimizer, and so in checkpoints."""
        return learning_rate(self.optimizer)

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)

    @abstractmethod
    def _training_hypers(self, draw: dict[str, Any]) -> list[HyperBatch]:
        """The hyperparameters of a training step, which get no gradient from it, for each of its passes."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, except the data and the step number."""
        self.check_finite()
        return self._state()

    def _state(self) -> dict[str, Any]:
        self._reshard()
        return {
            "made_by": self._made_by(),
            "hyperparameters": described(self.space),
            "model": self.model.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self._optimizers_by_name().items()},
            "location": self.location.detach(),
            "raw_scale": self.raw_scale.detach(),
            "skipped": {"steps": self.guard.skipped, "in_a_row": dict(self.guard.in_a_row)},
        }

    def sharded_like(self, place: str) -> Tensor | None:
        """The sharded parameter with whose shards the tensor at a place of a state is kept, if there is one."""
        if self.sharding is None:
            return None
        kind, _, rest = place.removeprefix("method/").partition("/")
        if kind == "model":
            return self.sharding.parameters.get(rest)
        optimizer = self._optimizers_by_name().get(kind)
        if optimizer is None or optimizer is getattr(self, "hyper_optimizer", None):
            return None
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return own[int(rest.split("/")[1])]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned: weights, hyperparameters and optimizer states.

        Hyperparameters are matched by name. If the state has them in another order, locations, scales and the gates of
        this package's layers are reordered to match this method; your own modules that read ``hyper.response`` by
        column are not.

        Raises:
            ValueError: the method, its optimizers, its hyperparameters, or their bounds, kinds or first guesses differ
                from this method's; the message says which. After this or any other error, nothing has been loaded.
        """
        order = self.check_state(state)
        before = copy.deepcopy(self._state())
        try:
            self._load(state)
        except Exception:
            self._load(before)
            raise
        if order != sorted(order):
            named = self.model.named_parameters()
            gates = [p for name, p in named if is_gate(name) and p.shape[-1] == len(order)]
            reorder(order, [*gates, self.location, self.raw_scale], self.optimizers)
        self.guard = Guard(self.guard.skip, self.waits, state["skipped"]["steps"], dict(state["skipped"]["in_a_row"]))

    def check_state(self, state: Any) -> list[int]:
        """The position in the state of each hyperparameter. Raises ValueError as `load_state_dict` does."""
        check_made_by(state, self._made_by())
        return saved_order(state, self.space)

    def _hyperparameter_names(self, columns: Sequence[int]) -> str:
        return listed([f"hyperparameter {self.space.names[k]!r}" for k in columns])

    def _made_by(self) -> dict[str, Any]:
        optimizers = [type(optimizer).__name__ for optimizer in self.optimizers]
        return {"method": type(self).__name__, "optimizers": optimizers}

    @torch.no_grad()
    def _load(self, state: dict[str, Any]) -> None:
        with self._buffers.ignoring_writes():
            self.model.load_state_dict(without_description(state["model"]))
        for name, optimizer in self._optimizers_by_name().items():
            optimizer.load_state_dict(state[name])
            make_capturable(optimizer)
        self.location.copy_(state["location"])
        self.raw_scale.copy_(state["raw_scale"])


class FixedHyperparameters(Method):
    """Ordinary training: hyperparameters stay at their first guess, and the weights do not respond to them.

    The response parameters of gated layers (``response_weight``, ``response_projection``, ``response_bias``,
    ``weight_gate``, ``bias_gate``, and those of each LSTM layer, such as ``weight_gate_hh_l0``) have no effect: they
    are not trained, and the response input is zero. Arguments are those of `Method`.
    """

    def __init__(
        self, model: nn.Module, space: HyperparameterSpace, training_objective: Objective, **options: Any
    ) -> None:
        super().__init__(model, space.with_response("shifted"), training_objective, **options)

    def _trained(self) -> list[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if is_response(name):
                parameter.requires_grad_(False)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """Raises RuntimeError: there is nothing to tune."""
        raise RuntimeError("FixedHyperparameters does not tune hyperparameters: call only train_step")

    def scales(self) -> Tensor:
        return torch.zeros_like(self.location)

    def _at(self, **draw: Any) -> HyperBatch:
        """The hyperparameters of the network, with which it is a plain one."""
        return self.space.at(self.location, **draw, centred=True)

    def _training_hypers(self, draw: dict[str, Any]) -> list[HyperBatch]:
        return [self._at(**draw)]

    def unperturbed(self, batch_size: int) -> HyperBatch:
        return self._at(batch_size=batch_size)


class SelfTuning(Method):
    """A Self-Tuning Network (MacKay et al., ICLR 2019, algorithm 1).

    A training step minimises the training objective over all model parameters, with a detached perturbation of the
    hyperparameters for each example. By default, it makes two passes, with opposite perturbations λ ± σε of each
    example and the same draws for the masks and noise of this package's layers (antithetic sampling): what the
    gradients of the response have in common with those of the weights, which is most of their noise, cancels. Layers
    of torch, such as `nn.Dropout`, draw anew in each pass. Running statistics are those of the first pass. After
    clipping, gradients of the response of this package's layers are divided by max(1, E[s²]), where s is the gate of
    their output: wide perturbations would otherwise need smaller steps for R than for W.

    A validation step minimises F(model(x; λ̃)) − τ·entropy(σ) over the location and raw scale only, through the
    response; the model is in evaluation mode and no weight gradient is computed.

    Args:
        model, space, training_objective, optimizer, clip, skip_nonfinite, seed, precision, allow_unused: as for
            ``Method``.
        validation_objective: F, without penalties.
        hyper_optimizer: makes the optimizer of location and raw scale.
        entropy_weight: τ.
        tune_scales: whether to tune σ. If False, validation steps are unperturbed and use folded weights.
        freeze: whether to keep location and scale fixed; weights and response are still trained under perturbations.
        antithetic: whether training steps make the two passes; False for one, as published.
    """

    responds = (  # what a model needs whose validation loss depends on the hyperparameters
        "the model needs layers that respond to them, such as HyperLinear, called with the HyperBatch that the "
        "objective is given"
    )

    def __init__(
        self,
        model: nn.Module,
        space: HyperparameterSpace,
        training_objective: Objective,
        validation_objective: Objective,
        *,
        hyper_optimizer: MakeOptimizer = default_hyper_optimizer,
        entropy_weight: float = 1e-3,
        tune_scales: bool = True,
        freeze: bool = False,
        antithetic: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, space, training_objective, **options)
        self.validation_objective = validation_objective
        self.entropy_weight = real_number("SelfTuning", "entropy_weight", entropy_weight)
        self.tune_scales = switch("SelfTuning", "tune_scales", tune_scales)
        self.tunes = not switch("SelfTuning", "freeze", freeze)
        self.antithetic = switch("SelfTuning", "antithetic", antithetic)
        self.tuned = [self.location.requires_grad_()]
        if tune_scales:
            self.tuned.append(self.raw_scale.requires_grad_())
        self.hyper_optimizer = hyper_optimizer(self.tuned)
        self._add_kind("valid_step", Kind(self._validate, self.hyper_optimizer, "validation"))

    def scales(self) -> Tensor:
        return self.space.scales(self.raw_scale.detach())

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Sets each σ to ``factor`` times its first value, within the bounds that all scales have (0.018 to 3.05).

        Raises:
            RuntimeError: σ is tuned.
            ValueError: ``factor`` is not a finite number above 0.
        """
        if self.tune_scales:
            raise RuntimeError("rescale: the scales are tuned; construct the method with tune_scales=False")
        if not real_number("rescale", "factor", factor) > 0:
            raise ValueError(f"rescale: factor must be above 0, got {factor}")
        self.raw_scale.copy_(torch.tensor([inverse_softplus(factor * one.scale) for one in self.space]))
        self.space.clamp_(self.raw_scale)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "validation_objective": self.validation_objective,
            "entropy_weight": self.entropy_weight,
            "tune_scales": self.tune_scales,
            "antithetic": self.antithetic,
        }

    @property
    def training_passes(self) -> int:
        """2 for antithetic steps, else 1."""
        return 2 if self.antithetic else 1

    @torch.no_grad()
    def _training_hypers(self, draw: dict[str, Any]) -> list[HyperBatch]:
        passes = (False, True) if self.antithetic else (False,)
        return [self._perturbed(draw, antithetic) for antithetic in passes]

    def _perturbed(self, draw: dict[str, Any], antithetic: bool = False) -> HyperBatch:
        center = self.center
        return self.space.sample(self.location, self.raw_scale, center=center, antithetic=antithetic, **draw)

    @property
    def center(self) -> Tensor | None:
        """The location at which the response input is 0; None for the first one."""
        return None

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """Updates location and raw scale on one validation batch; arguments as for ``train_step``.

        Returns F without the entropy term, a detached scalar on the device. Weights, their ``.grad`` and the modes of
        all modules do not change.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; on CUDA, of an earlier step.
            RuntimeError: the validation loss does not depend on any hyperparameter, or gradients are switched off.
            TypeError: this is not a batch.
        """
        if not self.tunes:
            raise RuntimeError("freeze=True holds the hyperparameters: call only train_step")
        batch = self.begin("valid_step", batch)
        with float32_products(self.precision):
            return self._validate(batch, step, first_example)

    def _validate(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        """The step itself. After the first one, it never waits for a CUDA device."""
        loss, gradients = self._hypergradients(batch, step, first_example)
        self._move(loss, gradients, step, batch.undo)
        return loss

    def _move(
        self, loss: Tensor, gradients: Sequence[Tensor], step: int | Tensor, undo: Callable[[Tensor | None], None]
    ) -> None:
        """Updates location and raw scale, or calls ``undo``, as `Guard.take` does, if something is not finite."""

        def update() -> None:
            for tensor, gradient in zip(self.tuned, gradients, strict=True):
                tensor.grad = gradient
            self.hyper_optimizer.step()

        parts = sum(gradients[1:], gradients[0])  # one number per hyperparameter, finite only where both are
        attempt = Attempt("validation", step, loss, parts, parts.sum(), self._hyperparameter_names)
        self.guard.take(attempt, self.hyper_optimizer, update, undo)
        self.space.clamp_(self.raw_scale)

    def hypergradients(
        self, batch: Any, step: int | Tensor, *, first_example: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What a validation step would use: F, a detached scalar, and the gradients for each of ``tuned``, each (n,).

        The gradient for the location is that of F; the one for the raw scale, if it is tuned, includes the entropy
        term. No weight or hyperparameter is updated, but a window of a text carries its state on. Arguments and errors
        are those of ``valid_step``, but it works with ``freeze=True``.
        """
        batch = self.begin("valid_step", batch)
        with float32_products(self.precision):
            return self._hypergradients(batch, step, first_example)

    def _hypergradients(
        self, batch: Batch, step: int | Tensor, first_example: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with evaluating(self.model), hold_parameters(self.model.parameters()):
            parts, found = parts_of(batch, self.accumulation), list[tuple[Tensor, ...]]()
            for part in parts:
                hyper = self._validation_hyper(self._draw(part.batch, step, first_example + part.first))
                with self._in_use(hyper):
                    loss = self._loss("validation", self.validation_objective, self.model, part.batch, hyper)
                    found.append((loss.detach(), *self._gradients(loss)))
            finish(batch, parts)
            loss, *gradients = (weighted(of_parts, parts) for of_parts in zip(*found, strict=True))
            return self._averaged(loss, gradients, batch.examples)

    def _averaged(self, loss: Tensor, gradients: Sequence[Tensor], examples: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The validation loss and its gradients over the examples of all processes that share the batch."""
        if self.processes is None:
            return loss, tuple(gradients)
        loss_of_all, *others = self.processes.averages([loss, *gradients], examples)
        return loss_of_all.to(loss.dtype), tuple(one.to(self.location.dtype) for one in others)

    def _validation_hyper(self, draw: dict[str, Any]) -> HyperBatch:
        """The hyperparameters of a validation step, which get gradients."""
        if self.tune_scales:
            return self._perturbed(draw)
        return self.space.at(self.location, center=self.center, **draw)

    def _gradients(self, loss: Tensor, backward: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """The gradients of F − τ·entropy for each of ``tuned``, by ``backward(objective, inputs=tuned)`` if given."""
        objective = loss - self.entropy_weight * self.space.entropy(self.raw_scale)
        gradients: tuple[Tensor | None, ...]
        if not loss.requires_grad:
            gradients = (None,)
        elif backward is None:
            gradients = torch.autograd.grad(objective, self.tuned, allow_unused=True)
        else:
            backward(objective, inputs=list(self.tuned))
            gradients = tuple(one.grad for one in self.tuned)
            for one in self.tuned:
                one.grad = None
        found = tuple(gradient for gradient in gradients if gradient is not None)
        if gradients[0] is None:
            raise RuntimeError(f"the validation loss does not depend on the hyperparameters: {self.responds}")
        return found

    def _optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return super()._optimizers_by_name() | {"hyper_optimizer": self.hyper_optimizer}
