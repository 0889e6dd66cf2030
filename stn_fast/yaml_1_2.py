"""Makes PyYAML, which implements YAML 1.1, follow YAML 1.2; to be used through `stn_fast.values`."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from stn_fast.values import BOOL, FLOAT, INT, NULL, NotYaml, parsed

# Tag, pattern of the whole scalar, and the characters it can start with: the core schema of YAML 1.2, and merge keys.
_CORE_SCHEMA = (
    ("null", NULL, ["~", "n", "N", ""]),
    ("bool", BOOL, list("tTfF")),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2; refuses a mapping that has a key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before merge keys are expanded, which may repeat a key legitimately.
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
        pattern = {"bool": BOOL, "int": INT, "float": FLOAT}[kind]
        if pattern.fullmatch(text):
            try:
                return text.lower() == "true" if kind == "bool" else parsed(text, whole=kind == "int")
            except ValueError:  # Python converts at most a few thousand digits
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
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):  # only in version 1.1
    _Loader.yaml_constructors.pop(f"tag:yaml.org,2002:{_tag}")


def load(text: str) -> Any:
    """As `stn_fast.values.from_yaml`."""
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


def dump(value: Any) -> str:
    """As `stn_fast.values.to_yaml`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=math.inf)
