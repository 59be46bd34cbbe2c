"""`Regions`: conversion to COCO results, equality, repr, pickling and drawing."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from store_examples import HEADER, contents, make_regions, record

from refdet import store
from refdet.data.image_pixels import read_pixels
from refdet.errors import InputError
from refdet.structures.drawing import COLORS
from refdet.structures.regions import NO_CATEGORY, Regions

BLACK = np.zeros((60, 80, 3), np.uint8)
BLUE, ORANGE = (tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in COLORS[:2])


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the texts of labels, which are not drawn."""
    texts: list[str] = []
    monkeypatch.setattr("refdet.structures.drawing.Canvas.label", lambda self, box, text, *more: texts.append(text))
    return texts


def two_regions(masks: bool = True) -> Regions:
    """A region of score 0.9 on the right and one of 0.4 on the left of an image."""
    boxes = np.float32([[40, 20, 70, 50], [5, 20, 25, 50]])
    pixels = np.zeros((60, 80, 2), np.uint8, order="F")
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        pixels[y1:y2, x1:x2, i] = 1
    rles = tuple(rle["counts"] for rle in coco_mask.encode(pixels))
    return Regions(
        7, "a.png", 60, 80, boxes, np.float32([0.9, 0.4]), np.array([3, 5]), masks=rles if masks else None,
        features={"fc7": np.zeros((2, 8), np.float32)}, names={3: "dog", 5: "cat"},
    )  # fmt: skip


def test_coco_results_can_be_written_and_read_back() -> None:
    results = json.loads(json.dumps(two_regions().to_coco()))
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (7, 3, [40, 20, 30, 30]), (7, 5, [5, 20, 20, 30]),
    ]  # fmt: skip
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.4])
    assert coco_mask.area([r["segmentation"] for r in results]).tolist() == [900, 600]


def test_coco_results_without_masks_or_regions() -> None:
    assert "segmentation" not in two_regions(masks=False).to_coco()[0]
    assert Regions.empty(7, "", 60, 80).to_coco() == []


def test_repr_is_one_line() -> None:
    assert repr(two_regions()) == "Regions(image 7 'a.png', 80x60: 2 regions, masks, fc7 2x8 float32)"
    assert repr(Regions.empty(7, "", 60, 80, "no file")) == "Regions(image 7, 80x60: 0 regions, error 'no file')"


def test_names_are_neither_compared_nor_stored_with_each_image(tmp_path: Path) -> None:
    bare = make_regions(4, 3)
    named = replace(bare, names={3: "other"})
    assert named == bare
    columns = store.Columns({"pool5": (4,), "fc7": (6,)}, masks=True, ann_ids=True)
    for name, regions in (("a.h5", bare), ("b.h5", named)):
        counts = sum(map(len, regions.masks or ()))
        image = record(regions)
        row = store.ImageRow(image.id, image.file_name, image.height, image.width, "", len(regions), counts)
        with store.create(tmp_path / name, HEADER, columns, [row]) as writer:
            writer.put(regions)
    assert contents(tmp_path / "a.h5") == contents(tmp_path / "b.h5")
    with store.open(tmp_path / "b.h5") as written:
        assert written[4].names == {3: "dög"}  # the names in the header of the store
        assert repr(written).endswith("1 image, 3 regions, fc7, pool5, masks)")


def test_regions_are_pickled_with_their_names() -> None:
    assert pickle.loads(pickle.dumps(two_regions())).names == {3: "dog", 5: "cat"}


@pytest.mark.usefixtures("labels")
@pytest.mark.parametrize("masks", [True, False])
def test_the_picture_shows_boxes_and_masks(masks: bool) -> None:
    drawn = two_regions(masks).draw(BLACK)
    assert drawn.size == (80, 60) and drawn.mode == "RGB" and not BLACK.any()
    assert drawn.getpixel((70, 48)) == BLUE and drawn.getpixel((25, 48)) == ORANGE  # the right sides of the boxes
    assert (drawn.getpixel((55, 40)) != (0, 0, 0)) == masks


def test_arrays_pil_images_and_paths_are_drawn_on_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.asarray(two_regions().draw(pixels))
    for image in (Image.fromarray(pixels), str(tmp_path / "a.png"), tmp_path / "a.png"):
        np.testing.assert_array_equal(np.asarray(two_regions().draw(image)), expected)


