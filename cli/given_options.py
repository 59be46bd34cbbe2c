"""Options that were given on the command line although they have no effect there: errors or notes."""

from __future__ import annotations

import click
from click.core import ParameterSource

from refdet.errors import InputError

from .common import note


def was_given(name: str) -> bool:
    """Whether a parameter of the running command was given, under its name or its older one, even as its default.

    Args:
        name: the parameter's name in Python.
    """
    source = click.get_current_context().get_parameter_source
    return ParameterSource.COMMANDLINE in (source(name), source(f"{name}_by_its_old_name"))


def reject_unused(name: str, problem: str) -> None:
    """Raise an InputError if an option was given that has no effect.

    Args:
        name: name of its parameter.
        problem: why it has no effect and what to do; may have Python arguments in backquotes.
    """
    if was_given(name):
        raise InputError(f"`{name}`: {problem}")  # cli.main translates it to the option


def note_unused(name: str, problem: str) -> None:
    """Print a note if an option was given that has no effect, but does no harm either; arguments as `reject_unused`."""
    if was_given(name):
        note(f"note: `{name}`: not used, {problem}")


def reject_box_format_without(option: str, given: object, box_format: str) -> None:
    """Raise an InputError if ``--box-format`` is another than the default without the file whose boxes it is about.

    Args:
        option: the option of the file.
        given: its value, None if it was not given.
        box_format: value of ``--box-format``.
    """
    if given is None and box_format != "xywh":
        raise InputError(f"--box-format {box_format} is for {option}; give {option} or omit --box-format")
