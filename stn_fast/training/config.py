"""The configuration of a run: frozen dataclasses that validate their values.

Error messages name the key (as spelled in ``--set`` and YAML files), the value and what would be right. This module
imports nothing heavy, so that ``--help`` and ``--print-config`` are fast.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal, get_args

from stn_fast.errors import UserError, did_you_mean
from stn_fast.files import expanded
from stn_fast.hyperparameter import Hyperparameter, Response, ResponseRank, WrongHyperparameter
from stn_fast.training.fit_config import FitConfig

# Keys that have a flag of their own on the command line.
FLAGS = {
    "recipe": "the first argument",
    "method.name": "--method",
    "method.freeze": "--freeze",
    "seed": "--seed",
    "device": "--device",
    "schedule.epochs": "--epochs",
    "schedule.max_steps": "--max-steps",
    "train_fraction": "--train-fraction",
    "data_root": "--data-root",
    "run_dir": "--run-dir",
}

# Keys that may change when a run is resumed: they decide how long it runs and where its files are, not its numbers.
FREE_ON_RESUME = (
    "schedule.epochs",
    "schedule.max_steps",
    "schedule.patience",
    "optimizer.min_learning_rate",
    "schedule.checkpoint_epochs",
    "schedule.checkpoints_kept",
    "capture",
    "loggers",
    "data_root",
    "run_dir",
)


class ConfigError(UserError):
    """An invalid configuration value: its ``key``, the ``value``, and ``expected``, which says what would be right."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        self.key, self.value, self.expected = key, value, expected
        flag = f" ({FLAGS[key]})" if key in FLAGS else ""
        super().__init__(f"{key}{flag} = {value!r}: {expected}")

    def under(self, section: str) -> "ConfigError":
        """The same error with ``section`` put before its key."""
        return ConfigError(f"{section}.{self.key}", self.value, self.expected)


def _require(right: bool, key: str, value: object, expected: str) -> None:
    if not right:
        raise ConfigError(key, value, expected)


def _require_at_least(low: float, **values: float | None) -> None:
    for key, value in values.items():
        _require(value is None or value >= low, key, value, f"must be at least {low}")


def _require_positive(**values: float) -> None:
    for key, value in values.items():
        _require(isfinite(value) and value > 0, key, value, "must be a finite number above 0")


@dataclass(frozen=True)
class HyperparameterConfig:
    """One tuned hyperparameter: its first guess, its open range, and the width of its perturbation.

    ``init`` is in the hyperparameter's own units; ``scale`` is a standard deviation in unconstrained units. With
    ``enabled: false``, the hyperparameter is left out: the regulariser that it controls is off, and no weight responds
    to it.
    """

    init: float
    low: float | None = None
    high: float | None = None
    scale: float = 0.5
    integer: bool = False
    per_example: bool = True
    enabled: bool = True

    def __post_init__(self) -> None:
        try:
            self.named("of a configuration")
        except WrongHyperparameter as wrong:
            raise ConfigError(wrong.argument, wrong.value, wrong.problem) from None

    def named(self, name: str, response: Response = "shifted") -> Hyperparameter:
        """The ``Hyperparameter`` of this configuration."""
        return Hyperparameter(
            name,
            init=self.init,
            low=self.low,
            high=self.high,
            scale=self.scale,
            integer=self.integer,
            per_example=self.per_example,
            response=response,
        )


ONLY_FOR = {"delta-stn": ("linearize", "response_learning_rate"), "one-pass": ("weight_decay", "neumann_terms")}
MethodName = Literal["stn", "delta-stn", "one-pass", "fixed"]
METHODS: tuple[str, ...] = get_args(MethodName)
TUNING = tuple(name for name in METHODS if name != "fixed")

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
PrecisionSetting = Literal["auto", "fp32", "tf32", "bf16"]

LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class MethodConfig:
    """How hyperparameters are tuned (``stn``, ``delta-stn``), or that they stay at their first guess (``fixed``).

    ``one-pass`` also keeps them, and tunes the optimizer's learning rate, momentum and decoupled weight decay.

    ``freeze`` trains the self-tuning network under perturbations but does not tune location and scale: a control
    experiment that separates the effect of tuning from that of the extra parameters. After ``warmup_epochs`` of
    training only, ``valid_steps`` validation steps follow every ``train_steps`` training steps. ``tune_scales`` also
    tunes the scales of the perturbations, with ``entropy_weight`` as the weight of their entropy in the validation
    objective. ``antithetic`` makes training steps pass over the batch twice, with opposite perturbations, so that the
    noise of the response's gradients cancels. ``response`` is what the gates see: the shift from the first location
    (``shifted``), the unconstrained sample (``raw``) or its constrained value (``value``). ``delta-stn`` centres it at
    the current location, so that the first two are the same.

    Scales that are not tuned shrink to ``scale_decay`` times their first size over ``schedule.epochs``, by the same
    factor after every epoch. Wide ones find the way from a bad first guess; narrow ones tell better where to stop.

    ``response_start`` is how the response of this package's layers starts: at 0, with gates of size 1 (``zero``), so
    that it learns at once; or at random, with gates near 0 (``published``).

    ``response_rank`` is the rank of the response of every layer's weights: a whole number; ``auto`` for the largest, at
    least 1, that adds at most 5 % to a layer's arithmetic; null for full responses, which double it.

    Only for ``delta-stn``: ``linearize`` uses the first-order change of the outputs in response steps, and
    ``response_learning_rate`` is the learning rate of the response; null for that of the weights. Both rates decay
    together.

    Only for ``one-pass``: ``weight_decay`` is the first guess of the decoupled weight decay, 0 for none, and
    ``neumann_terms`` the number of terms of the approximate inverse in the hypergradient. The learning rate must not
    also decay: ``optimizer.decay_factor`` must be 1.
    """

    name: MethodName = "stn"
    freeze: bool = False
    train_steps: int = 2
    valid_steps: int = 1
    warmup_epochs: int = 3
    tune_scales: bool = True
    entropy_weight: float = 1e-3
    scale_decay: float = 1.0
    antithetic: bool = True
    response: Response = "shifted"
    response_start: Literal["zero", "published"] = "zero"
    response_rank: ResponseRank = None
    linearize: bool = True
    response_learning_rate: float | None = None
    weight_decay: float = 1e-4
    neumann_terms: int = 5

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "name", self.name, did_you_mean(str(self.name), METHODS))
        _require(
            not (self.freeze and self.name in ("fixed", "one-pass")),
            "freeze",
            self.freeze,
            f"only applies to methods whose weights respond; --method {self.name} has no response",
        )
        for method, keys in ONLY_FOR.items():
            for key in keys:
                given = getattr(self, key)
                is_default = given == type(self).__dataclass_fields__[key].default
                _require(is_default or self.name == method, key, given, f"only applies to --method {method}")
        if self.response_learning_rate is not None:
            _require_positive(response_learning_rate=self.response_learning_rate)
        _require_at_least(0, weight_decay=self.weight_decay)
        _require_at_least(1, neumann_terms=self.neumann_terms)
        centred = self.name != "delta-stn" or self.response != "value"
        _require(centred, "response", self.response, "must be shifted or raw for --method delta-stn, which centres it")
        _require_at_least(1, train_steps=self.train_steps, valid_steps=self.valid_steps)
        _require_at_least(0, warmup_epochs=self.warmup_epochs)
        entropy_is_right = isfinite(self.entropy_weight) and self.entropy_weight >= 0
        _require(entropy_is_right, "entropy_weight", self.entropy_weight, "must be finite and at least 0")
        _require_positive(scale_decay=self.scale_decay)
        decays = self.scale_decay == 1 or not self.tune_scales
        _require(decays, "scale_decay", self.scale_decay, "only applies if tune_scales is false")
        starts = ("zero", "published")
        start = self.response_start
        _require(start in starts, "response_start", start, did_you_mean(start, starts))
        responses = ("shifted", "raw", "value")
        _require(self.response in responses, "response", self.response, did_you_mean(self.response, responses))
        rank = self.response_rank
        is_rank = rank is None or rank == "auto" or (isinstance(rank, int) and rank >= 1)
        _require(is_rank, "response_rank", rank, "must be a whole number of at least 1, auto or null")

    @property
    def tunes(self) -> bool:
        """Whether validation steps move the hyperparameters."""
        return self.name != "fixed" and not self.freeze

    @property
    def has_response(self) -> bool:
        """Whether the weights respond to the hyperparameters."""
        return self.name in ("stn", "delta-stn")

    @property
    def label(self) -> str:
        """The method's name in file names and legends."""
        return f"{self.name}-frozen" if self.freeze else self.name


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the weights: SGD with momentum, or Adam with ``momentum`` as its β₁.

    A gradient whose Euclidean norm over all weights exceeds ``clip`` is scaled down to it; null means no limit.

    After every epoch whose validation loss is no better than the best loss from ``decay_patience`` or more epochs
    before, the learning rate is multiplied by ``decay_factor`` (1: never changed). The run ends once the learning rate
    is below ``min_learning_rate``.

    Evaluations, and so the result, use an exponential moving average of the weights over training steps, whose decay is
    ``average`` (0: the weights themselves). It changes neither training nor validation steps.
    """

    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    clip: float | None = 1.0
    decay_factor: float = 1.0
    decay_patience: int = 10
    min_learning_rate: float = 0.0
    average: float = 0.0

    def __post_init__(self) -> None:
        names = ("sgd", "adam")
        _require(self.name in names, "name", self.name, did_you_mean(self.name, names))
        _require_positive(learning_rate=self.learning_rate)
        if self.clip is not None:
            _require_positive(clip=self.clip)
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "must be at least 0 and below 1")
        _require(0 < self.decay_factor <= 1, "decay_factor", self.decay_factor, "must be above 0 and at most 1")
        _require_at_least(1, decay_patience=self.decay_patience)
        low, start = self.min_learning_rate, self.learning_rate
        _require(0 <= self.average < 1, "average", self.average, "must be at least 0 and below 1")
        _require(0 <= low < start, "min_learning_rate", low, f"must be at least 0 and below learning_rate = {start}")


@dataclass(frozen=True)
class HyperOptimizerConfig:
    """The optimizer of the hyperparameters' locations and scales: Adam or RMSprop.

    ``beta2`` is the decay of the mean of squared gradients, Adam's β₂ and RMSprop's α. By default it equals Adam's β₁:
    a step of Adam is at most ``learning_rate``, and large gradients early in a run, when the response is still wrong,
    do not slow down the steps that follow for long.
    """

    name: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = 1e-2
    beta2: float = 0.9

    def __post_init__(self) -> None:
        names = ("adam", "rmsprop")
        _require(self.name in names, "name", self.name, did_you_mean(self.name, names))
        _require_positive(learning_rate=self.learning_rate)
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "must be at least 0 and below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """The length of a run and its batch sizes.

    A run ends after ``epochs``, after ``max_steps`` (training and validation steps together, like ``step`` in
    ``metrics.jsonl``), or after ``patience`` epochs in a row without a new best validation loss. A checkpoint is
    written every ``checkpoint_epochs`` and at every new best validation loss. The last ``checkpoints_kept`` of them
    stay on the disk, and the best one as of each.

    ``batch_size`` and ``valid_batch_size`` are the examples of a step; for a text, the columns that are read in
    parallel. An evaluation reads about ``eval_batch_size`` examples (for a text, words) at a time; it affects no score.

    ``accumulation`` is the number of parts of each training and validation batch (of a process's share of it), whose
    gradients are computed one after the other and added. Results are the same up to rounding, except for batch norms,
    which normalise by the statistics of each part, and memory is needed for the activations of one part only.
    """

    epochs: int = 100
    max_steps: int | None = None
    patience: int | None = None
    batch_size: int = 100
    valid_batch_size: int = 100
    eval_batch_size: int = 1000
    checkpoint_epochs: int = 10
    accumulation: int = 1
    checkpoints_kept: int = 2

    def __post_init__(self) -> None:
        _require_at_least(1, epochs=self.epochs, max_steps=self.max_steps, patience=self.patience)
        _require_at_least(1, batch_size=self.batch_size, valid_batch_size=self.valid_batch_size)
        _require_at_least(1, eval_batch_size=self.eval_batch_size, checkpoint_epochs=self.checkpoint_epochs)
        _require_at_least(1, accumulation=self.accumulation)
        most = min(self.batch_size, self.valid_batch_size)
        of_one = f"must be at most {most}, the smaller of batch_size and valid_batch_size"
        _require(self.accumulation <= most, "accumulation", self.accumulation, of_one)
        _require_at_least(2, checkpoints_kept=self.checkpoints_kept)  # one is used if the other is damaged


@dataclass(frozen=True)
class TextConfig:
    """How a text is read, and the size of the LSTM language model.

    ``width`` is the size of the word embeddings and of each of the ``layers``. Each step reads ``window`` words of
    every column; gradients reach back no further. An evaluation cuts the validation text into ``valid_streams`` columns
    and the test text into ``test_streams``. Each column begins without context, so fewer columns give a better and more
    accurate perplexity but take longer. Words that occur fewer than ``min_count`` times in the training text are read
    as ``<unk>``.
    """

    window: int = 70
    valid_streams: int = 10
    test_streams: int = 1
    min_count: int = 1
    width: int = 650
    layers: int = 2

    def __post_init__(self) -> None:
        _require_at_least(1, window=self.window, min_count=self.min_count, width=self.width, layers=self.layers)
        _require_at_least(1, valid_streams=self.valid_streams, test_streams=self.test_streams)


@dataclass(frozen=True)
class Config:
    """A whole run. ``run_dir`` defaults to ``runs/<recipe>-<method>-seed<seed>``; ``text`` is set only for texts.

    ``fit`` is set only for runs of `stn_fast.fit`. Its optimizers are described there: of ``optimizer``, only ``clip``
    applies to them, and of ``hyper_optimizer``, only ``learning_rate``.

    ``train_fraction`` is the fraction of the training examples to use; validation and test sets are always complete.
    ``threads`` is the number of CPU threads, by default torch's own; rounding may depend on it.

    ``precision`` is the precision of the matrix products, convolutions and LSTMs of a step: ``fp32``; ``tf32``, faster
    on CUDA, with ten mantissa bits for each factor; ``bf16``, autocast to bfloat16, with weights, hyperparameters,
    gradient norms and losses in float32. Evaluations always use float32. ``auto`` is bf16 on CUDA and fp32 on the CPU;
    it is the default of recipes whose recorded runs in bf16 are as good as in fp32 (``benchmarks/precision.py``).
    ``capture`` turns each kind of step into a CUDA graph, which gives the same numbers faster; it does nothing on the
    CPU.

    ``loggers`` show the rows of ``metrics.jsonl`` elsewhere, too: ``tensorboard``, ``wandb`` (Weights & Biases) or
    ``mlflow``.
    """

    recipe: str
    hyperparameters: Mapping[str, HyperparameterConfig]
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    hyper_optimizer: HyperOptimizerConfig = field(default_factory=HyperOptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: TextConfig | None = None
    fit: FitConfig | None = None
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    precision: PrecisionSetting = "fp32"
    capture: bool = True
    loggers: tuple[str, ...] = ()
    train_fraction: float = 1.0
    data_root: str | None = None
    run_dir: str | None = None

    def __post_init__(self) -> None:
        rate_is_tuned, factor = self.method.name == "one-pass", self.optimizer.decay_factor
        only = "must be 1 for --method one-pass, which tunes the learning rate"
        _require(not rate_is_tuned or factor == 1, "optimizer.decay_factor", factor, only)
        parts = self.schedule.accumulation
        at_once = "must be 1 for --method one-pass, whose second derivatives are those of the whole batch"
        _require(not rate_is_tuned or parts == 1, "schedule.accumulation", parts, at_once)
        names = list(self.hyperparameters)
        _require(len(self.enabled) > 0, "hyperparameters", names, "needs at least one that is enabled")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be at least 0 and below 2**63")
        _require_at_least(1, threads=self.threads)
        whole = [name for name, entry in self.enabled.items() if entry.integer and self.method.has_response]
        untuned = "cannot tune integers, as their value has no gradient; use shifted, or disable " + ", ".join(whole)
        _require(self.method.response != "value" or not whole, "method.response", "value", untuned)
        share = self.train_fraction
        _require(0 < share <= 1, "train_fraction", share, "must be above 0 and at most 1")
        devices = ("cpu", "cuda")
        _require(self.device in devices, "device", self.device, did_you_mean(self.device, devices))
        precision, settings = self.precision, ("auto", *PRECISIONS)
        _require(precision in settings, "precision", precision, did_you_mean(precision, settings))
        for name in self.loggers:
            _require(name in LOGGERS, "loggers", name, did_you_mean(name, LOGGERS))
        twice = len(set(self.loggers)) < len(self.loggers)
        _require(not twice, "loggers", list(self.loggers), "must name each logger once")

    @property
    def resolved(self) -> "Config":
        """The same run with ``auto`` replaced by the precision for its device."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if self.device == "cuda" else "fp32")

    @property
    def enabled(self) -> dict[str, HyperparameterConfig]:
        """The hyperparameters that the run uses."""
        return {name: entry for name, entry in self.hyperparameters.items() if entry.enabled}

    @property
    def directory(self) -> str:
        """The directory of the run's files; by default a folder in ``runs/`` named after the run."""
        recipe = re.sub(r"[^\w.-]", "_", self.recipe)
        return str(expanded(self.run_dir or f"runs/{recipe}-{self.method.label}-seed{self.seed}", "--run-dir"))


def as_published(config: Config) -> Config:
    """``config`` with the papers' start of the response, their steps of one pass, and torch's own β₂ or α.

    Scales that shrink over the run have their last size from the start.
    """
    hyper, decay = config.hyper_optimizer, config.method.scale_decay
    return replace(
        config,
        hyperparameters={name: replace(one, scale=decay * one.scale) for name, one in config.hyperparameters.items()},
        method=replace(config.method, antithetic=False, response_start="published", scale_decay=1.0),
        hyper_optimizer=replace(hyper, beta2=0.999 if hyper.name == "adam" else 0.99),
    )
