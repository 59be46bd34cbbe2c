"""Make untrusted text safe for spreadsheet cells and XML."""

from __future__ import annotations

import re

# Spreadsheets take cells that start with these as formulas, including full-width forms and after spaces.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# Not allowed in XML 1.0, even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def spreadsheet_cell(text: str) -> str:
    """Text on one line, with an apostrophe in front if a spreadsheet would take it as a formula.

    Not every CSV writer quotes a carriage return, so the text after it could start a new row.
    """
    text = " ".join(xml_characters(text).splitlines())
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text.startswith("\t") else text


def xml_characters(text: str) -> str:
    """Replace characters that XML cannot represent with U+FFFD; the result must still be escaped."""
    return _NOT_XML.sub("\ufffd", text)
