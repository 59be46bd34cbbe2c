"""`refdet recipes`, and `refdet train --dry-run`: inputs are checked and costs estimated; nothing is written."""

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


def run_command(*words: str, code: int = 0) -> Result:
    """Run a command, asserting its exit code."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code, done.output
    return done


def test_recipes_lists_all_and_prints_one_that_can_be_loaded(tmp_path: Path) -> None:
    lines = run_command("recipes").stdout.splitlines()
    assert lines[0].split()[:4] == ["recipe", "network", "steps", "batch"] and len(lines) == 1 + len(recipe.names())
    assert any("c4-res101-3x" in line and "270,000" in line and "42.6 box AP, 36.7 mask AP" in line for line in lines)
    recipes = {entry["name"]: entry for entry in json.loads(run_command("recipes", "--json").stdout)}
    assert recipes["fpn-res50-lsj"]["network"] == "ResNet-50 FPN" and recipes["fpn-res50-lsj"]["steps"] == 737500
    (tmp_path / "printed.yaml").write_text(run_command("recipes", "fpn-res50-lsj").stdout)
    assert recipe.load(str(tmp_path / "printed.yaml")) == recipe.load("fpn-res50-lsj")
    assert json.loads(run_command("recipes", "demo", "--json").stdout)["train"]["steps"] == 650
    assert "no such recipe" in str(CliRunner().invoke(main, ["recipes", "none"], standalone_mode=False).exception)


def file_contents(root: Path) -> dict[Path, bytes]:
    """The contents of all files below a folder; folders have none."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dry_run_estimates_the_costs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    squares(tmp_path)
    squares(tmp_path / "val", images=3)
    monkeypatch.chdir(tmp_path)
    before = file_contents(tmp_path)
    sets = [f"--set={change}" for change in (*TINY, "train.steps=10", f"train.workers={workers}", "train.eval_every=4")]
    words = ["train", "--recipe=demo", "--instances=instances.json", "--images=images", "--device=cpu", "--dry-run",
             "--val-instances=val/instances.json", "--val-images=val/images", *sets]  # fmt: skip
    found = json.loads(run_command(*words, "--json").stdout)
    assert (found["images"], found["objects"], found["classes"], found["steps"]) == (4, 8, 2, 10)
    assert (found["validations"], found["validation_images"], found["epochs"]) == (3, 3, 5)
    # 10 training steps, and 3 validations of 3 images
    assert found["seconds"] == pytest.approx(10 * found["step_seconds"] + 9 * found["image_seconds"])
    assert found["step_seconds"] > 0 < found["image_seconds"] and found["memory_bytes"] > 2**25
    assert found["recipe"]["model"]["norm"] == "batch" and found["arithmetic"] == "float32"
    text = run_command(*words, "--out=run").stdout
    assert "3 of 3 images" in text and "10 of 2 images, 5.0 epochs" in text and "nothing was written" in text
    assert file_contents(tmp_path) == before
    printed = tmp_path / "printed.yaml"
    printed.write_text(text[: text.index("\n\ndry run")])
    assert recipe.load(str(printed)).train.steps == 10


@pytest.mark.slow
def test_a_dry_run_reports_the_errors_and_notes_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    squares(tmp_path)
    run(tmp_path)
    before = file_contents(tmp_path)
    instances, images, out = tmp_path / "instances.json", tmp_path / "images", tmp_path / "run"
    with pytest.raises(InputError, match="exists; choose another, remove it, or continue it"):
        dry_run("demo", instances, images, out, changes=TINY)
    with pytest.raises(InputError, match=r"model\.norm=frozen .*`weights=RUN_DIR`"):
        dry_run("c4-res101-3x", instances, images)
    found = dry_run("demo", instances, images, out, changes=[*TINY, "train.steps=6"], resume=True, device="cpu")
    assert found.steps == 4 and found.validations == 0 and file_contents(tmp_path) == before
    dry_run("demo", instances, images, changes=[*TINY, "model.width=64", "model.fpn_channels=8"], device="cpu")
    assert "recipe demo starts from random weights, not from ImageNet's; `weights=RUN_DIR`" in caplog.text


def test_training_without_dry_run_requires_out(tmp_path: Path) -> None:
    squares(tmp_path)
    words = ["train", "--recipe=demo", f"--instances={tmp_path / 'instances.json'}", f"--images={tmp_path / 'images'}"]
    assert "--out: give the run directory to write" in run_command(*words, code=2).stderr
