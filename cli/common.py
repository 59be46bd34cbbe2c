"""What the commands share: their common options, and printing, which no text of a foreign file can disturb."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import click

from refdet.files.printable_text import printable
from refdet.structures.detection_options import PRECISIONS

from .option_names import as_options

_OWN = ("refdet", "refer")  # the packages whose loggers are ours
F = TypeVar("F", bound=Callable[..., Any])


class OutputLost(Exception):
    """Nobody takes what is printed on stdout: a pipe was closed, or the disk behind it is full."""


# The names of refdet.data.box_format, which brings numpy: too much for --help.
BOX_FORMATS = (
    "xywh",
    "xyxy",
    "normalized",
    "thousandths",
    "normalized-xyxy",
    "normalized-xywh",
    "thousandths-xyxy",
    "thousandths-xywh",
)


def json_option(command: F) -> F:
    """Give a command ``--json``, passed to it as ``as_json``: then its JSON is all that stands on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def exif_option(default: str | None = "ignore") -> Callable[[F], F]:
    """Give a command ``--exif``; ``None`` as its default is for the one that has it in its recipe too."""
    return click.option(
        "--exif",
        type=click.Choice(["ignore", "apply"]),
        default=default,
        show_default=default is not None,
        help="EXIF orientation: ignore (COCO's boxes are for the pixels as stored), or apply to turn images upright.",
    )


def precision_option(command: F) -> F:
    """Give a command ``--precision``."""
    return click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="float32",
        show_default=True,
        help="Arithmetic of the network: float32 is exact on a GPU too, the others are faster where it has them.",
    )(command)


def workers_option(command: F) -> F:
    """Give a command ``--workers``, as None for the default of `refdet.extraction.defaults`."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Threads that load images.  [default: 2; on a GPU 8, at most one per core]",
    )(command)


def echo_line(text: str = "") -> None:
    """Print one line on stdout, whatever characters are in ``text``."""
    _print(printable(text))


def renamed_option(new: str, old: str, name: str, *, required: bool = False, **attributes: Any) -> Callable[[F], F]:
    """Give a command an option under a new name; the old one works for a version, with a note, and is not shown.

    Args:
        new: its name, such as "--store".
        old: its former name, such as "--features".
        name: what the value is passed as.
        required: whether one of the two must be given.
        attributes: further ones of ``click.option``, for both.
    """
    key = f"refdet.{old}"  # where click's context keeps what the old name was given
    help_ = attributes.pop("help") + ("  [required]" if required else "")

    def say() -> None:
        if sys.exc_info()[0] is None:  # an error is to stay one line
            note(f"note: {old} was renamed to {new}; the old name works until the next version")

    def read_old(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            context.meta[key] = value
            context.call_on_close(say)

    def read_new(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        older = context.meta.get(key)
        if value and older:
            raise click.UsageError(f"{old} is the old name of {new}; give {new} alone", context)
        if required and value is None and older is None:
            raise click.MissingParameter(ctx=context, param=parameter)
        return value or older or value

    def decorate(command: F) -> F:
        # Options are shown in the order of their decorators; an eager one is read before the others.
        hidden = click.option(
            old,
            f"{name}_by_its_old_name",
            hidden=True,
            is_eager=True,
            expose_value=False,
            callback=read_old,
            **attributes,
        )
        return click.option(new, name, callback=read_new, help=help_, **attributes)(hidden(command))

    return decorate


def store_option(*, required: bool = False, name: str = "store", **attributes: Any) -> Callable[[F], F]:
    """Give a command ``--store``, passed to it as ``name``, which was ``--features`` once; see `renamed_option`."""
    return renamed_option("--store", "--features", name, required=required, **attributes)


def box_format_option(option: str) -> Callable[[F], F]:
    """Give a command ``--box-format``, the form of the boxes in the file of another option."""
    return click.option(
        "--box-format",
        type=click.Choice(BOX_FORMATS),
        default="xywh",
        show_default=True,
        metavar="FORMAT",
        help=f"Format of the boxes in {option}: xywh or xyxy in pixels; normalized (0..1) or thousandths (0..1000) of "
        "the image size, with -xyxy or -xywh, or else in the order that fits.",
    )


def echo_json(obj: Any) -> None:
    """Print ``obj`` as JSON on stdout."""
    # of the characters that terminals obey, DEL alone is not escaped by json
    _print(json.dumps(obj, indent=2).replace("\x7f", "\\u007f"))


def echo_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print rows of equal length on stdout in aligned columns; columns of numbers are flush right."""
    rows = [tuple(map(printable, row)) for row in rows]
    lines = [header, *rows] if header else rows
    for row in lines:
        if len(row) != len(lines[0]):
            raise ValueError(f"rows of {len(lines[0])} and of {len(row)} columns in one table")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
    for row in lines:
        cells = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric or [False] * len(widths), strict=True)
        )
        _print("  ".join(cells).rstrip())


def set_level(level: int) -> None:
    """Show what refdet and refer log from a level of `logging` up; notes and progress bars are warnings."""
    for name in _OWN:
        logging.getLogger(name).setLevel(level)


def note(text: str) -> None:
    """Print one line of ours on stderr, its arguments as options, unless the command is quiet."""
    _print_note(as_options(text))


def print_error(text: str) -> None:
    """Print one line on stderr. Where nobody reads that, the work goes on."""
    with suppress(OSError):
        click.echo(printable(text), err=True)


class NoteHandler(logging.Handler):
    """Prints what the libraries log as notes: what refdet's own loggers let through, and warnings of others."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, its traceback left out."""
        text, own = record.getMessage(), record.name.partition(".")[0] in _OWN
        if own:
            text = as_options(text)
        if record.levelno >= logging.ERROR:
            print_error(text)
        elif record.levelno >= logging.WARNING or own:
            _print_note(text)


def _print_note(text: str) -> None:
    if logging.getLogger("refdet").isEnabledFor(logging.WARNING):
        print_error(text)


def _print(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        raise OutputLost(str(error)) from error


def _is_number(text: str) -> bool:
    digits = text.strip().rstrip("%")
    try:
        float(digits.replace(",", ""))
    except ValueError:
        return digits in ("", "-")
    return True
