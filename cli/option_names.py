"""Translate Python arguments in the library's messages to command line options.

Messages of the library have arguments in backquotes, in Python syntax, and recipe keys with the value to set: `images`,
`resume=True`, `dtype='float32'`, `train.workers=0`. On the command line these are --images, --resume, --dtype float32
and --set train.workers=0. Values are quoted for the shell where necessary.
"""

from __future__ import annotations

import re
import shlex

# Python argument -> its option, without dashes, where the names differ.
_RENAMED = {
    "changes": "set",
    "consumer": "for",
    "mirror": "from",
    "run": "checkpoint",
    "sources": "from",
    "splits": "split",
    "style": "weight_format",
}
# A whole word between spaces or punctuation, so that backquotes in file names are rarely matched.
_ARGUMENT = re.compile(r"(?<![^\s(])`(?P<name>[a-z_]+)(?P<key>(?:\.\w+)*)(?:=(?P<value>[^`\n]+))?`(?![^\s:;,.?)])")


def as_options(text: str) -> str:
    """Replace the Python arguments in a message by command line options."""
    return _ARGUMENT.sub(_option, text)


def _option(match: re.Match[str]) -> str:
    """The option for a match of `_ARGUMENT`; the matched text itself for a recipe key without a value."""
    name, key, value = match["name"], match["key"], match["value"]
    if value is not None and len(value) > 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]  # without Python's quotes
    if key:
        return match[0] if value is None else f"--set {_quote(f'{name}{key}={value}')}"
    option = "--" + _RENAMED.get(name, name).replace("_", "-")
    return option if value in (None, "True") else f"{option} {_quote(value)}"


def _quote(value: str) -> str:
    """Quote a value for the shell; brackets are left unquoted for readability, as they rarely match a file."""
    return value if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value) else shlex.quote(value)
