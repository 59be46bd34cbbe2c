"""Renamed options: the old name still works, with a note, and is not in the help."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from refdet.cli import audit, evaluate_on_refer, export, extract_features, import_weights, report
from refdet.cli.common import renamed_option, store_option
from refdet.errors import InputError

NOTE = "note: --features was renamed to --store; the old name works until the next version\n"


def make_command(**attributes: Any) -> click.Command:
    @click.command()
    @store_option(help="A store.", **attributes)
    def show(**options: Any) -> None:
        if "bad" in options.values():
            raise InputError("bad: is bad; choose another")
        click.echo(options)

    return show


@pytest.mark.parametrize(
    ("arguments", "stdout", "stderr"),
    [
        (["--store", "a.h5"], "{'store': 'a.h5'}\n", ""),
        (["--features", "a.h5"], "{'store': 'a.h5'}\n", NOTE),
        ([], "{'store': None}\n", ""),
    ],
)
def test_both_names_set_the_store_and_the_old_one_prints_a_note(arguments: list[str], stdout: str, stderr: str) -> None:
    result = CliRunner().invoke(make_command(), arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (0, stdout, stderr)


def test_attributes_of_the_option_apply_to_both_names() -> None:
    for option in ("--store", "--features"):
        assert CliRunner().invoke(make_command(type=int), [option, "3"]).stdout == "{'store': 3}\n"
        wrong = CliRunner().invoke(make_command(type=int), [option, "x"])
        assert wrong.exit_code == 2 and option in wrong.stderr


def test_both_names_at_once_are_an_error() -> None:
    for arguments in (["--store", "a", "--features", "a"], ["--features", "a", "--store", "b"]):
        result = CliRunner().invoke(make_command(required=True), arguments)
        assert result.exit_code == 2 and "--features is the old name of --store; give --store alone" in result.stderr


def test_a_required_option_can_be_given_by_either_name() -> None:
    result = CliRunner().invoke(make_command(required=True), [])
    assert result.exit_code == 2 and "Missing option '--store'" in result.stderr
    assert CliRunner().invoke(make_command(required=True), ["--features", "a"]).exit_code == 0


def test_an_error_is_not_accompanied_by_the_note() -> None:
    result = CliRunner().invoke(make_command(), ["--features", "bad"])
    assert isinstance(result.exception, InputError) and result.stderr == ""


@pytest.mark.parametrize("module", [audit, evaluate_on_refer, export], ids=lambda module: module.__name__)
def test_commands_show_store_and_accept_features(module: Any) -> None:
    text = CliRunner().invoke(module.command, ["--help"]).stdout
    assert "--store" in text and "--features" not in text.replace("extract-features", "")
    assert any("--features" in parameter.opts for parameter in module.command.params)


RENAMED = [
    (audit, "--find-duplicates", "--by-content"), (extract_features, "--lower-threshold-if-empty", "--at-least-one"),
    (import_weights, "--weight-format", "--style"), (report, "--original-instances", "--made-from"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "new", "old"), RENAMED)
def test_other_renamed_options_are_accepted_and_hidden(module: Any, new: str, old: str) -> None:
    text = CliRunner().invoke(module.command, ["--help"]).stdout
    assert new in text and old not in text
    names = [parameter.opts for parameter in module.command.params]
    assert [new] in names and [old] in names


@pytest.mark.parametrize("old", [False, True])
def test_a_flag_can_be_renamed(old: bool) -> None:
    @click.command()
    @renamed_option("--new", "--old", "flag", is_flag=True, help="A flag.")
    def show(flag: bool) -> None:
        click.echo(flag)

    done = CliRunner().invoke(show, ["--old" if old else "--new"])
    note = "note: --old was renamed to --new; the old name works until the next version\n" if old else ""
    assert (done.stdout, done.stderr) == ("True\n", note)
    assert CliRunner().invoke(show, []).stdout == "False\n"
