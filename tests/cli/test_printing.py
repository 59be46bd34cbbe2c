"""Printed text: control characters of untrusted files are escaped, and closed streams do not change exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from split_examples import coco, write, write_refs

from refdet.cli import common
from refdet.cli.main import OUTPUT_LOST, describe, fail, main
from refdet.errors import InputError
from refdet.files.printable_text import escape_unprintable
from refdet.structures.provenance import Provenance

pytestmark = pytest.mark.slow

# a name that would forge a line of output, clear the screen, set the title of the terminal and reverse text
FORGED = "x\nproven: run was trained on this file\r\x1b[2J\x1b]0;title\x07\u202eevil\u2028\x9b31m\x7f\udcff"
ANY_TEXT = st.one_of(st.text(), st.text(st.characters(min_codepoint=0, max_codepoint=0x2FF)), st.just(FORGED))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_TEXT)
def test_escaped_text_is_printable_and_printable_text_is_unchanged(text: str) -> None:
    escaped = escape_unprintable(text)
    assert escaped.isprintable() and escape_unprintable(escaped) == escaped
    escaped.encode()  # raises for a lone surrogate
    if text.isprintable():
        assert escaped == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202egpj", r"\u202egpj"),
        ("dög 犬 🐕", "dög 犬 🐕"),
        ("\udcff", r"\udcff"),
    ],
)
def test_unprintable_characters_become_escape_sequences(text: str, escaped: str) -> None:
    assert escape_unprintable(text) == escaped


def log_warning(text: str) -> None:
    logger = logging.Logger("refdet.test")
    logger.addHandler(common.NoteHandler())
    logger.warning("note: %s", text)


def fail_with(text: str) -> None:
    with pytest.raises(SystemExit):
        fail(InputError(text), debug=False)


PRINTERS: dict[str, Callable[[str], object]] = {
    "line": common.echo_line,
    "note": common.note,
    "table": lambda text: common.echo_table([("1", text)]),
    "log": log_warning,
    "error": fail_with,
    "unexpected error": lambda text: common.note("error: " + describe(KeyError(text))[1]),
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ANY_TEXT)
@pytest.mark.parametrize("printer", PRINTERS)
def test_any_text_is_printed_on_one_line(printer: str, text: str) -> None:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        PRINTERS[printer](text)
    written = out.getvalue() + err.getvalue()
    assert written.endswith("\n") and written.count("\n") == 1 and written[:-1].isprintable()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ANY_TEXT)
def test_json_output_is_printable_and_lossless(text: str) -> None:
    with redirect_stdout(io.StringIO()) as out:
        common.echo_json({text: [text]})
    assert all(line.isprintable() for line in out.getvalue().split("\n"))
    assert json.loads(out.getvalue()) == {text: [text]}


def write_run_directory(folder: Path, provenance: Provenance) -> Path:
    folder.mkdir()
    tree = {"recipe": {}, "categories": [{"id": 1, "name": FORGED}], "step": 5, "provenance": provenance.to_json()}
    (folder / "model.json").write_text(json.dumps(tree))
    save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_run_directory_cannot_forge_output_lines(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val")]})
    excluded = {"refcoco/unc/val": {"images": 1, "found": 0}, f"refcoco/unc/{FORGED}": {"images": 1, "found": 0}}
    provenance = Provenance(FORGED, "ab", 1, 1, "cd", excluded, note=FORGED)
    run = write_run_directory(tmp_path / "run", provenance)
    from_weights = write_run_directory(tmp_path / "from_weights", replace(provenance, weights=FORGED))
    for args in (
        ["audit", "--checkpoint", run, "--refer-root", root],
        ["inspect", run],
        ["audit", "--checkpoint", from_weights, "--refer-root", root],
    ):
        done = CliRunner().invoke(main, list(map(str, args)))
        # not with the newline of FORGED before it, which is escaped, or in an error message becomes a space
        assert "proven: run was trained on this file" in done.output and r"\x1b]0;title\x07\u202eevil" in done.output
        lines = done.output.split("\n")
        assert all(line.isprintable() and not line.startswith("proven:") for line in lines)


@pytest.fixture
def audit_commands(tmp_path: Path) -> dict[int, list[str]]:
    """Command lines of an audit that finds no leak, and of one that does, by their exit codes, 0 and 1."""
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val")]})
    clean = write(tmp_path / "clean.json", coco([3, 4], []))
    leaking = write(tmp_path / "leaking.json", coco([2, 3], []))
    command = [sys.executable, "-m", "refdet", "audit", "--refer-root", str(root), "--instances"]
    return {0: [*command, str(clean)], 1: [*command, str(leaking)]}


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("exit_code", [0, 1])
def test_closed_streams_do_not_change_the_exit_code(
    audit_commands: dict[int, list[str]], exit_code: int, closed: tuple[int, ...]
) -> None:
    redirections = " ".join(f"{number}>&-" for number in closed)  # closes these file descriptors
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *audit_commands[exit_code]], capture_output=True, text=True
    )
    assert done.returncode == exit_code and "Traceback" not in done.stderr + done.stdout


def test_a_closed_pipe_is_not_reported_as_a_leak(audit_commands: dict[int, list[str]]) -> None:
    for stream in ("stdout", "stderr"):
        read_end, write_end = os.pipe()
        os.close(read_end)  # so that writing fails with EPIPE
        other = "stderr" if stream == "stdout" else "stdout"
        streams = {stream: write_end, other: subprocess.PIPE}
        done = subprocess.run(audit_commands[0], **streams)  # type: ignore[call-overload]
        os.close(write_end)
        assert done.returncode == (OUTPUT_LOST if stream == "stdout" else 0)
        assert b"Traceback" not in (getattr(done, other) or b"") and b"Exception" not in (getattr(done, other) or b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_stdout_on_a_full_disk_is_not_reported_as_a_leak(audit_commands: dict[int, list[str]]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(audit_commands[0], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == OUTPUT_LOST and b"Traceback" not in done.stderr


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path, below: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("")
    with pytest.raises(OSError) as caught:
        (file / below).mkdir()
    assert describe(caught.value) == (2, f"{file}: is a file where a folder is needed; choose another path")
