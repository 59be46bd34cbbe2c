"""Texts of others made safe for the files they are written into: cells of a spreadsheet, and XML."""

from __future__ import annotations

import re

# What spreadsheets take for a formula where a cell begins with it, also in full width or after blanks.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def spreadsheet_cell(text: str) -> str:
    """A text in one line that no spreadsheet takes for a formula: to what begins like one an apostrophe is put.

    Not all that write CSV quote a carriage return, and what follows it would begin a row.
    """
    text = " ".join(xml_characters(text).splitlines())
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text.startswith("\t") else text


def xml_characters(text: str) -> str:
    """A text with U+FFFD for what XML cannot hold; what it can must still be escaped."""
    return _NOT_XML.sub("\ufffd", text)
