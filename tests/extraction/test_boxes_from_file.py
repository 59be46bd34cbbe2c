"""--boxes: regions from COCO results and from another store, and invalid files that are refused."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco_mask
from trained_models import trained_model

from refdet import store
from refdet.cli.main import main
from refdet.data.coco import CocoIndex
from refdet.detector import checkpoint
from refdet.errors import InputError
from refdet.evaluation.targets import empty_mask
from refdet.extraction import boxes_from_file
from refdet.extraction.boxes_from_file import load_boxes, report_images_without_boxes, report_unused_boxes
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.store.verify import verify
from refdet.structures.provenance import Provenance
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

CATEGORIES = [{"id": 3, "name": "car"}, {"id": 44, "name": "bottle"}]
ENTRY = {"image_id": 7, "category_id": 3, "bbox": [10.0, 20, 30, 40], "score": 0.5}


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    images = [{"id": i, "file_name": f"{i}.png", "height": 96, "width": 128} for i in (5, 7, 9)]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": [], "categories": CATEGORIES}))
    return CocoIndex.load(tmp_path / "i.json")


def write_results(tmp_path: Path, *entries: Any) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    return path


def test_coco_results_become_regions(tmp_path: Path, index: CocoIndex) -> None:
    overlapping_border = {"image_id": 7, "category_id": 44, "bbox": [-5, 90, 300, 30.5]}  # of an image of 128x96
    found = load_boxes(write_results(tmp_path, ENTRY, {**ENTRY, "image_id": 9}, overlapping_border), index)
    regions = found.for_image(index.images[7])
    assert regions.boxes.tolist() == [[10, 20, 40, 60], [0, 90, 128, 96]]
    assert (regions.scores.tolist(), regions.category_ids.tolist()) == ([0.5, 1], [3, 44])
    assert regions.masks is None and regions.ann_ids is None and not found.has_masks
    assert (len(found.for_image(index.images[9])), len(found.for_image(index.images[5]))) == (1, 0)
    assert [found.count(i) for i in (5, 7, 9)] == [0, 2, 1]
    assert found.categories == {3: "car", 44: "bottle"}


HIGHEST = ", the highest rank in an evaluation"  # only if there are other scores, none of which is higher


@pytest.mark.parametrize(
    ("without", "score", "note"),
    [
        (0, 0.5, ""),
        (1, 0.5, f"1 of 3 boxes has no score and so gets 1{HIGHEST}"),
        (2, 1.0, f"2 of 3 boxes have no score and so get 1{HIGHEST}"),
        (1, 1.5, "1 of 3 boxes has no score and so gets 1"),
        (3, 0.5, ""),  # all get 1, as annotations do
    ],
)
def test_boxes_without_a_score_are_counted(
    tmp_path: Path, index: CocoIndex, caplog: pytest.LogCaptureFixture, without: int, score: float, note: str
) -> None:
    no_score = {name: value for name, value in ENTRY.items() if name != "score"}
    path = write_results(tmp_path, *[no_score] * without, *[{**ENTRY, "score": score}] * (3 - without))
    scores = load_boxes(path, index).for_image(index.images[7]).scores
    assert scores.tolist() == [1.0] * without + [score] * (3 - without)
    notes = [text for text in caplog.messages if "score" in text]
    assert notes == ([f"note: `boxes` {path}: {note}"] if note else [])


def test_segmentations_are_kept_as_masks(tmp_path: Path, index: CocoIndex) -> None:
    pixels = np.zeros((96, 128), np.uint8, order="F")
    pixels[20:60, 10:40] = 1
    rle = coco_mask.encode(pixels)
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    found = load_boxes(write_results(tmp_path, {**ENTRY, "segmentation": segmentation}), index)
    assert found.has_masks and found.for_image(index.images[7]).masks == (rle["counts"],)
    assert found.for_image(index.images[5]).masks == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1, 2], "an object with image_id"),
        ({**ENTRY, "image_id": 8}, "image 8 is not in"),
        ({**ENTRY, "image_id": "7"}, "image_id must be an integer"),
        ({**ENTRY, "category_id": 4}, "category 4 is not in"),
        ({**ENTRY, "bbox": [1, 2, 3]}, "four finite numbers"),
        ({**ENTRY, "bbox": [1, 2, 3, float("nan")]}, "four finite numbers"),
        ({**ENTRY, "bbox": [1, 2, 10**400, 4]}, "four finite numbers"),
        ({**ENTRY, "bbox": [1, 2, 0, 4]}, "no area"),
        ({**ENTRY, "bbox": [1, 2, 3, -4]}, "no area"),
        ({**ENTRY, "bbox": [90, 2, 1e-6, 4]}, r"box \[90, 2, 90, 6\] .* has no area"),  # in float32
        ({**ENTRY, "bbox": [128, 2, 3, 4]}, "outside its image of 128x96"),
        ({**ENTRY, "bbox": [128 - 1e-6, 2, 3, 4]}, "outside its image of 128x96"),
        ({**ENTRY, "score": None}, "score must be a finite number"),
        ({**ENTRY, "segmentation": {"size": [96, 128], "counts": "0"}}, "segmentation missing in some entries"),
    ],
)
def test_an_invalid_entry_is_refused_with_its_number(
    tmp_path: Path, index: CocoIndex, entry: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"boxes.json: entry 1: .*{message}"):
        load_boxes(write_results(tmp_path, ENTRY, entry), index)


def test_a_file_without_a_list_of_entries_is_refused(tmp_path: Path, index: CocoIndex) -> None:
    (tmp_path / "boxes.json").write_text('{"annotations": []}')
    with pytest.raises(InputError, match="not a list of entries"):
        load_boxes(tmp_path / "boxes.json", index)
    with pytest.raises(InputError, match=r"gone\.h5"):
        load_boxes(tmp_path / "gone.h5", index)


def write_boxes_store(
    path: Path, boxes: dict[int, list[list[float]]], size: tuple[int, int] = (96, 128), **options: Any
) -> Path:
    """Write a store with the boxes of each image id, in images of a (height, width), with empty masks."""
    empty = empty_mask(*size)["counts"]
    images = [
        Regions(
            image_id, "a.png", *size, np.array(xyxy, np.float32).reshape(-1, 4), scores=np.ones(len(xyxy), np.float32),
            category_ids=np.full(len(xyxy), 3), masks=(empty,) * len(xyxy),
        )
        for image_id, xyxy in boxes.items()
    ]  # fmt: skip
    rows = [store.ImageRow(r.image_id, "a.png", *size, "", len(r), len(empty) * len(r)) for r in images]
    header = store.Header(CATEGORIES, "{}", {}, options)
    with store.create(path, header, store.Columns(masks=True), rows) as writer:
        for image in images:
            writer.put(image)
    return path


def test_regions_of_a_store_are_read_lazily(tmp_path: Path, index: CocoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_boxes_store(tmp_path / "b.h5", {5: [], 7: [[-5, 90, 300, 120.5], [1, 2, 3, 4]], 9: [[0, 0, 9, 9]] * 3})
    read_ids: list[int] = []
    read = store.Store.read

    def recording_read(self: store.Store, image_id: int, features: Any = None) -> Regions:
        read_ids.append(image_id)
        return read(self, image_id, features)

    monkeypatch.setattr(store.Store, "read", recording_read)
    found = load_boxes(path, index)
    assert [found.count(i) for i in (5, 7, 9, 8)] == [0, 2, 3, 0]
    assert read_ids == [] and found.has_masks and not found.has_ann_ids
    regions = found.for_image(index.images[7])
    assert read_ids == [7]
    assert regions.boxes.tolist() == [[0, 90, 128, 96], [1, 2, 3, 4]] and regions.boxes.dtype == np.float32
    assert (regions.file_name, regions.masks) == ("7.png", (empty_mask(96, 128)["counts"],) * 2)
    assert [len(found.for_image(index.images[i])) for i in (5, 9)] == [0, 3]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({5: [[1, 2, 3, 4]], 8: [[1, 2, 3, 4]]}, "image 8 is not in"),
        ({5: [[1, 2, 3, 4]], 7: [[1, 2, 3, 4], [5, 5, 5, 9]]}, r"image 7: box .* has no area"),
        ({5: [[1, 2, 3, 4]] * 3, 7: [], 9: [[130, 2, 140, 4]]}, "image 9: box .* is outside its image"),
        ({5: [[1, 2, float("nan"), 4]]}, "image 5: box .* has no area"),
    ],
)
def test_a_store_with_invalid_boxes_is_refused_on_loading(
    tmp_path: Path, index: CocoIndex, boxes: dict[int, list[list[float]]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes_from_file, "_ROWS_AT_ONCE", 2)
    path = write_boxes_store(tmp_path / "b.h5", boxes)
    with pytest.raises(InputError, match=f"`boxes` .*b.h5: {message}"):
        load_boxes(path, index)


def test_a_store_with_another_image_size_is_refused(tmp_path: Path, index: CocoIndex) -> None:
    with pytest.raises(InputError, match="image 5 is 128x90 there, but 128x96 in"):
        load_boxes(write_boxes_store(tmp_path / "d.h5", {5: []}, (90, 128)), index)


def test_a_store_with_an_unknown_category_is_refused(tmp_path: Path, index: CocoIndex) -> None:
    path = write_boxes_store(tmp_path / "b.h5", {5: [[1, 2, 3, 4]] * 2, 7: [[1, 2, 3, 4]] * 2})
    with h5py.File(path, "r+") as file:
        file["regions/category_id"][3] = 99
    with pytest.raises(InputError, match="`boxes` .*b.h5: image 7: category 99 is not in the classes of the store"):
        load_boxes(path, index)


def test_boxes_of_images_in_another_orientation_are_refused(tmp_path: Path, index: CocoIndex) -> None:
    upright = write_boxes_store(tmp_path / "a.h5", {7: [[1, 2, 3, 4]]}, exif="apply")
    stored = write_boxes_store(tmp_path / "b.h5", {7: [[1, 2, 3, 4]]})
    with pytest.raises(InputError, match="`boxes` .*a.h5: .* images turned upright .*; add `exif='apply'`"):
        load_boxes(upright, index)
    with pytest.raises(InputError, match="`boxes` .*b.h5: .* images as stored.*; omit `exif='apply'`"):
        load_boxes(stored, index, exif="apply")
    assert load_boxes(upright, index, exif="apply").count(7) == load_boxes(stored, index).count(7) == 1


@pytest.mark.parametrize(
    ("ids", "messages"),
    [
        ((5, 7, 9), []),
        ((7,), ["note: `boxes` {}: 2 of 3 images have no boxes and so get no regions"]),
        ((), ["note: `boxes` {}: no boxes of the 3 images, so the store has no regions"]),
    ],
)
@pytest.mark.parametrize("kind", ["write_results", "store"])
def test_images_without_boxes_are_counted(
    tmp_path: Path, index: CocoIndex, ids: tuple[int, ...], messages: list[str], kind: str
) -> None:
    lines = list[str]()
    if kind == "store":
        boxes = write_boxes_store(tmp_path / "b.h5", {i: [[1, 2, 3, 4]] for i in ids})
    else:
        boxes = write_results(tmp_path, *({**ENTRY, "image_id": i} for i in ids))
    report_images_without_boxes(boxes, load_boxes(boxes, index).count, list(index.images.values()), lines.append)
    assert lines == [message.format(boxes) for message in messages]


@pytest.mark.parametrize(
    ("listed", "note"),
    [
        ((5, 7, 9), ""),
        ((7, 9), "1 of 3 boxes is of images outside of some, and is not used"),
        ((9,), "3 of 3 boxes are of images outside of some, and are not used"),
    ],
)
@pytest.mark.parametrize("kind", ["write_results", "store"])
def test_boxes_of_other_images_are_counted(
    tmp_path: Path, index: CocoIndex, listed: tuple[int, ...], note: str, kind: str
) -> None:
    lines = list[str]()
    if kind == "store":
        boxes = write_boxes_store(tmp_path / "b.h5", {5: [[1, 2, 3, 4]], 7: [[1, 2, 3, 4], [2, 2, 5, 5]]})
    else:
        boxes = write_results(tmp_path, ENTRY, ENTRY, {**ENTRY, "image_id": 5})
    images = ImageList([index.images[i] for i in listed], index, "some")
    report_unused_boxes(boxes, load_boxes(boxes, index).count, images, lines.append)
    assert lines == ([f"note: `boxes` {boxes}: {note}"] if note else [])


@pytest.fixture
def detector(tmp_path: Path, index: CocoIndex) -> Path:
    """A detector of random weights, and images of noise beside it."""
    random = np.random.default_rng(0)
    for image_id in index.images:
        Image.fromarray(random.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(tmp_path / f"{image_id}.png")
    model = trained_model()
    classes = ((3, "car"), (7, "train"), (44, "bottle"), (90, "toothbrush"))
    (tmp_path / "run").mkdir()
    checkpoint.save(
        tmp_path / "run",
        model,
        checkpoint.CheckpointMetadata(model.recipe, classes, Provenance.imported("x", "0" * 64), 0),
    )
    return tmp_path / "run"


def test_boxes_in_other_formats_are_converted(tmp_path: Path, detector: Path) -> None:
    def extract(out: str, boxes: Path, *more: str) -> Result:
        arguments = ["extract-features", "--checkpoint", detector, "--images", tmp_path, "--out", tmp_path / out,
                     "--instances", tmp_path / "i.json", "--device", "cpu", "--features", "pool5"]  # fmt: skip
        return CliRunner().invoke(main, [str(a) for a in (*arguments, "--boxes", boxes, *more)])

    xywh = extract("a.h5", write_results(tmp_path, ENTRY))
    xyxy = extract("b.h5", write_results(tmp_path, {**ENTRY, "bbox": [10, 20, 40, 60]}), "--box-format", "xyxy")
    assert xywh.exit_code == xyxy.exit_code == 0
    assert "images: 3 of i.json; file size: about " in xywh.stderr
    with store.open(tmp_path / "a.h5") as a, store.open(tmp_path / "b.h5") as b:
        assert "box_format" not in a.options and b.options["box_format"] == "xyxy"
        np.testing.assert_array_equal(a[7].boxes, b[7].boxes)
        np.testing.assert_array_equal(a[7].features["pool5"], b[7].features["pool5"])
    normalized = {**ENTRY, "bbox": [0.25, 0.25, 0.25, 0.5]}
    assert extract("c.h5", write_results(tmp_path, normalized), "--box-format", "normalized").exit_code == 0
    with store.open(tmp_path / "c.h5") as c:
        assert c.options["box_format"] == "normalized-xywh" and c[7].boxes.tolist() == [[32, 24, 64, 72]]
    of_a_store = extract("d.h5", tmp_path / "c.h5", "--box-format", "xyxy")
    without_boxes = CliRunner().invoke(
        main,
        ["extract-features", "--checkpoint", str(detector), "--images", str(tmp_path), "--out", str(tmp_path / "d.h5"),
         "--instances", str(tmp_path / "i.json"), "--box-format", "xyxy"],
    )  # fmt: skip
    for refused, message in (
        (of_a_store, "omit --box-format xyxy"),
        (without_boxes, "--box-format xyxy is for --boxes; give --boxes or omit --box-format"),
    ):
        assert refused.exit_code == 2 and message in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "d.h5").exists()


def test_boxes_of_a_results_file_and_of_its_store_give_the_same_regions(tmp_path: Path, detector: Path) -> None:
    images = ImageList.of_instances(tmp_path / "i.json")

    def extract(out: str, boxes: Path, masks: str = "annotated", resume: bool = False) -> Path:
        options = ExtractOptions(features=("pool5", "fc7", "class_prob"), masks=masks)
        extract_features(detector, tmp_path, tmp_path / out, images, options=options, device="cpu", boxes=boxes,
                         resume=resume)  # fmt: skip
        return tmp_path / out

    file = write_results(tmp_path, ENTRY, {**ENTRY, "image_id": 9, "category_id": 44})
    first = extract("a.h5", file, masks="predicted")
    again = extract("b.h5", first)
    with store.open(first) as a, store.open(again) as b:
        assert a.options["regions"] == "boxes" and a.options["boxes_sha256"] != b.options["boxes_sha256"]
        assert [len(a[i]) for i in a] == [0, 1, 1] and a.errors == {}
        for image_id in a:
            one, two = a[image_id], b[image_id]
            assert one.masks is not None and one.masks == two.masks
            np.testing.assert_array_equal(one.boxes, two.boxes)
            for name, values in one.features.items():
                np.testing.assert_allclose(values, two.features[name], rtol=1e-5, atol=1e-6)
        assert a[7].features["class_prob"].sum() == pytest.approx(1, abs=1e-5)
    logits = extract(
        "c.h5", write_results(tmp_path, {**ENTRY, "score": 12.5}, {**ENTRY, "score": -3}), masks="predicted"
    )
    with store.open(logits) as c:
        assert c[7].scores.tolist() == [12.5, -3]  # scores need not be probabilities
    assert verify(logits).problems == [] and verify(first).problems == []
    with pytest.raises(InputError, match="another file of boxes"):
        extract("a.h5", write_results(tmp_path, ENTRY), masks="predicted", resume=True)
