"""A run of the digits recipe short enough for a test."""

from dataclasses import replace
from pathlib import Path

from stn_fast.recipes import digits
from stn_fast.training.config import Config
from stn_fast.training.layering import resolve


def short(directory: Path, *pairs: str) -> Config:
    """Two epochs of warm-up, six in all."""
    pairs = ("schedule.epochs=6", "method.warmup_epochs=2", "schedule.checkpoint_epochs=2", *pairs)
    return replace(resolve(digits.config(), None, pairs), run_dir=str(directory))
