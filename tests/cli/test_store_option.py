"""--store, and --features, its older name, of the commands that read a store."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from refdet.cli import audit, evaluate_on_refer, export
from refdet.cli.common import store_option
from refdet.errors import InputError

NOTE = "note: --features is called --store now; the old name still works\n"


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
        assert CliRunner().invoke(command(name="file", type=int), [option, "3"]).stdout == "{'file': 3}\n"
        wrong = CliRunner().invoke(command(name="file", type=int), [option, "x"])
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
