"""Options that were given on the command line although they cannot matter there are errors, not ignored."""

from __future__ import annotations

import click
from click.core import ParameterSource

from refdet.errors import InputError


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


def reject_box_format_without(option: str, given: object, box_format: str) -> None:
    """Raise an InputError if ``--box-format`` was given without the file whose boxes it is about.

    Args:
        option: the option of the file.
        given: its value, None if it was not given.
        box_format: value of ``--box-format``.
    """
    if given is None and was_given("box_format"):
        raise InputError(f"--box-format {box_format} is for {option}; give {option} or omit --box-format")
