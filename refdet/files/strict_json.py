"""Parse untrusted JSON strictly."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from refdet.errors import InputError
from refdet.files.short_text import short_repr, shorten

_MAX_INTEGER_LENGTH = 20  # characters; -2**63 has 20
# A surrogate, escaped or not; pairs of escaped ones are characters, single ones cannot be written as UTF-8.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def strict_json(data: bytes | str) -> Any:
    """Parse JSON strictly.

    Args:
        data: the text, in UTF-8 if it is bytes.

    Returns:
        Its value.

    Raises:
        InputError: not UTF-8, malformed or too deeply nested JSON, a duplicate key, a single surrogate in a text, an
            integer of more than 20 characters, or a number that is not finite (NaN, Infinity, 1e999).
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_reject_duplicates,
            parse_constant=_reject_constant,
            parse_float=_finite_float,
            parse_int=_integer,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises UnicodeError for single surrogates
        return value
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON in line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise InputError("malformed JSON: nested too deeply") from None
    except UnicodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason if hasattr(error, 'reason') else error})") from None


def finite_json(data: bytes | str) -> Any:
    """Parse JSON, but neither NaN nor Infinity, which are not JSON, nor numbers that overflow to infinity.

    Args:
        data: the text.

    Returns:
        Its value.

    Raises:
        ValueError: malformed JSON, or a number that is not finite.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(data, parse_constant=_reject_constant, parse_float=_finite_float)
    except InputError as error:
        raise ValueError(str(error)) from None


def json_with_nulls(data: bytes | str) -> tuple[Any, int]:
    """Parse JSON, with None in place of each number that is not finite (NaN, Infinity, 1e999).

    Args:
        data: the text.

    Returns:
        The value, and how many numbers were replaced.

    Raises:
        ValueError: malformed JSON.
        RecursionError: it is nested too deeply.
    """
    replaced: list[str] = []

    def finite_or_none(text: str) -> float | None:
        if math.isfinite(value := float(text)):
            return value
        replaced.append(text)
        return None

    return json.loads(data, parse_constant=finite_or_none, parse_float=finite_or_none), len(replaced)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"duplicate key {short_repr(duplicate)}")
    return tree


def _reject_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"number {shorten(text)} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_INTEGER_LENGTH:
        raise InputError(f"integer {shorten(text)} is too large")
    return int(text)
