"""Parse untrusted YAML: mappings with text keys, lists and scalars, within limits.

Aliases are rejected, as they can expand a few hundred bytes to gigabytes, and so are numbers that are not decimal,
as YAML 1.1 reads 010 as 8 and 1:30 as 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from refdet.errors import InputError
from refdet.files.short_text import short_repr, shorten

MAX_DEPTH, MAX_NODES, MAX_SCALAR_LENGTH = 16, 10_000, 1_000
_TEXT, _INTEGER, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float"))
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, which are checked before values are constructed."""

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._nodes += 1
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            raise _error_at(f"alias *{shorten(event.anchor)} is not supported; write out the value", event)
        if getattr(event, "tag", None) is not None:
            raise _error_at(f"tag {shorten(event.tag)} is not supported; remove it", event)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR_LENGTH:
            raise _error_at(f"value longer than {MAX_SCALAR_LENGTH} characters", event)
        if self._depth > MAX_DEPTH:
            raise _error_at(f"nested more than {MAX_DEPTH} levels deep", event)
        if self._nodes > MAX_NODES:
            raise _error_at(f"more than {MAX_NODES} values", event)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise _error_at(f"key {short_repr(key.value)} is not text; put it in quotes", key)
            if key.value in seen:
                raise _error_at(f"duplicate key {short_repr(key.value)}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _DECIMAL.fullmatch(node.value) is None:
            raise _error_at(
                f"integer {shorten(node.value)} is not decimal; write it in decimal without leading zeros", node
            )
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:  # YAML 1.1 reads 1:30.5 as 90.5
            raise _error_at(f"number {shorten(node.value)} is not decimal; write it in decimal", node)
        value: float = super().construct_yaml_float(node)
        return value


_Loader.add_constructor(_INTEGER, _Loader.construct_yaml_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML text.

    Args:
        text: the text.

    Returns:
        The value of the text.

    Raises:
        InputError: invalid YAML, or an unsupported feature: aliases, tags, duplicate keys, keys that are not text,
            numbers that are not decimal, deep nesting, or values that are too many or too long.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a safe loader
    except yaml.YAMLError as error:
        raise InputError(f"invalid or unsupported YAML ({_problem(error)})") from None
    except (ValueError, OverflowError, RecursionError) as error:  # from a scalar such as the date 2001-99-99
        raise InputError(f"invalid or unsupported YAML ({shorten(error)})") from None


def _error_at(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """An error with the position of a YAML event or node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _problem(error: yaml.YAMLError) -> str:
    """The problem and the line of an error, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        problem = error.problem.replace("found unexpected ", "found ")  # PyYAML's wording
        return shorten(problem, 200) + ("" if mark is None else f", line {mark.line + 1}")
    if isinstance(error, yaml.reader.ReaderError):
        return f"invalid character at position {error.position}"
    return shorten(error, 200)
