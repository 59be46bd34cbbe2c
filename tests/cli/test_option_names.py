"""Messages of the library name its arguments, such as `images`; the command line prints them as options, --images."""

from __future__ import annotations

import ast
import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import refdet
from refdet.cli import common
from refdet.cli.main import COMMANDS, describe
from refdet.cli.option_names import as_options
from refdet.errors import ArgumentError, InputError

LIBRARY = Path(refdet.__file__).parent
# a command line within a message, which may contain options
COMMAND = re.compile(r"(refdet [a-z]+(-[a-z]+)*|pip install|docker run|ray start)\b[^`;,\n]*")
OPTION = re.compile(r"(?<![\w-])--[a-z{]")
ARGUMENT = re.compile(r"`[a-z_]+(\.\w+)*(=[^`\s]+)?`")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("`images` a b.zip: no such file", "--images a b.zip: no such file"),
        ("note: `max_regions` was 3 and is now 4", "note: --max-regions was 3 and is now 4"),
        ("`exclude` and `keep_only`: not both", "--exclude and --keep-only: not both"),
        ("kept (continue with `resume=True`)", "kept (continue with --resume)"),
        ("try `device='cpu'`, or `box_format='normalized-xyxy'`", "try --device cpu, or --box-format normalized-xyxy"),
        ("give `weights=RUN_DIR` (from elsewhere)", "give --weights RUN_DIR (from elsewhere)"),
        ("add `train.workers=0` `input.mean=[1.5,2]`", "add --set train.workers=0 --set input.mean=[1.5,2]"),
        ("`changes` x: no '='", "--set x: no '='"),
        ("as `box_format`?", "as --box-format?"),
        (
            "`weights=my runs/a`, or `split_names=it's=NAME`",
            "--weights 'my runs/a', or --split-names 'it'\"'\"'s=NAME'",
        ),
        ("`split_names='test a'` `a.b=[1, 2]`", "--split-names 'test a' --set 'a.b=[1, 2]'"),
        # not arguments: commands, keys without a value, and parts of paths
        ("finish it with `refdet train --resume`", "finish it with `refdet train --resume`"),
        ("check that `java -version` works", "check that `java -version` works"),
        ("`train.steps` is 3", "`train.steps` is 3"),
        ("/data/`images`/a.jpg: a`out`.jpg", "/data/`images`/a.jpg: a`out`.jpg"),
    ],
)
def test_arguments_become_options(text: str, printed: str) -> None:
    assert as_options(text) == printed
    assert as_options(printed) == printed


def test_errors_and_notes_of_refdet_are_printed_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(InputError("`splits` dev: no such split"))[1] == "--split dev: no such split"
    assert describe(ArgumentError("max_regions", "must be 1 or more"))[1] == "--max-regions: must be 1 or more"
    common.note("note: `images` x: 3 files")
    assert capsys.readouterr().err == "note: --images x: 3 files\n"
    for logger, printed in (("refdet.x", "--out"), ("torch.x", "`out`")):
        common.NoteHandler().emit(logging.makeLogRecord({"name": logger, "msg": "`out` %s", "args": ("y",),
                                                         "levelno": logging.WARNING}))  # fmt: skip
        assert capsys.readouterr().err == f"{printed} y\n"


def string_literals(path: Path) -> Iterator[str]:
    """The strings of a module except docstrings; the values within f-strings are replaced by {}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    skipped = parts | {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


@pytest.fixture(scope="module")
def messages() -> set[tuple[str, str]]:
    """Pairs of a module outside cli/ and a string in it."""
    return {
        (str(path.relative_to(LIBRARY)), text)
        for path in LIBRARY.rglob("*.py")
        if path.relative_to(LIBRARY).parts[0] != "cli"
        for text in string_literals(path)
    }


def test_messages_of_the_library_contain_options_only_within_commands(messages: set[tuple[str, str]]) -> None:
    assert len(messages) > 1000
    assert not [(module, text) for module, text in messages if OPTION.search(COMMAND.sub("", text))]


def test_every_argument_in_a_message_exists_and_has_an_option(messages: set[tuple[str, str]]) -> None:
    options, arguments = {"--set"}, {"changes"}
    for name in COMMANDS:
        command = importlib.import_module(f"refdet.cli.{name.replace('-', '_')}").command
        options |= {option for p in command.params if isinstance(p, click.Option) for option in p.opts if not p.hidden}
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg):
                arguments.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a field
                arguments.add(node.target.id)
    named = {(module, match[0]) for module, text in messages for match in ARGUMENT.finditer(text)}
    assert len(named) > 50
    for module, written in named:
        printed = as_options(written)
        assert printed.split(" ")[0] in options, (module, written, printed)
        name = re.match(r"`(\w+)", written)[1]  # type: ignore[index]
        assert name in arguments or "." in written, (module, written)
