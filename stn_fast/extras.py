"""Packages that only the command lines and the recipes need, installed by the extra ``train``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from stn_fast.errors import UserError


@contextmanager
def extra(package: str) -> Iterator[None]:
    """Around an import of ``package``, named as it is installed: where it is missing, one line says what to do.

    Raises:
        UserError: it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stn_fast"):
            raise
        raise UserError(f"{package} is missing: pip install 'stn-fast[train]' installs it ({error})") from None


def require(package: str) -> None:
    """Raises UserError where ``package``, whose module has its name, is missing; imports nothing."""
    with extra(package):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
