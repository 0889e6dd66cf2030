"""SelfTuner and alternate: self-tuning of a converted model in a loop of your own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from stn_fast.checks import switch, whole_number
from stn_fast.conversion.additions import LabelSmoothing
from stn_fast.conversion.folding import fold, tuned_of
from stn_fast.conversion.rows import check_rows, first_tensor, structure
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.files import expanded
from stn_fast.hyperparameters import HyperBatch
from stn_fast.training import tuner_checkpoint
from stn_fast.training.batches import Examples, as_batch
from stn_fast.training.config import Precision
from stn_fast.training.converted import (
    METHODS,
    TuningMethod,
    check_converted,
    check_method,
    check_optimizers,
    response_parameters,
)
from stn_fast.training.distributed import Processes, StepKind
from stn_fast.training.generators import default_generators
from stn_fast.training.optimizers import MakeOptimizer, default_hyper_optimizer
from stn_fast.training.parameters import listed
from stn_fast.training.pass_rows import MOST_CHECKS
from stn_fast.training.passes import Passes
from stn_fast.training.sharding import sharding_of
from stn_fast.training.smoothing import cross_entropy_settings, is_mean_cross_entropy, smoothed_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

Loss = Callable[[Any, Any], Tensor]

STATE = {"method", "draws", "trained", "validated", "history", "generators"}  # the keys of a state


class _Batch(Examples):
    """Examples counted by the first dimension of the first input tensor."""

    @property
    def examples(self) -> int:
        first = first_tensor(self.inputs)
        if first is None or first.ndim == 0:
            raise TypeError("SelfTuner: the first input of a batch must be a tensor, with the examples in dimension 0")
        return len(first)

    def like(self, parts: Any) -> _Batch:
        return _Batch(*parts)


class SelfTuner(Passes):
    """Trains a converted model and tunes its hyperparameters, in a loop of your own.

        tuned = stn.convert(model)
        tuner = stn.SelfTuner(tuned, torch.optim.AdamW(tuned.parameters(), 1e-3, weight_decay=0), loss=F.cross_entropy)
        for batch, held_out in stn.alternate(train_loader, valid_loader, epochs=20):
            tuner.step(batch, held_out)
        plain = tuner.fold()

    A batch (inputs, targets) calls ``loss(model(inputs), targets)``; with more entries, the last one is the targets
    and the others are the arguments of the model. A dict calls ``loss(model(**batch), batch)``, as for models of
    transformers with ``loss=lambda output, batch: output.loss``. The first dimension of the first input counts the
    examples, also for a model that calls it time. Sequences are padded, not a PackedSequence. Batches are not moved to
    another device. Activation checkpointing in the model must not be reentrant (``use_reentrant=False``).

    A loop that calls backward, zero_grad and the optimizer's step itself uses passes instead of steps: `training`,
    `validating` and `hyper_step`.

    With several processes, give `process_group`. Steps average the gradients themselves, over the examples of all
    processes, which may differ in number. In passes, call the module that DistributedDataParallel, Fabric or
    Accelerate made of the model, which averages them, and give each process as many examples.

    A model that does not fit on one device is converted, then sharded by `torch.distributed.fsdp.fully_shard`, blocks
    and root, over a mesh of one dimension; then the optimizer and the tuner are made. λ and σ are in all processes; W
    and its response are sharded. All processes must begin with the same weights, as after the same seed. Delta-stn
    needs ``linearize=False``. On CUDA, the host waits for each step. CPU offload and other parallelism beside it are
    refused, and so is `fold`, whose error says what to do.

    The training loss also gets ½·weight_decay·‖W_eff‖² of the converted layers, if the space has `weight_decay`; with
    additions of `stn_fast.WeightDecay`, each layer has its own hyperparameter. An optimizer that decays weights itself
    decays them and the response as well, which is a warning. An addition of `stn_fast.LabelSmoothing` smooths the
    training loss of steps; in passes, smooth the labels by hand.

    Args:
        model: a converted one, as `convert` returns, or DistributedDataParallel around one. The attribute `model` is
            the converted one, which steps call.
        optimizer: holds the parameters of the model, made after the conversion.
        loss: returns the mean over the examples, without penalties. Not needed in loops that use only passes. With
            label smoothing, steps need `F.cross_entropy` or a `CrossEntropyLoss` with mean reduction; see
            `stn_fast.LabelSmoothing` for other losses.
        method: "stn" for the steps of `SelfTuning`; "delta-stn" for those of `DeltaSelfTuning`, whose response is
            centred at the current hyperparameters, so that evaluation and folding use W and b as they are.
        response_optimizer: for delta-stn, makes the optimizer of the response from a list of its parameters. By
            default, `optimizer` takes both of its steps: each time, only what the step trains has a gradient.
        linearize: for delta-stn, whether the response step linearises the outputs. False for a model that returns its
            loss, uses activation checkpointing, or has an operation that torch can't differentiate in forward mode.
        valid_loss: what the hyperparameters minimise; by default `loss`.
        hyper_optimizer: makes the optimizer of location and raw scale from the list of them.
        warmup_steps: training steps before the first validation step.
        entropy_weight, tune_scales, antithetic, clip, seed, skip_nonfinite, precision: as for `SelfTuning`.
        check_rows: whether to check, at the first step with each structure of batch and at the model's call in the
            first pass, which examples the rows of a layer's input belong to, as `stn_fast.conversion.check_rows` does;
            again at the next ones, up to 10 times, if rows are the same for all examples, as they are after a layer
            that starts at 0. Compiled code checks nothing in passes. False for a model that can't be called with
            another number of examples, keeps a state between calls, or pads to the longest example of a call.
        process_group: the processes that share each batch, such as ``torch.distributed.group.WORLD``, which is None
            where there is only one; by default that of a DistributedDataParallel. Every process draws for its own
            examples what one process would draw for them in the whole batch. Steps average gradients and the running
            statistics of batch norms, and all begin with the weights of the first process. Delta-stn only takes steps.
            A model that `fully_shard` has sharded over these processes needs it, too, and equal shares of each batch.

    Raises:
        TypeError: the model has not been converted, `optimizer` is not an optimizer, or `process_group` no group.
        ValueError: the optimizer lacks parameters of the response, or is another model's; a setting is out of range; a
            converted layer has been replaced by a plain one, as `nn.SyncBatchNorm.convert_sync_batchnorm` does;
            `loss` can't be smoothed, although the model was converted with label smoothing; the other method has tuned
            the model's hyperparameters before; the model is sharded in a way that is not supported, or over other
            processes than `process_group`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
        *,
        method: TuningMethod = "stn",
        response_optimizer: MakeOptimizer | None = None,
        linearize: bool = True,
        valid_loss: Loss | None = None,
        hyper_optimizer: MakeOptimizer = default_hyper_optimizer,
        warmup_steps: int = 0,
        entropy_weight: float = 1e-3,
        tune_scales: bool = True,
        antithetic: bool = True,
        clip: float | None = 1.0,
        seed: int = 0,
        skip_nonfinite: int = 0,
        precision: Precision = "fp32",
        check_rows: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = _group_of(model, process_group)
            model = model.module
        tuned = self._tuned = tuned_of("SelfTuner", model)
        self.warmup_steps = whole_number("SelfTuner", "warmup_steps", warmup_steps, 0)
        self.check_rows = switch("SelfTuner", "check_rows", check_rows)
        for name, given in (("loss", loss), ("valid_loss", valid_loss)):
            if given is not None and (not callable(given) or isinstance(given, type)):
                raise TypeError(f"SelfTuner: {name} must be a function of outputs and targets, got {given!r}")
        self.model, self.loss, self.valid_loss = model, loss, valid_loss or loss
        self._smoothing = _smoothing(tuned, loss, valid_loss)
        options: dict[str, Any] = dict(
            optimizer=lambda parameters: optimizer,
            hyper_optimizer=hyper_optimizer,
            entropy_weight=entropy_weight,
            tune_scales=tune_scales,
            antithetic=antithetic,
            clip=clip,
            seed=seed,
            skip_nonfinite=skip_nonfinite,
            precision=precision,
        )
        check_method(method, tuned.space, response_optimizer is not None or linearize is not True)
        check_converted(model, tuned)
        processes = _processes(process_group)
        sharding = sharding_of(model, processes)
        if sharding is not None and method == "delta-stn" and linearize:
            raise ValueError(
                "SelfTuner: delta-stn of a sharded model needs linearize=False: fully_shard gathers weights for the "
                "backward pass when an output gets a gradient, and misses the gradients of tangents"
            )
        of_response = optimizer if response_optimizer is None else response_optimizer(response_parameters(model))
        check_optimizers(model, optimizer, of_response)
        if method == "delta-stn":
            options |= dict(response_optimizer=lambda parameters: of_response, linearize=linearize)
        objectives = self._training_objective, self._validation_objective
        made = METHODS[method](model, tuned.space, *objectives, **options)
        tuned.centre(method == "delta-stn")
        super().__init__(made, self.check_rows)
        if sharding is not None:
            made.shard(sharding)
        if processes is not None:
            made.share(processes)
        self._checks = Counter[Any]()  # how often check_rows has called the model with each structure of batch

    def _training_objective(self, model: nn.Module, batch: Examples, hyper: HyperBatch) -> Tensor:
        if self._smoothing is None or self.loss is None:
            return self.method.with_weight_decay(self._of(self.loss, model, batch), hyper)
        settings, smoothing = cross_entropy_settings(self.loss), hyper[self._smoothing]

        def smoothed(output: Any, targets: Any) -> Tensor:
            return smoothed_cross_entropy(output, targets, smoothing, **settings)

        return self.method.with_weight_decay(self._of(smoothed, model, batch), hyper)

    def _validation_objective(self, model: nn.Module, batch: Examples, hyper: HyperBatch) -> Tensor:
        return self._of(self.valid_loss, model, batch)

    def _of(self, loss: Loss | None, model: nn.Module, batch: Examples) -> Tensor:
        if loss is None:
            raise TypeError("SelfTuner: steps need a loss, SelfTuner(model, optimizer, loss); passes need none")
        return loss(called(model, batch.inputs), batch.targets)

    def step(self, batch: Any, held_out: Any = None) -> Tensor:
        """A training step, and after the warm-up a validation step on `held_out`, if it is given.

        Returns the training loss, a detached scalar on the device. Errors are those of `SelfTuning`; with a process
        group, processes that take different steps are a ValueError in all of them.
        """
        loss = self.train_step(batch)
        if held_out is not None and self.trained > self.warmup_steps:
            self.valid_step(held_out)
        return loss

    def train_step(self, batch: Any) -> Tensor:
        """Updates the weights and the response on a training batch; returns the loss."""
        self._check_closed("train_step")
        self._forget_passes()  # their gradients are not used
        batch, first_example = self._shared(batch, "training step")
        loss = self.method.train_step(batch, self.draws, first_example=first_example)
        self.draws, self.trained = self.draws + 1, self.trained + 1
        self._compare()
        return loss

    def valid_step(self, held_out: Any) -> Tensor:
        """Updates the hyperparameters on a validation batch; returns the loss, without the entropy."""
        self._check_closed("valid_step")
        batch, first_example = self._shared(held_out, "validation step")
        loss = self.method.valid_step(batch, self.draws, first_example=first_example)
        self.draws += 1
        self._record(loss)
        return loss

    def _shared(self, batch: Any, kind: StepKind) -> tuple[_Batch, int]:
        """The batch of a step, and the place of its first example in the batch of all processes."""
        converted = self._converted(batch)
        first_example = self._first_of(converted, kind)
        return self._with_known_rows(converted), first_example

    def _first_of(self, batch: _Batch, kind: StepKind) -> int:
        """The place of the first example of this process in the batch of all processes, if all take such a step."""
        processes = self.method.processes
        if processes is None:
            return 0
        counts = processes.counts(batch.examples, kind, self.draws, self.method.location.device)
        if self.method.sharding is not None and len(set(counts)) > 1:
            raise ValueError(
                f"SelfTuner: the processes have {listed([str(count) for count in counts])} examples of a batch, but "
                "fully_shard averages gradients as if all had as many: give each an equal share of every batch"
            )
        return sum(counts[: processes.rank])

    def _batch(self, batch: Any) -> _Batch:
        """The batch as steps take it, with known rows."""
        return self._with_known_rows(self._converted(batch))

    def _converted(self, batch: Any) -> _Batch:
        if isinstance(batch, Mapping):
            entries: Any = dict(batch)
            return _Batch(entries, entries)
        converted = as_batch(batch, self.method.location.device)
        if not isinstance(converted, Examples):
            raise TypeError(f"SelfTuner: a batch must have independent examples, got {type(batch).__name__}")
        inputs: Any = converted.inputs
        if isinstance(inputs, tuple) and not _has_several_inputs(batch):
            inputs = (inputs,)  # the only argument
        return _Batch(inputs, converted.targets)

    def _with_known_rows(self, batch: _Batch) -> _Batch:
        """The batch, after a check of the rows of layers if it is the first of its structure.

        Rows that are all equal, as they can be at the start, say nothing: then the next batches are checked, too.
        """
        if any(map(_is_packed, pytree.tree_leaves(batch.inputs, is_leaf=_is_packed))):
            raise TypeError(
                "SelfTuner: a batch has a PackedSequence, whose rows are not examples, and which a converted LSTM does "
                "not take: give padded sequences, and their lengths as another input if the model needs them"
            )
        if self.check_rows:
            made = structure(batch.inputs)
            unchecked = batch.examples > 0 and self._checks[made] < MOST_CHECKS
            if self.method.in_any_process(unchecked):  # a sharded model is only called in all processes together
                args, kwargs = _arguments(batch.inputs)
                unknown = check_rows(self.model, *args, **kwargs)
                again = self.method.in_any_process(bool(unknown))
                self._checks[made] = self._checks[made] + 1 if again else MOST_CHECKS
        return batch

    def values(self) -> dict[str, float]:
        """The current values of the hyperparameters, by name."""
        return self._tuned.values()

    def scales(self) -> dict[str, float]:
        """The current σ of the perturbations, by name, in units of the unconstrained λ."""
        return self._tuned.scales()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Validation steps: ``step``, the training steps before it; ``loss``; ``values`` after it. It is saved, too."""
        values = self.method.space.values
        return [{"step": one.step, "loss": one.loss.item(), "values": values(one.location)} for one in self._records]

    def plot(self, path: str | Path | None = None) -> Figure:
        """A figure of the history: the validation loss and each hyperparameter over training steps.

        Args:
            path: a .png, .pdf or .svg file to write, too.

        Raises:
            UserError: matplotlib is missing, or the file can't be written.
            ValueError: there has been no validation step.
        """
        from stn_fast.plot import draw_history, save

        if not self._records:
            raise ValueError("plot: there is no history before the first validation step")
        figure = draw_history(self.history, list(self.method.space))
        if path is not None:
            save(figure, path, "path")
        return figure

    def fold(self) -> nn.Module:
        """A plain copy of the model at the current hyperparameters, see `stn_fast.fold`."""
        self.method.check_finite()
        return fold(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Model, hyperparameters, optimizer states, counters, history, and states of torch's generators.

        That is all that a next step depends on but data, and generators of your own. The generators are the default
        one of the CPU and that of the model's CUDA device; with a process group, they are left out, because each
        process has its own.
        """
        counts = {"draws": self.draws, "trained": self.trained, "validated": self.validated}
        generators = {kind: one.get_state() for kind, one in self._generators().items()}
        return {"method": self.method.state_dict(), **counts, "history": self._history(), "generators": generators}

    def _generators(self) -> dict[str, torch.Generator]:
        """Those of torch that layers may draw from, by the type of their device."""
        if self.method.processes is not None:
            return {}
        return {one.device.type: one for one in default_generators(self.method.location.device)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, with the states of torch's generators.

        Raises:
            ValueError: it is something else, or of another method, space or optimizer; nothing has been loaded.
        """
        if not isinstance(state, dict) or not state.keys() >= STATE:
            is_dict = isinstance(state, dict)
            got = f"a dict of {listed([*map(str, state)]) or 'nothing'}" if is_dict else type(state).__name__
            raise ValueError(f"the state must be one that SelfTuner.state_dict() has returned, got {got}")
        self._check_closed("load_state_dict")
        self.method.check_state(state["method"])
        before = self._records
        try:
            self._load_history(state["history"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the history of the state is not one that SelfTuner.state_dict() has returned: {error!r}"
            ) from error
        try:
            self.method.load_state_dict(state["method"])
        except Exception:
            self._records = before
            raise
        self.draws, self.trained, self.validated = state["draws"], state["trained"], state["validated"]
        for kind, generator in self._generators().items():
            if (kept := state["generators"].get(kind)) is not None:  # that of another device is not there
                generator.set_state(kept.cpu())
        self._forget_passes()

    def save(self, directory: str | Path, *, keep: int = 2) -> Path:
        """Writes a checkpoint of what `state_dict` returns, ``directory/step-XXXXXXXX`` after so many training steps.

        Sharded tensors are written in shards, by torch.distributed.checkpoint; with a process group, all processes must
        call this, and see the same directory. A checkpoint is safetensors and JSON, with the SHA-256 of every file. It
        is complete or absent, whenever a process or the machine stops. All but the last ``keep`` are removed, as are
        those of later steps, and an older one of this step is replaced. Each run needs its own directory.

        Raises:
            CannotWrite: the disk is full or cannot be written; earlier checkpoints are intact.
            ProcessesDiffer: as `check_equal`; nothing is written.
            UserError: safetensors is missing, or the state of an optimizer can't be written.
        """
        keep = whole_number("save", "keep", keep, 1)
        self._check_closed("save")
        root = expanded(directory, "directory")
        self.check_equal()
        return tuner_checkpoint.write(root, self.trained, self.state_dict(), keep, self.method.processes)

    def load(self, directory: str | Path) -> Path | None:
        """Restores the newest checkpoint that `save` has written; returns its path, or None if there is none.

        Checksums are compared before anything is read, and no code in it is run. Continued on the same batches by as
        many processes, a run is bit for bit as if it had never stopped, but for random numbers of torch's own layers
        with a process group. Another number of processes, and a model that is not sharded, load it too, with a warning.

        Raises:
            CannotWrite: `save` was killed while it replaced a checkpoint, and the disk can't be written to restore it.
            UserError: all checkpoints are damaged. For each damaged one, a warning says so, and the one before is used.
            ValueError: as for `load_state_dict`.
        """
        root, method = expanded(directory, "directory"), self.method
        found = tuner_checkpoint.read(root, method.processes, method.sharded_like)
        if found is None:
            return None
        path, state = found
        self.load_state_dict(state)
        return path


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _has_several_inputs(batch: Any) -> bool:
    """Whether its last entry is the targets, and the others are the arguments of the model."""
    return isinstance(batch, tuple | list) and len(batch) > 2 and "targets" not in getattr(batch, "_fields", ())


def called(model: nn.Module, inputs: Any) -> Any:
    """The outputs of the model for the inputs of a batch."""
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """(args, kwargs) of the model."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def _group_of(model: nn.parallel.DistributedDataParallel, given: ProcessGroup | None) -> ProcessGroup:
    """The group over which the wrapper averages gradients. Raises ValueError if another one is given."""
    if given is not None and given is not model.process_group:
        raise ValueError("SelfTuner: process_group must be that of the DistributedDataParallel, or be left out")
    return model.process_group


def _processes(group: ProcessGroup | None) -> Processes | None:
    """The processes that share a batch; None if there is only one."""
    if group is None:
        return None
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"SelfTuner: process_group must be one of torch.distributed, got {type(group).__name__}")
    processes = Processes(group)
    return processes if processes.size > 1 else None


