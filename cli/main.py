"""The ``refdet`` command: finds the commands, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

import refdet
from refdet.errors import RefdetError, is_disk_full

# In the order of the work; `--help` shows them so. Each is the `command` of the module of its name.
COMMANDS = (
    "build-split",
    "audit",
    "import-weights",
    "train",
    "evaluate",
    "extract-features",
    "evaluate-on-refer",
    "export",
    "inspect",
    "demo",
)

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# What these say about a path is the user's to mend; any other OSError is the machine's.
INPUT_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class LazyGroup(click.Group):
    """A click group that imports commands when they are asked for and reports errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name.replace('-', '_')}", __package__).command

    def main(  # type: ignore[override]  # click's has overloads for standalone_mode
        self, args: Sequence[str] | None = None, standalone_mode: bool = True, **options: Any
    ) -> Any:
        """Run a command line and leave with its exit code; see click for the arguments.

        ``--debug`` is taken out here, so that it may stand before or after the command's name.
        """
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **options)
        debug, args = _take_debug(list(sys.argv[1:] if args is None else args))
        try:
            code = super().main(args, standalone_mode=False, **options)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nothing more may be flushed into the pipe
            sys.exit(FAILED)
        except Exception as error:
            fail(error, debug)
        sys.exit(code if isinstance(code, int) else 0)


def fail(error: Exception, debug: bool) -> NoReturn:
    """Print an error in one line on stderr, after its traceback if ``debug``, and leave with its code."""
    if isinstance(error, NoArgsIsHelpError):
        error.show()  # the help is the message
        sys.exit(BAD_INPUT)
    if debug:
        traceback.print_exception(error)
    code, text = describe(error)
    click.echo("error: " + " ".join(text.splitlines()), err=True)
    sys.exit(code)


def describe(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an error."""
    if isinstance(error, RefdetError):
        return error.exit_code, str(error)
    if isinstance(error, click.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, click.UsageError):
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return error.exit_code, error.format_message().rstrip(".") + hint
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if is_disk_full(error):
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return FAILED, f"disk full{where}; free some space and run it again (what was finished is kept)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        code = BAD_INPUT if isinstance(error, INPUT_ERRORS) else FAILED
        if isinstance(error, FileExistsError | NotADirectoryError):
            return code, f"{where}is a file where a folder is needed; choose another --out"
        return code, where + (error.strerror or str(error))
    from refer import ReferError  # here, since it brings numpy

    if isinstance(error, ReferError):
        return BAD_INPUT, str(error)
    return FAILED, f"unexpected {type(error).__name__}: {error} (run with --debug for the traceback)"


def _take_debug(args: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is there (after ``--`` it is no option), and the arguments without it."""
    end = args.index("--") if "--" in args else len(args)
    kept = [arg for arg in args[:end] if arg != "--debug"]
    return len(kept) < end, kept + args[end:]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(refdet.__version__, prog_name="refdet")
def main() -> None:
    """Leak-free Mask R-CNN regions and features for referring expressions."""
