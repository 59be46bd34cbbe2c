"""Options shared by the commands, and printing that is safe for text from untrusted files."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import click

from refdet.errors import ArgumentError
from refdet.files.printable_text import escape_unprintable
from refdet.structures.detection_options import PRECISIONS

from .option_names import as_options

_PACKAGES = ("refdet", "refer")  # whose loggers follow --verbose and --quiet
F = TypeVar("F", bound=Callable[..., Any])


class OutputLost(Exception):
    """Stdout cannot be written to: its reader has closed the pipe, or the disk is full."""


class _Fraction(click.FloatRange):
    """A number from 0 to 1. `click.FloatRange` alone accepts NaN, which is neither below nor above its limits."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; an error if it is not one from 0 to 1."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            raise ArgumentError(str(param and param.name), "must be a number from 0 to 1, not nan")
        return number


FRACTION = _Fraction()

# Copied from refdet.data.box_format: importing it would import numpy, which is too slow for --help.
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
    """Add ``--json`` to a command, passed as ``as_json``; with it, the command prints nothing but JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def exif_option(default: str | None = "ignore") -> Callable[[F], F]:
    """Add ``--exif`` to a command; pass the default None if the option overrides a recipe key."""
    return click.option(
        "--exif",
        type=click.Choice(["ignore", "apply"]),
        default=default,
        show_default=default is not None,
        help="EXIF orientation: ignore (COCO's boxes are for the pixels as stored), or apply to turn images upright.",
    )


def precision_option(command: F) -> F:
    """Add ``--precision`` to a command."""
    return click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="float32",
        show_default=True,
        help="Arithmetic of the network: float32 is without TF32 on a GPU; the others are faster where supported.",
    )(command)


def ray_option(command: F) -> F:
    """Add ``--ray`` to a command."""
    return click.option(
        "--ray",
        metavar="ADDRESS",
        help="Compute on a Ray cluster, one worker per GPU (or CPU): local for this machine, auto for the cluster it "
        "belongs to, or HOST:PORT.",
    )(command)


def workers_option(command: F) -> F:
    """Add ``--workers`` to a command; None stands for the default of `refdet.extraction.defaults`."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Threads that load images.  [default: 2; on a GPU 8, at most one per core]",
    )(command)


def echo_line(text: str = "") -> None:
    """Print one line on stdout, with unprintable characters escaped."""
    _print(escape_unprintable(text))


def renamed_option(new: str, old: str, name: str, *, required: bool = False, **attributes: Any) -> Callable[[F], F]:
    """Add a renamed option to a command; the old name works for one more version, hidden and with a note.

    Args:
        new: the new name, such as "--store".
        old: the old name, such as "--features".
        name: name of the command's parameter.
        required: whether the option is required, under either name.
        attributes: other arguments of ``click.option``, for both names.
    """
    key = f"refdet.{old}"  # where the value given by the old name is kept in click's context
    help_ = attributes.pop("help") + ("  [required]" if required else "")

    def print_note() -> None:
        if sys.exc_info()[0] is None:  # an error message must stay the only line
            note(f"note: {old} was renamed to {new}; the old name works until the next version")

    def read_old(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            context.meta[key] = value
            context.call_on_close(print_note)

    def read_new(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        old_value = context.meta.get(key)
        if value and old_value:
            raise click.UsageError(f"{old} is the old name of {new}; give {new} alone", context)
        if required and value is None and old_value is None:
            raise click.MissingParameter(ctx=context, param=parameter)
        return value or old_value or value  # if neither was given, the default: False for a flag, else None

    def decorate(command: F) -> F:
        # Help lists options in the order of their decorators; eager options are processed first.
        hidden = click.option(
            old,
            f"{name}_by_its_old_name",  # cli.given_options looks for it
            hidden=True,
            is_eager=True,
            expose_value=False,
            callback=read_old,
            **attributes,
        )
        return click.option(new, name, callback=read_new, help=help_, **attributes)(hidden(command))

    return decorate


def store_option(*, required: bool = False, **attributes: Any) -> Callable[[F], F]:
    """Add ``--store``, formerly ``--features``, to a command; see `renamed_option`."""
    return renamed_option("--store", "--features", "store", required=required, **attributes)


def box_format_option(option: str) -> Callable[[F], F]:
    """Add ``--box-format`` to a command: the format of the boxes in the file that `option` names."""
    return click.option(
        "--box-format",
        type=click.Choice(BOX_FORMATS),
        default="xywh",
        show_default=True,
        metavar="FORMAT",
        help=f"Format of the boxes in {option}: xywh or xyxy in pixels; normalized (0..1) or thousandths (0..1000) of "
        "the image size, optionally with -xyxy or -xywh; without it, as whichever of the two fits more boxes.",
    )


def echo_json(obj: Any) -> None:
    """Print ``obj`` as JSON on stdout."""
    # json escapes all control characters except DEL
    _print(json.dumps(obj, indent=2).replace("\x7f", "\\u007f"))


@contextmanager
def keep_result(obj: Any) -> Iterator[None]:
    """Print ``obj`` as JSON on stderr if the block cannot print it on stdout, for results that are in no file."""
    try:
        yield
    except OutputLost as error:
        print_error(f"note: the result cannot be written to stdout ({error}): {json.dumps(obj)}")
        raise


def echo_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print rows of equal length on stdout in columns, aligned right if all rows have numbers there, else left."""
    rows = [tuple(map(escape_unprintable, row)) for row in rows]
    lines = [header, *rows] if header else rows
    for row in lines:
        if len(row) != len(lines[0]):
            raise ValueError(f"rows of {len(lines[0])} and {len(row)} columns in one table")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]  # empty without rows
    for row in lines:
        cells = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric or [False] * len(widths), strict=True)
        )
        _print("  ".join(cells).rstrip())


def set_level(level: int) -> None:
    """Set the level of the loggers of refdet and refer; notes and progress bars have the level WARNING."""
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(level)


def note(text: str) -> None:
    """Print a note on stderr unless ``--quiet`` was given; `as_options` replaces Python arguments in it by options."""
    _print_note(as_options(text))


def print_error(text: str) -> None:
    """Print one line on stderr; nothing happens if stderr is closed."""
    with suppress(OSError):
        click.echo(escape_unprintable(text), err=True)


class NoteHandler(logging.Handler):
    """Prints log records as notes: all those of refdet and refer, and warnings and errors of other libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record, without a traceback."""
        is_ours = record.name.partition(".")[0] in _PACKAGES
        text = as_options(record.getMessage()) if is_ours else record.getMessage()
        if record.levelno >= logging.ERROR:
            print_error(text)
        elif record.levelno >= logging.WARNING or is_ours:
            _print_note(text)


def _print_note(text: str) -> None:
    """Print a line on stderr, unless ``--quiet`` was given."""
    if logging.getLogger("refdet").isEnabledFor(logging.WARNING):
        print_error(text)


def _print(text: str) -> None:
    """Print text on stdout; OutputLost if that fails."""
    try:
        click.echo(text)
    except OSError as error:
        raise OutputLost(str(error)) from error


def _is_number(text: str) -> bool:
    """Whether a cell is a number or percentage, or a placeholder for one."""
    digits = text.strip().rstrip("%")
    try:
        float(digits.replace(",", ""))
    except ValueError:
        return digits in ("", "-")
    return True
