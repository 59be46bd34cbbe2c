"""Jinja2 templates of the report. Values are escaped, except for the HTML that a template has rendered (`Markup`)."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from refdet.files.short_text import format_count, format_share
from refdet.files.spreadsheet_text import xml_characters

__all__ = ["ENVIRONMENT", "Markup", "number", "render"]


def number(value: Any) -> str:
    """A metric with three decimals; a dash if it is undefined: None, or -1 as in pycocotools."""
    return "–" if value is None or value < 0 else f"{value:.3f}"


def _load(name: str) -> str:
    return (resources.files("refdet.report") / "templates" / name).read_text(encoding="utf-8")


def _clean(value: Any) -> Any:
    """A value for a template: characters that XML forbids are replaced in text, but not in rendered HTML."""
    return xml_characters(value) if type(value) is str else value


ENVIRONMENT = Environment(
    loader=FunctionLoader(_load), autoescape=True, undefined=StrictUndefined, finalize=_clean,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.filters.update(number=number, format_count=format_count, format_share=format_share)


def render(template: str, **values: Any) -> Markup:
    """The HTML of a template of ``templates/``, with every value escaped."""
    return Markup(ENVIRONMENT.get_template(template).render(**values))
