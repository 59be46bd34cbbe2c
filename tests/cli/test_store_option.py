"""Options that were renamed: both names work, the older one with a note, and is not shown."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from refdet.cli import audit, evaluate_on_refer, export, extract_features, import_weights, report
from refdet.cli.common import renamed_option, store_option
from refdet.errors import InputError

NOTE = "note: --features was renamed to --store; the old name works until the next version\n"


def command(**attributes: Any) -> click.Command:
    @click.command()
    @store_option(help="A store.", **attributes)
    def show(**given: Any) -> None:
        if "bad" in given.values():
            raise InputError("bad: is bad; choose another")
        click.echo(given)

    return show


@pytest.mark.parametrize(
    ("arguments", "given", "errors"),
    [
        (["--store", "a.h5"], "{'store': 'a.h5'}\n", ""),
        (["--features", "a.h5"], "{'store': 'a.h5'}\n", NOTE),
        ([], "{'store': None}\n", ""),
    ],
)
def test_both_names_give_the_same(arguments: list[str], given: str, errors: str) -> None:
    result = CliRunner().invoke(command(), arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (0, given, errors)


def test_it_is_passed_as_its_command_wants() -> None:
    for option in ("--store", "--features"):
        assert CliRunner().invoke(command(type=int), [option, "3"]).stdout == "{'store': 3}\n"
        wrong = CliRunner().invoke(command(type=int), [option, "x"])
        assert wrong.exit_code == 2 and option in wrong.stderr


def test_both_at_once_are_refused() -> None:
    for arguments in (["--store", "a", "--features", "a"], ["--features", "a", "--store", "b"]):
        result = CliRunner().invoke(command(required=True), arguments)
        assert result.exit_code == 2 and "--features is the old name of --store; give --store alone" in result.stderr


def test_one_of_them_is_required_where_it_is() -> None:
    result = CliRunner().invoke(command(required=True), [])
    assert result.exit_code == 2 and "Missing option '--store'" in result.stderr
    assert CliRunner().invoke(command(required=True), ["--features", "a"]).exit_code == 0


def test_an_error_stays_alone() -> None:
    result = CliRunner().invoke(command(), ["--features", "bad"])
    assert isinstance(result.exception, InputError) and result.stderr == ""


@pytest.mark.parametrize("module", [audit, evaluate_on_refer, export], ids=lambda module: module.__name__)
def test_the_commands_show_the_new_name(module: Any) -> None:
    text = CliRunner().invoke(module.command, ["--help"]).stdout
    assert "--store" in text and "--features" not in text.replace("extract-features", "")
    assert any("--features" in parameter.opts for parameter in module.command.params)


RENAMED = [
    (audit, "--find-duplicates", "--by-content"), (extract_features, "--lower-threshold-if-empty", "--at-least-one"),
    (import_weights, "--weight-format", "--style"), (report, "--original-instances", "--made-from"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "new", "old"), RENAMED)
def test_the_other_renamed_options(module: Any, new: str, old: str) -> None:
    text = CliRunner().invoke(module.command, ["--help"]).stdout
    assert new in text and old not in text
    names = [parameter.opts for parameter in module.command.params]
    assert [new] in names and [old] in names


@pytest.mark.parametrize("old", [False, True])
def test_a_flag_under_both_names(old: bool) -> None:
    @click.command()
    @renamed_option("--new", "--old", "flag", is_flag=True, help="A flag.")
    def show(flag: bool) -> None:
        click.echo(flag)

    done = CliRunner().invoke(show, ["--old" if old else "--new"])
    said = "note: --old was renamed to --new; the old name works until the next version\n" if old else ""
    assert (done.stdout, done.stderr) == ("True\n", said)
    assert CliRunner().invoke(show, []).stdout == "False\n"
