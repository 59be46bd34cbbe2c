"""`refdet draw`: a picture of the regions of one image, from a detector or a store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from export_examples import DETECTIONS, HEIGHT, WIDTH, write_store
from PIL import Image
from trained_models import saved_model

from refdet.cli.main import main
from refdet.structures.regions import Regions


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["draw", *map(str, args)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("draw") / "d.h5", DETECTIONS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / DETECTIONS[0].file_name
    Image.new("RGB", (WIDTH, HEIGHT), "#808080").save(path)
    return path


def test_regions_of_a_store_are_drawn_above_the_score_threshold(store: Path, image: Path, tmp_path: Path) -> None:
    result = run(image, "--store", store, "--out", tmp_path / "a.png", "--score-threshold", 0.87, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"out": str(tmp_path / "a.png"), "regions": 4, "drawn": 2}
    with Image.open(image) as source, Image.open(tmp_path / "a.png") as drawn:
        expected = DETECTIONS[0].draw(source, min_score=0.87, names={1: "dog", 2: "cat"})
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_max_regions_draws_the_best_regions_and_no_masks_only_boxes(store: Path, image: Path, tmp_path: Path) -> None:
    detections = DETECTIONS[0]
    best = [int(detections.scores.argmax())]
    only_best = Regions(1, "", HEIGHT, WIDTH, detections.boxes[best], detections.scores[best],
                        detections.category_ids[best], masks=(detections.masks[best[0]],))  # type: ignore[index]  # fmt: skip
    with Image.open(image) as source:
        drawn = detections.draw(source, max_regions=1)
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(only_best.draw(source)))
        without_masks = replace(only_best, masks=None).draw(source, names={1: "dog", 2: "cat"})
    result = run(image, "--store", store, "--out", tmp_path / "a.png", "--max-regions", 1, "--no-masks")
    assert "1 of 4 regions drawn" in result.stdout
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(without_masks))


def test_regions_of_a_detector_are_drawn_in_the_format_of_the_suffix(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    out = tmp_path / "out.jpg"
    result = run(tmp_path / "x.png", "--checkpoint", model, "--out", out, "--score-threshold", 0.01, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    with Image.open(out) as picture:
        assert picture.size == (90, 60) and picture.format == "JPEG"


def test_an_image_is_found_by_its_folder_or_its_id(tmp_path: Path) -> None:
    one_region = replace(DETECTIONS[1], image_id=1, file_name="a/x.png")
    four_regions = replace(DETECTIONS[0], image_id=2, file_name="b/x.png")
    store = write_store(tmp_path / "d.h5", [one_region, four_regions])
    for folder in ("a", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / folder / "x.png")
    result = run(tmp_path / "a" / "x.png", "--store", store, "--out", tmp_path / "1.png")
    assert result.exit_code == 0 and "1 of 1 region" in result.stdout
    result = run(tmp_path / "c" / "x.png", "--store", store, "--out", tmp_path / "2.png")
    assert result.exit_code == 2 and "images 1 and 2 both fit the name x.png; give --image-id" in result.stderr
    args = ("--store", store, "--out", tmp_path / "2.png", "--image-id")
    result = run(tmp_path / "c" / "x.png", *args, 2)
    assert result.exit_code == 0 and "4 of 4 regions" in result.stdout
    result = run(tmp_path / "c" / "x.png", *args[:3], tmp_path / "3.png", "--image-id", 7)
    assert result.exit_code == 2 and "has no image 7" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--out", "new.png"), "give either --checkpoint, to detect regions, or --store"),
        (("--out", "new.txt", "--store", "STORE"), "not the name of a picture; end it in .png"),
        (("--out", "new.png", "--store", "STORE", "--image-id", "5"), "image 5 has no regions: cannot be read"),
        (("--out", "new.png", "--store", "STORE", "--image-id", "3"), "is 9x6, but the regions are of an image of 8x6"),
        (("--out", "new.png", "--store", "STORE"), "has no image named other.png; give its --image-id"),
        (("--out", "new.png", "--checkpoint", "no"), "--checkpoint no: "),
        (("--out", "x.png", "--store", "STORE"), "x.png exists"),
    ],
)
def test_invalid_input_is_one_error_line_and_writes_no_file(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save("other.png")
    Path("x.png").write_bytes(b"an existing file")
    result = run("other.png", *(str(store) if arg == "STORE" else arg for arg in args))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.png", "x.png"]
    assert Path("x.png").read_bytes() == b"an existing file"
