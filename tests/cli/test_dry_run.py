"""refdet recipes, and refdet train --dry-run: all that is known before the first step, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from training_examples import TINY, run, squares

from refdet.cli.main import main
from refdet.config import recipe
from refdet.errors import InputError
from refdet.training.train import dry_run


def command(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code, done.output
    return done


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    lines = command("recipes").stdout.splitlines()
    assert lines[0].split()[:4] == ["recipe", "network", "steps", "batch"] and len(lines) == 1 + len(recipe.names())
    assert any("c4-res101-3x" in line and "270,000" in line and "42.6 box AP, 36.7 mask AP" in line for line in lines)
    found = {line["name"]: line for line in json.loads(command("recipes", "--json").stdout)}
    assert found["fpn-res50-lsj"]["network"] == "ResNet-50 FPN" and found["fpn-res50-lsj"]["steps"] == 737500
    (tmp_path / "whole.yaml").write_text(command("recipes", "fpn-res50-lsj").stdout)
    assert recipe.load(str(tmp_path / "whole.yaml")) == recipe.load("fpn-res50-lsj")
    assert json.loads(command("recipes", "demo", "--json").stdout)["train"]["steps"] == 650
    assert "no such recipe" in str(CliRunner().invoke(main, ["recipes", "none"], standalone_mode=False).exception)


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dry_run_says_what_the_run_will_take_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    squares(tmp_path)
    squares(tmp_path / "val", images=3)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    sets = [f"--set={change}" for change in (*TINY, "train.steps=10", f"train.workers={workers}", "train.eval_every=4")]
    given = ["train", "--recipe=demo", "--instances=instances.json", "--images=images", "--device=cpu", "--dry-run",
             "--val-instances=val/instances.json", "--val-images=val/images", *sets]  # fmt: skip
    found = json.loads(command(*given, "--json").stdout)
    assert (found["images"], found["objects"], found["classes"], found["steps"]) == (4, 8, 2, 10)
    assert (found["validations"], found["validation_images"], found["epochs"]) == (3, 3, 5)
    assert found["seconds"] == pytest.approx(10 * found["step_seconds"] + 9 * found["image_seconds"])
    assert found["step_seconds"] > 0 < found["image_seconds"] and found["memory_bytes"] > 2**25
    assert found["recipe"]["model"]["norm"] == "batch" and found["arithmetic"] == "float32"
    text = command(*given, "--out=run").stdout
    assert "3 of 3 images" in text and "10 of 2 images, 5.0 epochs" in text and "nothing was written" in text
    assert contents(tmp_path) == before
    printed = tmp_path / "printed.yaml"
    printed.write_text(text[: text.index("\n\ndry run")])
    assert recipe.load(str(printed)).train.steps == 10


@pytest.mark.slow
def test_a_dry_run_checks_as_the_run_would(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    squares(tmp_path)
    run(tmp_path)
    before = contents(tmp_path)
    instances, images, out = tmp_path / "instances.json", tmp_path / "images", tmp_path / "run"
    with pytest.raises(InputError, match="exists; choose another, remove it, or continue it"):
        dry_run("demo", instances, images, out, changes=TINY)
    with pytest.raises(InputError, match=r"model\.norm=frozen .*`weights=RUN_DIR`"):
        dry_run("c4-res101-3x", instances, images)
    found = dry_run("demo", instances, images, out, changes=[*TINY, "train.steps=6"], resume=True, device="cpu")
    assert found.steps == 4 and found.validations == 0 and contents(tmp_path) == before
    dry_run("demo", instances, images, changes=[*TINY, "model.width=64", "model.fpn_channels=8"], device="cpu")
    assert "recipe demo starts from random weights, not from ImageNet's; `weights=RUN_DIR`" in caplog.text


def test_a_run_needs_a_folder(tmp_path: Path) -> None:
    squares(tmp_path)
    words = ["train", "--recipe=demo", f"--instances={tmp_path / 'instances.json'}", f"--images={tmp_path / 'images'}"]
    assert "--out: give the run directory to write" in command(*words, code=2).stderr
