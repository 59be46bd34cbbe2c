"""Build a recipe from plain values of YAML and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import short_repr, shorten


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted key that ``--set`` accepts."""
    keys: list[str] = []
    for name, type_ in typing.get_type_hints(cls).items():
        keys += _keys(type_, f"{prefix}{name}.") if dataclasses.is_dataclass(type_) else [prefix + name]
    return keys


def unknown_key_message(key: str, root: Any) -> str:
    """Error message for an unknown key of the dataclass ``root``, with the most similar known key."""
    close = difflib.get_close_matches(key, _keys(root), n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else "refdet recipes demo lists them all"
    return f"{shorten(key)}: no such recipe key; {fix}"


def build(cls: Any, tree: Any, prefix: str = "", root: Any = None) -> Any:
    """Build a dataclass, including nested ones, from plain values.

    Args:
        cls: the dataclass.
        tree: field -> value; missing fields get their defaults.
        prefix: dotted key of ``cls`` in the root, with a final dot, for error messages; "" for the root itself.
        root: the dataclass to suggest keys from, ``cls`` by default.

    Raises:
        InputError: an unknown key or an invalid value.
    """
    root = root or cls
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix.rstrip('.') or 'recipe'}: must be a mapping of options, not {short_repr(tree)}")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise InputError(unknown_key_message(key, root))
        if dataclasses.is_dataclass(types[name]):
            values[name] = build(types[name], value, prefix=f"{key}.", root=root)
        else:
            values[name] = _convert(key, value, types[name])
    return cls(**values)


def _convert(key: str, value: Any, type_: Any) -> Any:
    """Convert the value of a key to the type of its field, or raise an InputError with the expected type."""
    if typing.get_origin(type_) is tuple:
        item_types = typing.get_args(type_)
        items = list(value) if isinstance(value, (list, tuple)) else [value]  # 600 means [600]
        if item_types[-1] is Ellipsis:  # tuple[int, ...]
            item_types = (item_types[0],) * len(items)
        if len(items) != len(item_types):
            raise InputError(f"{key}: must have {len(item_types)} values, not {short_repr(value)}")
        return tuple(_convert(key, item, item_type) for item, item_type in zip(items, item_types, strict=True))
    if type_ is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 parses 1e-4 as text
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}: must be finite, not {value}")
    if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
        raise InputError(f"{key}: must be {type_.__name__}, not {short_repr(value)}")
    return value


def check_choice(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise InputError if a value is not one of the choices."""
    if value not in choices:
        raise InputError(f"{key}: must be one of {', '.join(map(str, choices))}, not {short_repr(value)}")
