"""The method that a configuration names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stn_fast.conversion.folding import tuned_in
from stn_fast.training.config import Config
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.methods import FixedHyperparameters, Method, SelfTuning
from stn_fast.training.one_pass import OnePass
from stn_fast.training.optimizers import hyper_optimizer, weight_optimizer
from stn_fast.training.start import start_as_published
from stn_fast.training.task import Task


def build_method(config: Config, task: Task) -> Method:
    """Builds the method that ``config.method`` names, for ``task``."""
    tuned = tuned_in(task.model)
    given: dict[str, Any] = dict(
        optimizer=weight_optimizer(config.optimizer),
        clip=config.optimizer.clip,
        seed=config.seed,
        accumulation=config.schedule.accumulation,
        precision=config.resolved.precision,
        allow_unused=task.allow_unused,
    )
    if config.method.has_response and config.method.response_start == "published":
        start_as_published(task.model, config.seed, gates=0.01 if config.method.name == "stn" else 0.0)
    if tuned is not None:
        tuned.centre(config.method.name == "delta-stn")
    if config.method.name == "fixed":
        return FixedHyperparameters(task.model, task.space, task.training_objective, **given)
    operands = (task.model, task.space, task.training_objective, task.validation_objective)
    given["hyper_optimizer"] = hyper_optimizer(config.hyper_optimizer)
    if config.method.name == "one-pass":
        decay, terms = config.method.weight_decay, config.method.neumann_terms
        return OnePass(*operands, weight_decay=decay, neumann_terms=terms, **given)
    given |= dict(
        entropy_weight=config.method.entropy_weight,
        tune_scales=config.method.tune_scales,
        freeze=config.method.freeze,
        antithetic=config.method.antithetic,
    )
    if config.method.name == "stn":
        return SelfTuning(*operands, **given)
    rate = config.method.response_learning_rate
    of_response = config.optimizer if rate is None else replace(config.optimizer, learning_rate=rate)
    return DeltaSelfTuning(
        *operands, response_optimizer=weight_optimizer(of_response), linearize=config.method.linearize, **given
    )
