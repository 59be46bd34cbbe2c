"""The `refdet` command itself: errors, exit codes, help, unknown commands and output."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from refdet.cli import common
from refdet.cli.main import COMMANDS, OUTPUT_LOST, main
from refdet.errors import InputError, RuntimeFailure
from refer import ReferError

FREE_SPACE = "free some space and run it again (finished work is kept)"


RunRaising = Callable[..., Result]


@pytest.fixture
def run_raising(monkeypatch: pytest.MonkeyPatch) -> RunRaising:
    """A function that makes `refdet inspect` raise an error, and runs it or other command words."""

    def run(error: BaseException, *words: str) -> Result:
        @click.command("inspect")
        def command() -> None:
            raise error

        monkeypatch.setattr("refdet.cli.inspect.command", command)
        return CliRunner().invoke(main, words or ("inspect",))

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.json: not\nthere"), 2, "a.json: not there"),
        (RuntimeFailure("loss is nan"), 1, "loss is nan"),
        (ReferError("refs(unc).p: cut short"), 2, "refs(unc).p: cut short"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.jpg"), 2, "x.jpg: No such file"),
        (OSError(errno.EIO, "Input/output error", "x.h5"), 1, "x.h5: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device", "x.h5"), 1, f"disk full: x.h5; {FREE_SPACE}"),
        (RuntimeError(f"write failed: {os.strerror(errno.ENOSPC)}"), 1, f"disk full; {FREE_SPACE}"),
        (KeyError("x"), 1, "unexpected KeyError: 'x' (run with --debug for the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    run_raising: RunRaising, error: BaseException, code: int, line: str
) -> None:
    result = run_raising(error)
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (code, "", f"error: {line}")


@pytest.mark.parametrize("args", [("--debug", "inspect"), ("inspect", "--debug")])
def test_debug_shows_the_traceback(run_raising: RunRaising, args: tuple[str, ...]) -> None:
    result = run_raising(InputError("a.json: not there"), *args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.endswith("error: a.json: not there\n")


def test_debug_after_two_dashes_is_an_argument() -> None:
    result = CliRunner().invoke(main, ["inspect", "--", "--debug"])
    assert result.exit_code == 2
    assert "--debug" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("extract", "extract-features"),
        ("EXTRACT_FEATURES", "extract-features"),
        ("features", "extract-features"),
        ("inspct", "inspect"),
        ("eval", "evaluate or evaluate-on-refer"),
        ("split", "build-split"),
        ("import", "import-weights"),
        ("trian", "train"),
    ],
)
def test_an_unknown_command_suggests_the_nearest(name: str, meant: str) -> None:
    result = CliRunner().invoke(main, [name])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {name}: no such command; did you mean {meant}? (see ")


def test_an_unknown_command_without_a_near_one_suggests_none() -> None:
    result = CliRunner().invoke(main, ["xyzzy"])
    assert result.exit_code == 2 and result.stderr.startswith("error: xyzzy: no such command (see ")


def test_version_shows_torch_the_device_and_the_kernels() -> None:
    import torch

    lines = CliRunner().invoke(main, ["--version"]).stdout.splitlines()
    assert lines[0].startswith("refdet, version ") and torch.__version__ in lines[1]
    assert lines[2].startswith("device: ") and lines[3].startswith("kernels ")


@pytest.mark.parametrize("args", [["inspct"], ["inspect", "--no-such-option"], ["--no-such-option"], ["inspect"]])
def test_a_usage_error_is_one_line_that_points_to_help(args: list[str]) -> None:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "--help)" in result.stderr


def test_help_lists_every_command_in_order() -> None:
    result = CliRunner().invoke(main, ["--help"])
    listed = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert result.exit_code == 0 and listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0 and f"Usage: main {command} " in result.stdout


def test_without_a_command_the_help_is_shown() -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and "extract-features" in result.stderr


def test_help_imports_neither_torch_nor_numpy() -> None:
    script = """
import sys
from refdet.cli.main import main
try:
    main(["--help"])
finally:
    loaded = {"torch", "numpy", "h5py", "pandas", "refer"} & set(sys.modules)
    assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_has_its_own_exit_code_and_no_message() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "refdet", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (OUTPUT_LOST, "")


def test_echo_table_aligns_columns(capsys: pytest.CaptureFixture[str]) -> None:
    common.echo_table([("val", "0.95"), ("testA", "12")], header=("split", "recall"))
    assert capsys.readouterr().out == "split  recall\nval      0.95\ntestA      12\n"
    common.echo_table([], header=("split", "recall"))
    assert capsys.readouterr().out == "split  recall\n"
    with pytest.raises(ValueError, match="columns"):
        common.echo_table([("a", "b"), ("c",)])


def test_json_goes_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    common.note("working")
    common.echo_json({"b": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"b": 1} and err == "working\n"
