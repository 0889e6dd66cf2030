"""Combines a recipe's defaults, a YAML file, ``--set`` pairs and flags into one ``Config``; later ones win."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stn_fast.errors import UserError, did_you_mean
from stn_fast.files import expanded
from stn_fast.training.config import FLAGS, FREE_ON_RESUME, Config, ConfigError
from stn_fast.values import NotYaml, from_yaml
from stn_fast.values import to_yaml as dump

T = TypeVar("T")
Tree = dict[str, Any]


def resolve(
    defaults: Config,
    file: str | None = None,
    pairs: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """``defaults``, overridden by the YAML ``file``, then ``name=value`` ``pairs``, then ``flags`` {dotted key: value}.

    ``settings`` are the contents of ``file`` if it was already read: a pipe can be read only once. If nothing sets
    ``data_root``, it is the environment variable STN_FAST_DATA. Precision ``auto`` is replaced by that of the device.
    """
    tree = asdict(defaults)
    if file is not None:
        overlay(tree, read_yaml(file) if settings is None else settings, where=f"in {file}")
    for pair in pairs:
        overlay(tree, read_pair(pair), where="in --set")
    for key, value in (flags or {}).items():
        overlay(tree, nested(key, value), where=f"from {FLAGS.get(key, key)}")
    if tree["recipe"] != defaults.recipe:
        raise ConfigError(
            "recipe", tree["recipe"], f"this runs '{defaults.recipe}'; name another as the first argument"
        )
    tree["data_root"] = tree["data_root"] or os.environ.get("STN_FAST_DATA") or None
    return build(Config, tree).resolved


def read_pair(pair: str) -> Tree:
    """``read_pair("a.b=1")`` is ``{"a": {"b": 1}}``.

    Raises:
        UserError: it is not ``name=value``, or the value is not YAML.
    """
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise UserError(f"--set {pair}: must be name=value, e.g. --set optimizer.learning_rate=0.1")
    try:
        return nested(key, from_yaml(text))
    except NotYaml as error:
        raise UserError(f"--set {pair}: '{text}' is not a YAML value: {error.problem}") from None


def nested(key: str, value: object) -> Tree:
    """``nested("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def overlay(tree: Tree, update: Mapping[str, Any], where: str, section: str = "") -> None:
    """Overwrites keys of ``tree`` by ``update``, in place. Every key must exist; ``where`` says where it was named."""
    for key, value in update.items():
        name = f"{section}{key}"
        if key not in tree:
            raise UserError(f"unknown key '{name}' {where}: {did_you_mean(str(key), tree)}")
        if tree[key] is None and isinstance(value, Mapping):
            raise UserError(f"{name} {where}: the recipe has no such section")
        if not isinstance(tree[key], dict):
            tree[key] = value
        elif isinstance(value, Mapping):
            overlay(tree[key], value, where, f"{name}.")
        else:
            raise UserError(f"{name} = {value!r} {where}: must be a section with keys {', '.join(tree[key])}")


def build(kind: type[T], tree: Mapping[str, Any], section: str = "") -> T:
    """An instance of the dataclass ``kind`` from nested mappings; errors name the full dotted key."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in tree:
        if key not in names:
            raise UserError(f"unknown key '{section}{key}': {did_you_mean(str(key), names)}")
    values = {key: convert(hints[key], value, f"{section}{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise (error.under(section[:-1]) if section else error) from None
    except TypeError:
        missing = [name for name in names if name not in values]
        raise UserError(f"{section or 'the configuration'} lacks {', '.join(missing)}") from None


def convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the annotated type ``hint``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        # Text is taken for the Literal among several kinds, such as "auto" besides numbers.
        listing = next((kind for kind in kinds if get_origin(kind) is Literal and isinstance(value, str)), kinds[0])
        return None if value is None else convert(listing, value, key)
    if origin is Literal:
        return convert(str, value, key)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, "must be a section of keys")
        return build(hint, value, f"{key}.")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(key, value, f"must be a list, such as [{value}]")
        return tuple(convert(arguments[0], item, key) for item in value)
    if origin is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, "must be a section of keys")
        return {convert(str, name, key): convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(key, value, "must be a number that a float can hold") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        expected = {int: "a whole number", bool: "true or false", str: "text", float: "a number"}
        raise ConfigError(key, value, f"must be {expected[hint]}")
    return value


def read_yaml(path: str) -> Tree:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        tree = from_yaml(expanded(path, "--config").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; name a YAML file") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML ({error}); --print-config shows the expected form") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys; --print-config shows the expected form")
    return tree


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which ``--config`` reads back; for a fit only the keys that apply to it."""
    tree = asdict(config)
    if config.fit is not None:
        tree |= {"optimizer": {"clip": config.optimizer.clip}}
        tree |= {"hyper_optimizer": {"learning_rate": config.hyper_optimizer.learning_rate}}
    return dump(tree)


def differences(saved: Config, asked: Config) -> list[str]:
    """``key: saved -> asked`` for every key that affects results and differs between the two configurations.

    The number of epochs affects results only if the scales decay over it.
    """
    decays = saved.method.scale_decay != 1
    free = set(FREE_ON_RESUME) - ({"schedule.epochs"} if decays else set())
    old, new = flatten(asdict(saved.resolved)), flatten(asdict(asked.resolved))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in {**old, **new}
        if key not in free and old.get(key) != new.get(key)
    ]


def flatten(tree: Tree, section: str = "") -> Tree:
    """``flatten({"a": {"b": 1}})`` is ``{"a.b": 1}``."""
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{section}{key}.") if isinstance(value, dict) else {f"{section}{key}": value}
    return flat