def _smoothing(tuned: TunedHyperparameters, loss: Loss | None, valid_loss: Loss | None) -> str | None:
    """The hyperparameter that smooths the labels; None if there is none, or if the loss itself smooths them."""
    names = [one.hyperparameter for one in tuned.added if isinstance(one.addition, LabelSmoothing)]
    if not names or loss is None:
        return None
    if is_mean_cross_entropy(loss):
        return names[0]
    if valid_loss is None:
        raise ValueError(
            f"SelfTuner: with stn.LabelSmoothing, loss must be F.cross_entropy or an nn.CrossEntropyLoss with "
            f"reduction='mean' and label_smoothing=0, got {loss!r}. Another loss must smooth the labels by hand, with "
            f"model.tuned_hyperparameters.current[{names[0]!r}], and needs a valid_loss that does not"
        )
    return None


def alternate(
    train_loader: Iterable[Any], valid_loader: Iterable[Any], train_steps: int = 2, epochs: int = 1
) -> Iterator[tuple[Any, Any | None]]:
    """(batch, held_out) for each batch of `epochs` passes over the training loader.

    `held_out` is a batch of the validation loader after every `train_steps` training batches, and None otherwise. The
    validation loader is started at each call, and again whenever it ends: give all epochs to one call, so that every
    part of it is used.

    Raises:
        ValueError: a loader gives no batch, or train_steps or epochs is not an int >= 1.
    """
    whole_number("alternate", "train_steps", train_steps, 1)
    whole_number("alternate", "epochs", epochs, 1)
    validation = _endless(valid_loader)
    number = 0
    for _ in range(epochs):
        before = number
        for batch in train_loader:
            number += 1
            yield batch, next(validation) if number % train_steps == 0 else None
        if number == before:
            raise ValueError("alternate: train_loader gives no batch; it must be one that can be read again and again")


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("alternate: valid_loader gives no batch; it must be one that can be read again and again")
