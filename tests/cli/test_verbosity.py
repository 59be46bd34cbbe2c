"""-v and -q print more or fewer notes; results and errors stay the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from split_examples import coco, write, write_refs

from refdet.cli.main import main


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """An instances file for which audit finds no leak but prints a note, and a REFER folder."""
    instances = write(tmp_path / "f.json", coco([3], [3]))
    return str(instances), str(write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "train")]}))


def audit(files: tuple[str, str], *flags: str, instances: str = "") -> Result:
    return CliRunner().invoke(main, [*flags, "audit", "--instances", instances or files[0], "--refer-root", files[1]])


def test_quiet_prints_only_the_result(files: tuple[str, str]) -> None:
    plain, quiet = audit(files), audit(files, "-q")
    assert "note: " in plain.stderr and quiet.stderr == ""
    assert (plain.exit_code, plain.stdout) == (quiet.exit_code, quiet.stdout)


def test_quiet_prints_errors(files: tuple[str, str]) -> None:
    done = audit(files, "-q", instances="none.json")
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_verbose_prints_details(files: tuple[str, str]) -> None:
    done = CliRunner().invoke(main, ["-v", "inspect", files[0]])
    assert f"{files[0]}: 1 image, 1 annotation" in done.stderr
    assert CliRunner().invoke(main, ["inspect", files[0]]).stderr == ""


def test_verbose_and_quiet_together_are_an_error(files: tuple[str, str]) -> None:
    done = audit(files, "-v", "-q")
    assert done.exit_code == 2 and "-v and -q: give only one of them" in done.stderr


@pytest.mark.parametrize("flag", ["-v", "-q"])
def test_log_levels_are_restored(files: tuple[str, str], flag: str) -> None:
    audit(files, flag)
    assert logging.getLogger("refdet").level == logging.getLogger("refer").level == logging.NOTSET


@pytest.mark.parametrize("flag", ["-v", "-q"])
def test_the_commands_of_the_demo_are_as_verbose_as_the_demo(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    def inspect_and_audit(out: Path, run: Any, *arguments: object) -> dict[str, Any]:
        run(["inspect", files[0]])
        run(["audit", "--instances", files[0], "--refer-root", files[1]])
        return {}

    monkeypatch.setattr("refdet.cli.demo_pipeline.demo", inspect_and_audit)
    done = CliRunner().invoke(main, [flag, "demo", "--out", str(tmp_path / "demo"), "--json"])
    printed = ["note: " in done.stderr, f"{files[0]}: 1 image, 1 annotation" in done.stderr]
    assert done.exit_code == 0 and printed == [flag == "-v"] * 2
