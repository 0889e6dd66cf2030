"""The papers' networks, and small ones for tests and first steps."""

from stn_fast.models.mlp import MLP, mlp

__all__ = ["MLP", "mlp"]
