"""Checks that the contents of a result.json are complete and undamaged."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from stn_fast.training.config import Config

COUNTS = ("steps", "valid_steps", "epochs", "best_step", "train_examples", "valid_examples", "processes")
TIMES = ("wall_seconds", "cpu_seconds", "step_cpu_seconds", "steps_per_second")
NULLABLE = ("peak_bytes", "valid_loss")
SCORES = (
    "test_loss",
    "valid_accuracy",
    "test_accuracy",
    "valid_perplexity",
    "test_perplexity",
    "vocabulary",
    "unknown_share",
)
BY_NAME = ("hyperparameters", "hyperparameters_start", "hyperparameters_end", "moved_in_initial_scales")


def is_result(value: Any, config: Config) -> bool:
    """Whether ``value``, read from JSON, has everything that a run with ``config`` writes into its result."""
    if not isinstance(value, dict):
        return False
    run = (value.get("recipe"), value.get("method"), value.get("seed"))
    return (
        run == (config.recipe, config.method.label, config.seed)
        and value.get("precision") == config.precision
        and _is_capture(value.get("captured"))
        and all(isinstance(value.get(key), int) and _is_number(value[key]) for key in COUNTS)
        and all(_is_number(value.get(key)) for key in TIMES)
        and all(key in value for key in NULLABLE)
        and ("test_loss" in value or config.fit is not None)  # a fit may have no test examples
        and _are_nullable(value[key] for key in (*NULLABLE, *SCORES) if key in value)
        and isinstance(value.get("ended_by"), str)
        and isinstance(value.get("versions"), dict)
        and all(_is_nullable_by_name(value.get(key)) for key in BY_NAME)
        and len({frozenset(value[key]) for key in BY_NAME}) == 1  # a user's task may have any names
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _are_nullable(values: Iterable[Any]) -> bool:
    """Whether each is a number, or None, which stands for one that is not finite or unknown."""
    return all(value is None or _is_number(value) for value in values)


def _is_capture(value: Any) -> bool:
    """Whether this is a result of `stn_fast.training.run.captured`."""
    if value is None:
        return True
    return isinstance(value, dict) and _is_number(value.get("steps")) and isinstance(value.get("reasons"), list)


def _is_nullable_by_name(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and _are_nullable(value.values())
