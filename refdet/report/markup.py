"""HTML templates that escape by default: values are text unless they are `Markup` from `html`.

A forgotten conversion shows as visible tags and never as active markup.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from refdet.files.spreadsheet_text import xml_characters

__all__ = ["Markup", "html", "joined"]


def html(template: str, /, *values: Any, **named: Any) -> Markup:
    """`str.format` of a template, with every value escaped.

    Args:
        template: trusted HTML, a literal in the code.
        *values: values of ``{}``; `Markup` is not escaped.
        **named: values of ``{name}``; `Markup` is not escaped.
    """
    return Markup(template).format(*map(_clean, values), **{name: _clean(value) for name, value in named.items()})


def joined(parts: Iterable[Markup], separator: str = "") -> Markup:
    """Join pieces of HTML; plain text is escaped."""
    return Markup(separator).join(parts)


def _clean(value: Any) -> Any:
    return xml_characters(value) if type(value) is str else value
