"""Recipes: a model, its data and the default settings.

A recipe is anything with ``config()``, which returns its defaults and imports nothing heavy, and ``build(config)``,
which returns its task: a `Recipe`, or a module with two functions of these names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from stn_fast.errors import UserError, did_you_mean
from stn_fast.files import expanded, is_file

if TYPE_CHECKING:
    from stn_fast.training.config import Config
    from stn_fast.training.task import Task

RECIPES = {
    "digits": "stn_fast.recipes.digits",
    "digits-small": "stn_fast.recipes.digits:digits_small",
    "fashion-mnist-small": "stn_fast.recipes.images:fashion_mnist_small",
    "fashion-mnist": "stn_fast.recipes.images:fashion_mnist",
    "cifar10": "stn_fast.recipes.images:cifar10",
    "ptb-small": "stn_fast.recipes.texts:ptb_small",
    "ptb": "stn_fast.recipes.texts:ptb",
    "wikitext2": "stn_fast.recipes.texts:wikitext2",
    "text": "stn_fast.recipes.texts:text",
}


class RecipeLike(Protocol):
    """The functions that a recipe must have."""

    def config(self) -> Config: ...

    def build(self, config: Config) -> Task: ...


@dataclass(frozen=True)
class Recipe:
    """A recipe made of two functions: ``config()`` returns its defaults, ``build(config)`` its task."""

    config: Callable[[], Config]
    build: Callable[[Config], Task]


def recipe(name: str) -> RecipeLike:
    """The recipe called ``name`` in the table above, or your own: ``path/to/file.py:name`` or ``package.module:name``.

    Without ``:name``, it is the module itself. A recipe in the table is found without any heavy import.

    Raises:
        UserError: there is no such recipe, or it lacks ``config`` or ``build``. Errors raised by your own module on
            import are not caught.
    """
    place = RECIPES.get(name, name)
    file, attribute = _split(place)
    if file.endswith(".py"):
        found: object = _module_of_file(file)
    elif "." in file or attribute:
        found = _module(file)
    else:
        near = did_you_mean(name, RECIPES)
        raise UserError(f"unknown recipe '{name}': {near}; name your own as in my_task.py:recipe")
    if attribute:
        if not hasattr(found, attribute):
            raise UserError(f"recipe '{name}': {file} has no '{attribute}'")
        found = getattr(found, attribute)
    missing = [part for part in ("config", "build") if not callable(getattr(found, part, None))]
    if missing:
        lacks = " and no function ".join(missing)
        raise UserError(f"recipe '{name}' has no function {lacks}: see stn_fast.recipes.Recipe")
    return found  # type: ignore[return-value]


def _split(place: str) -> tuple[str, str]:
    """(file or module, name in it or an empty string); paths may contain colons too."""
    file, _, attribute = place.rpartition(":")
    is_place = file.endswith(".py") or all(part.isidentifier() for part in file.split("."))
    return (file, attribute) if is_place and attribute.isidentifier() else (place, "")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports is missing
        raise UserError(f"there is no module {name} to take a recipe from") from None


def _module_of_file(file: str) -> ModuleType:
    """The module in a file, registered by its path, so that it is run only once."""
    path = expanded(file, "the recipe").resolve()
    if not is_file(path):
        raise UserError(f"there is no file {file} to take a recipe from")
    name = f"stn_fast_recipe_{path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # whatever ends in .py has a loader
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # so that it can import modules beside it, as a script can
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[name]
