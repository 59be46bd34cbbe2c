"""The ``refdet`` command: runs its subcommands and reports every error as one line and an exit code."""

from __future__ import annotations

import os
import sys

try:
    import difflib
    import importlib
    import logging
    import traceback
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any, NoReturn

    import click
    from click.exceptions import NoArgsIsHelpError

    from refdet.errors import ArgumentError, RefdetError, is_disk_full
    from refdet.interrupt import exit_during_imports
    from refdet.training.launch import repeats_usage_errors
    from refdet.training.processes import ReportedElsewhere

    from .common import NoteHandler, OutputLost, echo_line, print_error, set_level
    from .option_names import as_options
except KeyboardInterrupt:  # before there is anything to handle it
    os.write(2, b"error: interrupted\n")
    os._exit(130)

# In the order of their use, in which `--help` lists them. "fetch-data" is the function `command` in fetch_data.py, etc.
COMMANDS = (
    "fetch-data",
    "convert-refer",
    "build-split",
    "audit",
    "import-weights",
    "recipes",
    "train",
    "evaluate",
    "extract-features",
    "evaluate-on-refer",
    "export",
    "export-weights",
    "report",
    "draw",
    "inspect",
    "browse",
    "demo",
)

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# 128 + SIGPIPE, the exit code that a shell reports for a program killed by SIGPIPE. Code 1 would make
# `refdet audit ... | head` look like a leak.
OUTPUT_LOST = 141
# Errors about a path that the user can fix; any other OSError is a failure of the machine.
INPUT_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class LazyGroup(click.Group):
    """A click group that imports commands lazily and reports errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of a name; None if no command has it."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name.replace('-', '_')}", __package__).command

    def main(  # type: ignore[override]  # click's has overloads for standalone_mode
        self, args: Sequence[str] | None = None, standalone_mode: bool = True, **options: Any
    ) -> Any:
        """Run a command line and exit with its exit code; see click for the arguments.

        ``--debug`` is handled here, so that it may come before or after the command's name.
        """
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **options)
        debug, args = _pop_debug(list(sys.argv[1:] if args is None else args))
        _open_closed_streams()
        _show_notes()
        try:
            with exit_during_imports():  # by a signal; after them, signals raise KeyboardInterrupt
                code = super().main(args, standalone_mode=False, **options)
            _flush()
        except OutputLost:
            _exit_without_output()
        except KeyboardInterrupt:  # before or after the command; click turns those within a command into Abort
            fail(click.Abort(), debug)
        except SystemExit:
            if "PacifyFlush" in type(sys.stdout).__name__:  # raised by click if a help text is cut short
                _exit_without_output()
            raise
        except Exception as error:
            fail(error, debug)
        sys.exit(code if isinstance(code, int) else 0)  # an int from ctx.exit; commands return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by name; the error for an unknown name suggests similar ones."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            similar = _similar_commands(name)
            suggestion = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise click.UsageError(f"{name}: no such command{suggestion}", ctx)
        return super().resolve_command(ctx, args)


def _similar_commands(name: str) -> list[str]:
    """Commands that a mistyped name may mean: by prefix, else by similar spelling, else by a word they share."""
    name = name.lower().replace("_", "-")
    if name in COMMANDS:
        return [name]
    words = [word for word in name.split("-") if len(word) > 2]  # shorter ones fit too many commands
    with_prefix = [command for command in COMMANDS if len(name) > 2 and command.startswith(name)]
    with_word = [command for command in COMMANDS if any(word in command.split("-") for word in words)]
    return with_prefix or difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.7) or with_word[:3]


def _open_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed.

    Otherwise the next file to be opened gets the descriptor, and what is printed ends up in that file.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def _show_notes() -> None:
    """Print log records from now on, one line each."""
    root = logging.getLogger()
    if not any(isinstance(handler, NoteHandler) for handler in root.handlers):
        root.addHandler(NoteHandler(logging.NOTSET))


def _flush() -> None:
    """Flush stdout; OutputLost if nobody reads it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputLost(str(error)) from error


def _exit_without_output() -> NoReturn:
    """Exit after stdout was lost."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # at exit, Python would fail to flush the lost one
    sys.exit(OUTPUT_LOST)


def fail(error: Exception, debug: bool) -> NoReturn:
    """Print an error in one line on stderr, after its traceback if ``debug``, and exit with its code."""
    if isinstance(error, NoArgsIsHelpError):
        error.show()  # the help is the message
        sys.exit(BAD_INPUT)
    if isinstance(error, ReportedElsewhere) or (isinstance(error, click.UsageError) and repeats_usage_errors()):
        sys.exit(describe(error)[0])  # another process of torchrun prints the error
    if debug:
        for line in "".join(traceback.format_exception(error)).split("\n")[:-1]:
            print_error(line)
    code, text = describe(error)
    print_error("error: " + " ".join(text.splitlines()))
    sys.exit(code)


def describe(error: Exception) -> tuple[int, str]:
    """The exit code and message for an error."""
    if isinstance(error, ArgumentError):  # of the Python API: `as_options` puts the options in place of the arguments
        return error.exit_code, as_options(f"`{error.argument}`: {error.problem}")
    if isinstance(error, RefdetError):
        return error.exit_code, as_options(str(error))
    if isinstance(error, click.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, click.UsageError):
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return error.exit_code, error.format_message().rstrip(".") + hint
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if is_disk_full(error):
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return FAILED, f"disk full{where}; free some space and run it again (finished work is kept)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        code = BAD_INPUT if isinstance(error, INPUT_ERRORS) else FAILED
        if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
            return code, f"{_find_file(Path(error.filename))}: is a file where a folder is needed; choose another path"
        return code, where + (error.strerror or str(error))
    from refer import ReferError  # imported late, as it imports numpy

    if isinstance(error, ReferError):
        return BAD_INPUT, str(error)
    return FAILED, f"unexpected {type(error).__name__}: {error} (run with --debug for the traceback)"


def _find_file(path: Path) -> Path:
    """The file that stands in the way of a path: the first of its parents that is no folder, or itself."""
    return next((parent for parent in reversed(path.parents) if parent.exists() and not parent.is_dir()), path)


def _pop_debug(args: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is given (before any ``--``), and the arguments without it."""
    end = args.index("--") if "--" in args else len(args)
    remaining = [arg for arg in args[:end] if arg != "--debug"]
    return len(remaining) < end, remaining + args[end:]


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from .versions import versions

    for line in versions():
        echo_line(line)
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
# only for --help: LazyGroup.main takes --debug out of the arguments
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.option("-v", "--verbose", is_flag=True, help="Also print what is read, chosen and skipped.")
@click.option("-q", "--quiet", is_flag=True, help="Print only results and errors: no notes, no progress.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions of refdet and PyTorch, the device and the kernels.",
)
@click.pass_context
def main(context: click.Context, verbose: bool, quiet: bool) -> None:
    """Leak-free Mask R-CNN regions and features for referring expressions."""
    if verbose and quiet:
        raise click.UsageError("-v and -q: give only one of them")
    set_level(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    context.call_on_close(lambda: set_level(logging.NOTSET))
