"""Messages about missing files: they name the command that downloads them."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import refdet
from refdet.cli.main import main
from refdet.data.coco import CocoIndex
from refdet.data.fetch.catalog import ITEMS
from refdet.data.fetch.hints import how_to_fetch
from refdet.data.image_files import open_files
from refer import REFER, ReferNotFoundError


def refdet_command(*args: str | Path) -> Any:
    """The result of a command of refdet, without a process of its own."""
    return CliRunner().invoke(main, list(map(str, args)))


def test_hints_name_the_command_for_each_file_of_coco() -> None:
    for item in ITEMS:
        for name in item.outputs:
            if not (item.dataset or item.magic):  # REFER's and Parquet files have no hint
                assert f"--only {item.name} downloads it" in how_to_fetch(Path("data") / name)
    assert "--only val2017 " in how_to_fetch(Path("data/val2017"))  # the folder of an unpacked val2017.zip
    assert how_to_fetch(Path("mine.json")) == how_to_fetch(Path("images")) == ""


@pytest.mark.parametrize(
    "command",  # with {} for a folder that has no such files
    [
        ("build-split", "--refer-root", "{}", "--out", "{}/o.json", "--instances", "{}/instances_train2014.json"),
        ("audit", "--refer-root", "{}", "--instances", "{}/instances_train2014.json"),
        (
            "train",
            "--recipe",
            "demo",
            "--images",
            "{}",
            "--out",
            "{}/run",
            "--instances",
            "{}/instances_train2014.json",
        ),
    ],
)
def test_commands_hint_how_to_fetch_missing_instances(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = refdet_command(*(word.format(tmp_path) for word in command))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "refdet fetch-data --only annotations2014 downloads it" in result.stderr


def test_library_errors_hint_how_to_fetch_missing_files(tmp_path: Path, shapes_root: Path) -> None:
    hint = "no such file; refdet fetch-data --only annotations2014 downloads it"
    with pytest.raises(refdet.errors.InputError, match=hint):
        CocoIndex.load(tmp_path / "instances_val2014.json")
    with pytest.raises(refdet.errors.InputError, match=hint):
        refdet.build_split(tmp_path / "instances_train2014.json", shapes_root / "refer", tmp_path / "out.json")
    with pytest.raises(refdet.errors.InputError, match="--only train2014 downloads it"):
        open_files(tmp_path / "train2014")


def test_missing_refer_folders_hint_how_to_fetch_them(tmp_path: Path) -> None:
    root = tmp_path / "data" / "refer"
    hint = rf"unpack refcoco\+\.zip \(or run refdet fetch-data --only refcoco\+ --out {tmp_path}/data\)"
    with pytest.raises(ReferNotFoundError, match=hint):
        REFER(str(root), "refcoco+", "unc")
    with pytest.raises(ReferNotFoundError, match=r"--only refcoco\+, which puts it in data/refer\)"):
        REFER(str(tmp_path / "mine"), "refcoco+", "unc")
    existing = __file__  # not a file of instances, but the folders of REFER are missed first
    result = refdet_command("audit", "--instances", existing, "--refer-root", root)
    assert result.exit_code == 2 and "refdet fetch-data" in result.stderr
