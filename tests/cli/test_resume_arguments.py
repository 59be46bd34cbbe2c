"""`extract-features --resume` with other settings than before: an error before torch is imported, and no change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from training_examples import run, squares

from refdet.cli.main import main

BASE = {"--checkpoint": "run", "--images": "images", "--instances": "instances.json", "--device": "cpu"}
# the store to resume, options that differ from those of the first run, and text of the error
DIFFERENT: dict[str, tuple[str, dict[str, str], str]] = {
    "option": (
        "unfinished.h5",
        {"--max-regions": "5"},
        "unfinished.h5.parts was started with different settings: --max-regions was 100 and",
    ),
    "batch size": ("unfinished.h5", {"--batch-size": "2"}, "--batch-size was 4 and is now 2"),
    "weights": ("unfinished.h5", {"--checkpoint": "again"}, "another checkpoint"),
    "image list": ("unfinished.h5", {"--instances": "fewer.json"}, "another image list"),
    "features in bfloat16": (
        "unfinished.h5",
        {"--features": "fc7", "--precision": "bfloat16"},
        '--features was ["pool5", "fc7"] and is now ["fc7"]',
    ),
    "option of a complete store": (
        "complete.h5",
        {"--score-threshold": "0.5"},
        "complete.h5 is complete but has different settings: --sc",
    ),
    "weights of a complete store": ("complete.h5", {"--checkpoint": "again"}, "another checkpoint"),
    "folder of other files": ("foreign.h5", {}, "foreign.h5.parts: contains notes.txt, not part of an extraction"),
    "damaged plan": ("damaged.h5", {}, "plan.json: damaged"),
}


def resume_command(out: str, changes: dict[str, str]) -> list[str]:
    options = BASE | {"--out": out} | changes
    return ["extract-features", "--resume", *(word for option in options.items() for word in option)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, complete, unfinished and damaged extractions, and a .parts folder of other files."""
    root = tmp_path_factory.mktemp("resume")
    squares(root, images=3).rename(root / "fewer.json")
    squares(root)
    run(root)
    run(root, "train.seed=1", out="again")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert CliRunner().invoke(main, resume_command("complete.h5", {})).exit_code == 0
        image = root / "images/4.png"
        good = image.read_bytes()
        image.write_bytes(good[:60])
        assert CliRunner().invoke(main, [*resume_command("unfinished.h5", {}), "--strict"]).exit_code == 1
        image.write_bytes(good)
    for name, file in (("foreign", "notes.txt"), ("damaged", "plan.json")):
        (root / f"{name}.h5.parts").mkdir()
        (root / f"{name}.h5.parts" / file).write_text("not of refdet")
    (root / "damaged.h5.parts/000000.shard").write_bytes(b"x")
    return root


@pytest.mark.parametrize(("out", "changes", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_settings_are_one_error_line_and_change_no_file(
    folder: Path, out: str, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = CliRunner().invoke(main, resume_command(out, changes))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(errors)) == (2, 1) and message in errors[0], done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_different_settings_are_found_without_importing_torch(folder: Path) -> None:
    lines = [resume_command(out, changes) for out, changes, _ in DIFFERENT.values()]
    code = (
        "import json, sys\nfrom refdet.cli.main import main\n"
        "for line in json.load(sys.stdin):\n"
        "    try: main(line); raise AssertionError(line)\n"
        "    except SystemExit as end: assert end.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input=json.dumps(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("out", ["unfinished.h5", "complete.h5"])
def test_the_same_settings_resume(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(main, resume_command(out, {})).exit_code == 0
