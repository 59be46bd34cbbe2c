"""An option that has no effect beside the others is an error that names it, or a note if it does no harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from export_examples import DETECTIONS, HEIGHT, WIDTH, write_dataset, write_store
from PIL import Image
from safetensors.numpy import save_file

from refdet.cli.main import main

EXTRACT = "extract-features --checkpoint run --images images --out new.h5 --instances a.json"
EVALUATE_ON_REFER = "evaluate-on-refer --store d.h5 --refer-root refer --dataset refcoco --split-by unc --out new"
REPORT = "report --metrics ap.json --out new.html"
TRAIN = "train --recipe demo --instances a.json --images images --out new"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that pass the checks of their kind."""
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "d.h5", DETECTIONS)
    write_dataset(tmp_path / "refer")
    for name in ("images", "run"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / DETECTIONS[0].file_name)
    (tmp_path / "run" / "model.json").write_text("{}")
    save_file({}, tmp_path / "run" / "model.safetensors")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "ap.json").write_text(
        json.dumps({"bbox": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.5)})
    )
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("draw images --store d.h5 --out new.png --device cpu", "--device: is for --checkpoint; omit it"),
        ("draw images --store d.h5 --out new.png --device auto", "--device: is for --checkpoint; omit it"),
        ("draw images --checkpoint run --out new.png --image-id 0", "--image-id: is for --store; omit it"),
        (f"{EXTRACT} --box-format xyxy", "--box-format xyxy is for --boxes; give --boxes or omit"),
        (
            f"{EXTRACT} --boxes d.h5 --box-format xyxy",
            "a store has its own box format; omit --box-format xyxy",
        ),
        (
            f"{EXTRACT} --boxes d.h5 --regions annotations",
            "--boxes d.h5 replaces --regions; omit --regions annotations",
        ),
        (f"{EXTRACT} --masks annotated", "--masks: is for --regions annotations or --boxes"),
        ("audit --refer-root refer --store d.h5 --allow-unidentified", "--allow-unidentified: is for the images of"),
        (f"{EVALUATE_ON_REFER} --box-format xyxy", "--box-format xyxy is for --predictions"),
        (f"{EVALUATE_ON_REFER} --protocol mdetr", "--protocol mdetr is for --predictions"),
        ("browse d.h5 --box-format xyxy", "--box-format xyxy is for --predictions"),
        ("fetch-data --list --from images", "--from: --list shows the usual sources"),
        (
            "export --store d.h5 --format mattnet --out new --refer-root refer --dataset refcoco --split-by unc "
            "--top-attributes 50",
            "--top-attributes is for --attributes",
        ),
        (f"{TRAIN} --exif ignore --set input.exif=apply", "--exif ignore: replaces --set input.exif"),
    ],
)
def test_an_option_without_effect_is_an_error(folder: Path, line: str, message: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("report --store d.h5 --images images --pictures 0", "--images: not used with --pictures 0"),
        ("report --metrics ap.json --pictures 12", "--pictures: not used, as there is no --store"),
        ("report --metrics ap.json --dataset refcoco --split-by unc", "--dataset: not used, as there is no --store"),
        ("report --metrics ap.json --refer-root refer", "--refer-root: not used, as there is neither --store nor"),
    ],
)
def test_an_option_that_does_no_harm_is_noted(folder: Path, line: str, message: str) -> None:
    done = CliRunner().invoke(main, [*line.split(), "--out", "new.html"])
    assert done.exit_code == 0 and f"note: {message}" in done.stderr, done.output
