"""Build a recipe's options from plain values of YAML and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import cut, shown


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted key that ``--set`` accepts."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += _keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def unknown(key: str, whole: Any) -> str:
    """Error message for an unknown key of the dataclass `whole`."""
    near = difflib.get_close_matches(key, _keys(whole), n=1, cutoff=0.5)
    return f"{cut(key)}: no such recipe key" + (f"; did you mean {near[0]}?" if near else "")


def build(cls: Any, tree: Any, prefix: str = "", whole: Any = None) -> Any:
    """Build a dataclass, and those in its fields, from plain values.

    Args:
        cls: the dataclass.
        tree: field -> value; missing fields have their defaults.
        prefix: of the keys in error messages.
        whole: the dataclass that these keys are of, `cls` by default.

    Raises:
        InputError: an unknown key or an invalid value.
    """
    whole = whole or cls
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix.rstrip('.')}: must be a mapping of options, not {shown(tree)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(unknown(key, whole))
        kind = hints[name]
        part = dataclasses.is_dataclass(kind)
        values[name] = build(kind, value, key + ".", whole) if part else _typed(key, value, kind)
    return cls(**values)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Convert a value to the type of its field, or raise an InputError with the expected type."""
    if typing.get_origin(kind) is tuple:
        wanted = typing.get_args(kind)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if wanted[-1] is types.EllipsisType or wanted[-1] is Ellipsis:
            wanted = (wanted[0],) * len(items)
        if len(items) != len(wanted):
            raise InputError(f"{key}: must have {len(wanted)} values, not {shown(value)}")
        return tuple(_typed(key, item, of) for item, of in zip(items, wanted, strict=True))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 parses 1e-4 as text
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}: must be finite, not {value}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key}: must be {kind.__name__}, not {shown(value)}")
    return value


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise InputError if a value is not one of the choices."""
    if value not in choices:
        raise InputError(f"{key}: must be one of {', '.join(map(str, choices))}, not {shown(value)}")
