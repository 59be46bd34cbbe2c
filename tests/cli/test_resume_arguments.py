"""extract-features --resume with something else than it was begun with: told before torch is imported, nothing lost."""

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
# The store to resume, what differs from how it was begun, and what is said of that.
OTHERWISE: dict[str, tuple[str, dict[str, str], str]] = {
    "option": (
        "begun.h5",
        {"--max-regions": "5"},
        "begun.h5.parts was started with different settings: --max-regions was 100 and",
    ),
    "batch": ("begun.h5", {"--batch-size": "2"}, "--batch-size was 4 and is now 2"),
    "weights": ("begun.h5", {"--checkpoint": "again"}, "another checkpoint"),
    "list": ("begun.h5", {"--instances": "fewer.json"}, "another image list"),
    "features in bfloat16": (
        "begun.h5",
        {"--features": "fc7", "--precision": "bfloat16"},
        '--features was ["pool5", "fc7"] and is now ["fc7"]',
    ),
    "of a whole store": (
        "whole.h5",
        {"--score-threshold": "0.5"},
        "whole.h5 is complete but has different settings: --sc",
    ),
    "weights of a whole store": ("whole.h5", {"--checkpoint": "again"}, "another checkpoint"),
    "a folder of somebody else": ("mine.h5", {}, "mine.h5.parts: contains notes.txt, not part of an extraction"),
    "a damaged plan": ("lost.h5", {}, "plan.json: damaged"),
}


def words(out: str, changes: dict[str, str]) -> list[str]:
    return ["extract-features", "--resume", *(w for pair in ({**BASE, "--out": out} | changes).items() for w in pair)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("begun")
    squares(root, images=3).rename(root / "fewer.json")
    squares(root)
    run(root)
    run(root, "train.seed=1", out="again")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert CliRunner().invoke(main, words("whole.h5", {})).exit_code == 0
        image = root / "images/4.png"
        good = image.read_bytes()
        image.write_bytes(good[:60])
        assert CliRunner().invoke(main, [*words("begun.h5", {}), "--strict"]).exit_code == 1
        image.write_bytes(good)
    for name, file in (("mine", "notes.txt"), ("lost", "plan.json")):
        (root / f"{name}.h5.parts").mkdir()
        (root / f"{name}.h5.parts" / file).write_text("mine")
    (root / "lost.h5.parts/000000.shard").write_bytes(b"x")
    return root


@pytest.mark.parametrize(("out", "changes", "said"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_differs_is_one_line(
    folder: Path, out: str, changes: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = CliRunner().invoke(main, words(out, changes))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(errors)) == (2, 1) and said in errors[0], done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_none_of_it_waits_for_torch(folder: Path) -> None:
    lines = [words(out, changes) for out, changes, _ in OTHERWISE.values()]
    code = (
        "import json, sys\nfrom refdet.cli.main import main\n"
        "for line in json.load(sys.stdin):\n"
        "    try: main(line)\n"
        "    except SystemExit as end: assert end.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input=json.dumps(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("out", ["begun.h5", "whole.h5"])
def test_the_same_goes_on(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(main, words(out, {})).exit_code == 0