FILE_FORMATS = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "BMP": {},
    "GIF": {},
    "PPM": {},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_files_are_drawn_on_with_the_pixels_that_the_detector_sees(tmp_path: Path, kind: str, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a", kind, exif=exif, **FILE_FORMATS[kind])
    seen = read_pixels(tmp_path / "a")
    if kind not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(seen, pixels)
    expected = np.asarray(two_regions().draw(seen))
    np.testing.assert_array_equal(np.asarray(two_regions().draw(tmp_path / "a")), expected)
    upright = read_pixels(tmp_path / "a", "apply")
    regions = Regions.empty(1, "", *upright.shape[:2])
    np.testing.assert_array_equal(np.asarray(regions.draw(tmp_path / "a", exif="apply")), upright)


def test_labels_show_the_category_name_or_id_and_the_score(labels: list[str]) -> None:
    two_regions().draw(BLACK)
    two_regions().draw(BLACK, names={3: "hound"}, min_score=0.5)
    replace(two_regions(), names=None).draw(BLACK, min_score=0.5)
    replace(two_regions(), category_ids=np.full(2, NO_CATEGORY)).draw(BLACK, min_score=0.5)
    assert labels == ["dog 0.90", "cat 0.40", "hound 0.90", "3 0.90", "0.90"]


def test_regions_of_any_score_are_drawn_unless_a_lowest_score_is_given(labels: list[str]) -> None:
    logits = replace(two_regions(), scores=np.float32([-2.5, 3]))
    logits.draw(BLACK)
    assert labels == ["cat 3.00", "dog -2.50"]
    logits.draw(BLACK, min_score=0.0)
    assert labels[2:] == ["cat 3.00"]


def test_nan_is_no_lowest_score() -> None:  # which would silently leave out every region
    with pytest.raises(ValueError, match="^min_score: must be a number, not nan$"):
        two_regions().draw(BLACK, min_score=float("nan"))


def test_max_regions_limits_the_regions_that_are_drawn(labels: list[str]) -> None:
    for count, expected in ((0, []), (1, ["dog 0.90"]), (9, ["dog 0.90", "cat 0.40"])):
        two_regions().draw(BLACK, max_regions=count)
        assert labels == expected
        labels.clear()
    with pytest.raises(ValueError, match="^max_regions: must be 0 or more, not -1$"):  # not a slice
        two_regions().draw(BLACK, max_regions=-1)


def test_labels_leave_a_small_picture_visible(caplog: pytest.LogCaptureFixture) -> None:
    n = 40
    boxes = np.tile(np.float32([10, 10, 30, 30]), (n, 1))
    regions = Regions(1, "", 60, 120, boxes, np.linspace(1, 0.1, n, dtype=np.float32), np.full(n, 3), names={3: "dog"})
    drawn = np.asarray(regions.draw(np.full((60, 120, 3), 7, np.uint8)))
    assert (drawn == 7).all(axis=2).mean() > 0.5
    assert f"of {n} regions have no label, as labels would cover the picture" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (3, 2)])
def test_images_of_any_size_are_drawn_on(size: tuple[int, int]) -> None:
    height, width = size
    box = np.float32([[0, 0, width, height]])
    regions = Regions(1, "", height, width, box, np.ones(1, np.float32), np.array([1]))
    assert regions.draw(np.zeros((height, width, 3), np.uint8)).size == (width, height)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pil_images_of_any_mode_become_rgb(mode: str) -> None:
    image = Image.new(mode, (80, 60)) if mode == "I;16" else Image.fromarray(BLACK).convert(mode)
    assert two_regions().draw(image).mode == "RGB"


def test_an_image_that_cannot_be_drawn_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^image: is 80x61, but the regions are of an image of 80x60; give that"):
        two_regions().draw(np.zeros((61, 80, 3), np.uint8))
    with pytest.raises(ValueError, match=r"^image: uint8 \(H, W, 3\) RGB is needed, not float32 \(3, 64, 64\)$"):
        two_regions().draw(np.zeros((3, 64, 64), np.float32))
    with pytest.raises(ValueError, match="^image: a NumPy array, a PIL image or a path is needed, not list$"):
        two_regions().draw([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^exif: must be ignore or apply, not 'upright'$"):
        two_regions().draw(BLACK, exif="upright")
    with pytest.raises(ValueError, match="^image: cannot be read as RGB: .*mode F"):
        two_regions().draw(Image.new("F", (80, 60)))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="a.png: not a readable image .*; give another file"):
        two_regions().draw(tmp_path / "a.png")
