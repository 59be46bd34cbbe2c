import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from refdet.cli import common
from refdet.cli.main import COMMANDS, OUTPUT_LOST, main
from refdet.errors import InputError, RuntimeFailure
from refer import ReferError

FREE_SPACE = "free some space and run it again (finished work is kept)"


class Raises:
    """Stands for a command that fails with whatever it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, error: BaseException, *args: str) -> Result:
        @click.command("inspect")
        def command() -> None:
            raise error

        self.monkeypatch.setattr("refdet.cli.inspect.command", command)
        return CliRunner().invoke(main, args or ("inspect",))


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch) -> Iterator[Raises]:
    yield Raises(monkeypatch)


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
def test_an_error_is_one_line(raises: Raises, error: BaseException, code: int, line: str) -> None:
    result = raises(error)
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (code, "", f"error: {line}")


@pytest.mark.parametrize("args", [("--debug", "inspect"), ("inspect", "--debug")])
def test_debug_shows_the_traceback(raises: Raises, args: tuple[str, ...]) -> None:
    result = raises(InputError("a.json: not there"), *args)
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
def test_the_nearest_command_is_named(name: str, meant: str) -> None:
    result = CliRunner().invoke(main, [name])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {name}: no such command; did you mean {meant}? (see ")


def test_nothing_is_named_where_nothing_is_near() -> None:
    result = CliRunner().invoke(main, ["xyzzy"])
    assert result.exit_code == 2 and result.stderr.startswith("error: xyzzy: no such command (see ")


def test_version_says_what_a_bug_report_needs() -> None:
    import torch

    lines = CliRunner().invoke(main, ["--version"]).stdout.splitlines()
    assert lines[0].startswith("refdet, version ") and torch.__version__ in lines[1]
    assert lines[2].startswith("device: ") and lines[3].startswith("kernels ")


@pytest.mark.parametrize("args", [["inspct"], ["inspect", "--no-such-option"], ["--no-such-option"], ["inspect"]])
def test_a_wrong_command_line_is_one_line(args: list[str]) -> None:
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


def test_without_a_command_it_shows_the_help() -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and "extract-features" in result.stderr


def test_help_imports_neither_torch_nor_numpy() -> None:
    script = """
import sys
from refdet.cli.main import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "numpy", "h5py", "pandas", "refer"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "refdet", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (OUTPUT_LOST, "")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    common.echo_table([("val", "0.95"), ("testA", "12")], header=("split", "recall"))
    assert capsys.readouterr().out == "split  recall\nval      0.95\ntestA      12\n"
    common.echo_table([], header=("split", "recall"))
    assert capsys.readouterr().out == "split  recall\n"
    with pytest.raises(ValueError, match="columns"):
        common.echo_table([("a", "b"), ("c",)])


def test_json_and_notes_go_their_own_ways(capsys: pytest.CaptureFixture[str]) -> None:
    common.note("working")
    common.echo_json({"b": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"b": 1} and err == "working\n"
