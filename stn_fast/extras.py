"""Optional packages, installed by the extras ``train``, ``compare``, ``examples`` and of each logger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from stn_fast.errors import UserError

# All others are for train, which these include.
EXTRAS = {
    "optuna": "compare",
    "timm": "examples",
    "transformers": "examples",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


@contextmanager
def extra(package: str) -> Iterator[None]:
    """Turns a failed import of ``package`` (its name for pip) inside into an error that says how to install it.

    Raises:
        UserError: the package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stn_fast"):
            raise
        name = EXTRAS.get(package, "train")
        raise UserError(f"{package} is missing: pip install 'stn-fast[{name}]' installs it ({error})") from None


def require(package: str) -> None:
    """Raises UserError if ``package``, whose module has the same name, is missing; imports nothing."""
    with extra(package):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
