"""What the library calls an argument is an option here.

A message of the library has an argument in backquotes, as Python has it, and a recipe key with the value to give it:
`images`, `resume=True`, `dtype='float32'`, `train.workers=0`. On the command line these are --images, --resume,
--dtype float32 and --set train.workers=0. A value that a shell would split or change is quoted for it.
"""

from __future__ import annotations

import re
import shlex

# Arguments whose options have another name.
_RENAMED = {
    "changes": "set",
    "consumer": "for",
    "mirror": "from",
    "run": "checkpoint",
    "sources": "from",
    "splits": "split",
    "style": "weight_format",
}
# A whole word between spaces or punctuation, so that a backquote in the name of a file is most likely left alone.
_ARGUMENT = re.compile(r"(?<![^\s(])`(?P<name>[a-z_]+)(?P<key>(?:\.\w+)*)(?:=(?P<value>[^`\n]+))?`(?![^\s:;,.?)])")


def as_options(text: str) -> str:
    """A message of the library with options of the command line in place of arguments."""
    return _ARGUMENT.sub(_option, text)


def _option(match: re.Match[str]) -> str:
    name, key, value = match["name"], match["key"], match["value"]
    if value is not None and len(value) > 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]  # Python's quotes
    if key:
        return match[0] if value is None else f"--set {_quoted(f'{name}{key}={value}')}"
    option = "--" + _RENAMED.get(name, name).replace("_", "-")
    return option if value in (None, "True") else f"{option} {_quoted(value)}"


def _quoted(value: str) -> str:
    """A value as a word of the shell; brackets, which only a file of that name would change, stay readable."""
    return value if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value) else shlex.quote(value)
