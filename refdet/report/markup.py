"""HTML that escapes by default: what is put into a template is text, unless it is a `Markup` that `html` made.

A forgotten conversion shows as visible tags; it cannot make text run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from refdet.files.spreadsheet_text import xml_characters

__all__ = ["Markup", "html", "joined"]


def html(template: str, /, *values: Any, **named: Any) -> Markup:
    """A template in the form of `str.format`, written in the code, with every value escaped.

    Args:
        template: HTML of ours; never text from elsewhere.
        values, named: what stands for ``{}`` and ``{name}``; `Markup` stays as it is.
    """
    return Markup(template).format(*map(_clean, values), **{name: _clean(value) for name, value in named.items()})


def joined(parts: Iterable[Markup], separator: str = "") -> Markup:
    """Pieces of HTML, one after the other; a piece that is text is escaped."""
    return Markup(separator).join(parts)


def _clean(value: Any) -> Any:
    return xml_characters(value) if type(value) is str else value
