"""Text to values and back: YAML by the rules of version 1.2, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Tag, pattern of the whole scalar, and the characters it can start with: the core schema of YAML 1.2, and merge keys.
_CORE_SCHEMA = (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
)


MOST_DIGITS = 1000  # of a whole number; Python prints no more than some thousands


class NotYaml(ValueError):
    """Text that is not YAML: ``problem`` says why, ``line`` where, counted from 1, if that is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        self.problem, self.line = problem, line
        super().__init__(problem if line is None else f"line {line}: {problem}")


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2; refuses a mapping that has a key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before merge keys are replaced by what they stand for, which may well repeat a key.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := self.construct_object(key)) in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is given twice", key.start_mark)
                seen.add(name)
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return self.construct_scalar(node)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | bool:
        text = self.construct_scalar(node)
        kind = node.tag.rpartition(":")[2]
        pattern = {"bool": _BOOL, "int": _INT, "float": _FLOAT}[kind]
        if pattern.fullmatch(text):
            try:
                return text.lower() == "true" if kind == "bool" else _number(text, whole=kind == "int")
            except ValueError:  # Python converts no more than some thousand digits
                pass
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is not a YAML {kind}", node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else."""


_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1, which the dumper keeps
for _tag, _pattern, _first in _CORE_SCHEMA:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
for _tag in ("bool", "int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:merge", _Loader.construct_text)
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):  # of version 1.1 alone
    _Loader.yaml_constructors.pop(f"tag:yaml.org,2002:{_tag}")


def _number(text: str, whole: bool) -> int | float:
    if whole:
        if len(text) > MOST_DIGITS:
            raise ValueError(f"{text[:20]}... has more than {MOST_DIGITS} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


def whole_number(text: str) -> int:
    """The integer that YAML 1.2 reads in ``text``.

    Raises:
        ValueError: it reads something else.
    """
    if not _INT.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(_number(text, whole=True))


def number(text: str) -> float:
    """The number that YAML 1.2 reads in ``text``.

    Raises:
        ValueError: it reads something else.
    """
    if _INT.fullmatch(text):
        try:
            return float(whole_number(text))
        except OverflowError:
            raise ValueError(f"{text[:20]}... is beyond the range of floating point numbers") from None
    if not _FLOAT.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return _number(text, whole=False)


def from_yaml(text: str) -> Any:
    """The value of a YAML document.

    Plain scalars follow the core schema of YAML 1.2: 1e-3 and 0o17 are numbers, 010 is ten; yes, on, 1:30 and 1_000
    are text.

    Raises:
        NotYaml: the text is not one document, or a mapping in it has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotYaml(error.problem or str(error.context), mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        raise NotYaml(f"character #x{error.character:04x} at position {error.position} is not allowed") from None
    except RecursionError:
        raise NotYaml("it is nested too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:  # of an explicit tag: !!timestamp x
        raise NotYaml(f"a tag does not fit its value ({error})") from None


def to_yaml(value: Any) -> str:
    """``value`` as a YAML document, which ``from_yaml`` reads back as an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=math.inf)


def finite(value: Any) -> Any:
    """``value`` with None in place of every number that is not finite, at any depth of mappings and sequences."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON. A number that is not finite is null: JSON has no name for it."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
