"""`load_detector` and `Detector`: images of all kinds, given boxes, errors, and the same regions as an extraction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trained_models import IDS, trained_model

import refdet
from refdet import store
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError, RuntimeFailure
from refdet.structures.provenance import Provenance

RANDOM = np.random.default_rng(0)
SIZES = [(96, 128), (60, 50), (96, 128), (97, 128), (50, 60)]  # height and width
IMAGES = [RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
NAMES = {1: "person", 3: "car", 7: "train", 44: "bottle"}
BOXES = [[10, 20, 60, 70], [0.5, 1, 90, 80]]
KNOWN = Provenance("split.json", "", 12, 40, "ab" * 32, excluded={"refcoco/unc/val": {"images": 1, "found": 1}})


def saved(folder: Path, *changes: str, provenance: Provenance = KNOWN) -> Path:
    model: MaskRCNN = trained_model(*changes)
    meta = checkpoint.CheckpointMetadata(model.recipe, tuple((i, NAMES[i]) for i in IDS), provenance, 5)
    folder.mkdir(parents=True)
    checkpoint.save(folder, model, meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def detector(run: Path) -> refdet.Detector:
    return refdet.load_detector(run, device="cpu")


def same(a: refdet.Regions, b: refdet.Regions) -> None:
    """Bit for bit."""
    for name in ("boxes", "scores", "category_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.masks == b.masks and set(a.features) == set(b.features)
    for name in a.features:
        np.testing.assert_array_equal(a.features[name], b.features[name])


def written(run: Path, folder: Path, pixels: np.ndarray, options: refdet.ExtractOptions, **more: Any) -> refdet.Regions:
    """The regions that an extraction writes of one image."""
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "5.png")
    height, width = pixels.shape[:2]
    tree = {"images": [{"id": 5, "file_name": "5.png", "height": height, "width": width}], "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in NAMES.items()]}  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(tree))
    images = refdet.ImageList.of_instances(folder / "instances.json")
    refdet.extract_features(run, folder, folder / "a.h5", images, options=options, device="cpu", **more)
    with store.open(folder / "a.h5") as found:
        return found[5]


@pytest.mark.parametrize("changes", [(), ("model.neck=fpn", "model.anchor_sizes=[8,16,32,64,128]")])
def test_detections_are_those_that_an_extraction_writes(tmp_path: Path, changes: tuple[str, ...]) -> None:
    run = saved(tmp_path / "run", *changes)
    found = refdet.load_detector(run, device="cpu").detect(IMAGES[0], score_threshold=0.1, max_regions=30)
    options = refdet.ExtractOptions(score_threshold=0.1, max_regions=30)
    assert len(found) > 5 and found.masks is not None
    same(found, written(run, tmp_path / "a", IMAGES[0], options))


def test_described_boxes_are_those_that_an_extraction_writes(
    tmp_path: Path, run: Path, detector: refdet.Detector
) -> None:
    results = [{"image_id": 5, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1]}
               for c, (x1, y1, x2, y2) in zip((3, 44), BOXES, strict=True)]  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(results))
    options = refdet.ExtractOptions(masks="predicted")
    wanted = written(run, tmp_path / "a", IMAGES[0], options, boxes=tmp_path / "boxes.json")
    found = detector.describe(IMAGES[0], BOXES, category_ids=[3, 44])
    assert wanted.masks is not None
    same(found, wanted)


def test_an_image_may_be_an_array_a_pil_image_or_a_path(tmp_path: Path, detector: refdet.Detector) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    wanted = detector.detect(IMAGES[0], max_regions=5)
    assert (wanted.image_id, wanted.file_name, wanted.height, wanted.width) == (0, "", 96, 128)
    for image in (Image.fromarray(IMAGES[0]), tmp_path / "a.png", str(tmp_path / "a.png"), IMAGES[0][:, ::-1][:, ::-1]):
        same(detector.detect(image, max_regions=5), wanted)
    assert detector.detect(tmp_path / "a.png", max_regions=5).file_name == "a.png"


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_read_only_are_taken_without_a_warning(detector: refdet.Detector) -> None:
    pixels = np.asarray(Image.fromarray(IMAGES[0]))
    assert not pixels.flags.writeable
    same(detector.detect(pixels, max_regions=5), detector.detect(IMAGES[0], max_regions=5))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_pil_images_and_files_of_a_mode_are_read_alike(tmp_path: Path, detector: refdet.Detector, mode: str) -> None:
    gray = (IMAGES[0][..., 0].astype(np.uint16) << 8) + 77
    image = Image.fromarray(gray) if mode == "I;16" else Image.fromarray(IMAGES[0]).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    same(detector.detect(image, max_regions=5), detector.detect(path, max_regions=5))


def test_a_list_of_images_of_several_sizes_comes_back_in_its_order(
    detector: refdet.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refdet.detector.detector.CHUNK", 3)
    found = detector.detect(IMAGES, max_regions=8)
    assert [(r.image_id, r.height, r.width) for r in found] == [(i, *size) for i, size in enumerate(SIZES)]
    for regions, image in zip(found, IMAGES, strict=True):
        alone = detector.detect(image, max_regions=8)
        np.testing.assert_allclose(regions.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(regions.features["fc7"], alone.features["fc7"], rtol=1e-3, atol=1e-4)
    boxes = [BOXES, [], BOXES[:1], [[0, 0, 5, 5]], np.zeros((0, 4))]
    described = detector.describe(IMAGES, boxes, category_ids=[[1, 3], [], [7], [44], []])
    assert [len(r) for r in described] == [2, 0, 1, 1, 0]
    assert described[2].category_ids.tolist() == [7] and len(described[2].masks or ()) == 1


def test_nothing_given_gives_nothing(detector: refdet.Detector) -> None:
    assert detector.detect([]) == [] and detector.describe([], []) == []
    for boxes in ([], np.zeros((0, 4)), np.zeros((0, 4), np.int64)):
        for ids in (None, []):
            regions = detector.describe(IMAGES[0], boxes, category_ids=ids)
            assert len(regions) == 0 and regions.features["fc7"].shape[0] == 0


def test_options_reach_the_network(detector: refdet.Detector) -> None:
    assert len(detector.detect(IMAGES[0], max_regions=3)) == 3
    every = np.sort(detector.detect(IMAGES[0]).scores)[::-1]
    some = detector.detect(IMAGES[0], score_threshold=float(every[len(every) // 2]), max_regions=1000).scores
    assert len(some) > 10 and some.min() == every[len(every) // 2] > every.min()
    assert len(detector.detect(IMAGES[0], score_threshold=0.999999)) == 0
    assert len(detector.detect(IMAGES[0], score_threshold=0.999999, lower_threshold_if_empty=True)) > 0
    assert set(detector.detect(IMAGES[0], features=["class_prob"]).features) == {"class_prob"}
    assert not detector.detect(IMAGES[0], features=[]).features
    assert detector.detect(IMAGES[0], features=["head"]).maps["head"].ndim == 3
    few, many = (len(detector.detect(IMAGES[0], nms_threshold=value, max_regions=1000)) for value in (0.1, 0.9))
    assert few < many


def test_regions_know_the_names(detector: refdet.Detector) -> None:
    for regions in (detector.detect(IMAGES[0]), detector.describe(IMAGES[0], BOXES, category_ids=[1, 3])):
        assert regions.names == detector.classes == NAMES
        assert regions.draw(IMAGES[0]).size == (128, 96)
    assert detector.describe(IMAGES[0], BOXES).category_ids.tolist() == [-1, -1]


def test_boxes_are_cut_to_the_image(detector: refdet.Detector) -> None:
    found = detector.describe(IMAGES[0], [[-5, -5, 500, 50]])
    assert found.boxes.tolist() == [[0, 0, 128, 50]]


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "floats": (np.zeros((3, 64, 64), np.float32), r"image: uint8 \(H, W, 3\) RGB is needed, not float32 \(3, 64, 64\)"),
    "gray": (np.zeros((64, 64), np.uint8), r"image: uint8 \(H, W, 3\) RGB is needed, not uint8 \(64, 64\)"),
    "alpha": (np.zeros((64, 64, 4), np.uint8), r"image: uint8 .* not uint8 \(64, 64, 4\)"),
    "int64": (np.zeros((64, 64, 3), np.int64), "image: uint8 .* not int64"),
    "a batch": (np.zeros((2, 64, 64, 3), np.uint8), r"image: uint8 .* not uint8 \(2, 64, 64, 3\)"),
    "empty": (np.zeros((0, 64, 3), np.uint8), "image: its size is 64x0, it must be at least 1x1"),
    "a tensor": (torch.zeros(3, 64, 64), "image: a NumPy array, a PIL image or a path is needed, not Tensor"),
    "none": (None, "image: a NumPy array, a PIL image or a path is needed, not NoneType"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_told(detector: refdet.Detector, kind: str) -> None:
    image, said = BAD_IMAGES[kind]
    with pytest.raises(ValueError, match=f"^{said}"):
        detector.detect(image)
    with pytest.raises(ValueError, match=f"^{said}".replace("image", r"image\[1\]", 1)):
        detector.detect([IMAGES[0], image])


def test_a_bad_file_is_told(tmp_path: Path, detector: refdet.Detector) -> None:
    with pytest.raises(InputError, match="nowhere.png: no such file"):
        detector.detect(tmp_path / "nowhere.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="a.png: not a readable image .no known image format.; give another file"):
        detector.detect(tmp_path / "a.png")
    with pytest.raises(InputError, match="not a regular file"):
        detector.detect(tmp_path)


BAD_BOXES: dict[str, tuple[Any, str]] = {
    "reversed": ([BOXES[0], [60, 10, 20, 50]], r"row 1, \[60.0, 10.0, 20.0, 50.0\], is reversed; give x1 y1 x2 y2"),
    "NaN": ([[0, 0, float("nan"), 5]], "row 0, .*, is not finite"),
    "infinite": ([[0, 0, float("inf"), 5]], "row 0, .*, is not finite"),
    "no area": ([BOXES[0], BOXES[0], [3, 3, 3, 9]], "row 2, .*, has no area"),
    "outside": ([[200, 10, 210, 20]], "row 0, .*, has no area in the image, which is 128x96"),
    "one box": ([1, 2, 3, 4], r"\(n, 4\) numbers are needed, x1 y1 x2 y2 of each box, not \(4,\)"),
    "five numbers": ([[1, 2, 3, 4, 5]], r"\(n, 4\) numbers are needed, .* not \(1, 5\)"),
    "ragged": ([[1, 2, 3], [1, 2, 3, 4]], r"\(n, 4\) numbers are needed"),
    "too large": ([[0, 0, 10**400, 5]], r"\(n, 4\) numbers are needed, .*too large"),
    "text": ("boxes", r"\(n, 4\) numbers are needed"),
}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_bad_boxes_are_told(detector: refdet.Detector, kind: str) -> None:
    boxes, said = BAD_BOXES[kind]
    with pytest.raises(ValueError, match=f"^boxes: {said}"):
        detector.describe(IMAGES[0], boxes)
    with pytest.raises(ValueError, match=rf"^boxes\[1\]: {said}"):
        detector.describe([IMAGES[0], IMAGES[2]], [BOXES, boxes])


def test_bad_categories_are_told(detector: refdet.Detector) -> None:
    for ids, said in (
        ([1, 2], "row 1, 2, is not a category of the detector; see its classes"),
        ([1], r"\(2,\) integers are needed, one per box, not int64 \(1,\)"),
        ([1.0, 3.0], r"\(2,\) integers are needed, one per box, not float64"),
    ):
        with pytest.raises(ValueError, match=f"^category_ids: {said}"):
            detector.describe(IMAGES[0], BOXES, category_ids=ids)
    with pytest.raises(ValueError, match="^boxes: a list of 2 is needed, one for each image"):
        detector.describe(IMAGES[:2], [BOXES])


def test_bad_options_are_told(run: Path, detector: refdet.Detector) -> None:
    with pytest.raises(ValueError, match="^score_threshold: must be a number from 0 to 1, not 50"):
        detector.detect(IMAGES[0], score_threshold=50)
    with pytest.raises(ValueError, match="^features: unknown feature 'fc8'; choose from pool5, "):
        detector.detect(IMAGES[0], features=["fc8"])
    with pytest.raises(ValueError, match="^features: a list of names is needed, not <"):
        detector.detect(IMAGES[0], features=iter(["fc7"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^features: a list of names is needed, not 'fc7'"):
        detector.describe(IMAGES[0], BOXES, features="fc7")
    with pytest.raises(ValueError, match="^precision: must be one of float32, tf32, bfloat16, not 'half'"):
        refdet.load_detector(run, precision="half")
    with pytest.raises(InputError, match="no such file or folder; give a run directory"):
        refdet.load_detector(run / "nowhere")


def test_the_detector_says_what_it_is(run: Path, detector: refdet.Detector) -> None:
    assert detector.recipe.name == "demo" and detector.provenance == KNOWN
    assert detector.device == torch.device("cpu") and detector.precision == "float32" and detector.path == run
    assert repr(detector) == (
        f"Detector({str(run)!r}: recipe demo, 4 classes, cpu, float32;\n"
        "  trained on 12 images of split.json, 1 split held out)"
    )


def test_unknown_training_data_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = refdet.load_detector(
        saved(tmp_path / "run", provenance=Provenance.imported("a.pth", "cd")), device="cpu"
    )
    assert "training data unknown" in caplog.text and "imported: a.pth" in repr(detector)
    assert len(repr(detector).splitlines()) == 2


def test_bfloat16_is_computed_where_there_is_arithmetic_for_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("refdet.detector.detector.supported_precision", lambda precision, device: "float32")
    assert refdet.load_detector(run, device="cpu", precision="bfloat16").precision == "float32"
    assert "no bfloat16 arithmetic; computing in float32" in caplog.text
    monkeypatch.setattr("refdet.detector.detector.supported_precision", lambda precision, device: precision)
    rough = refdet.load_detector(run, device="cpu", precision="bfloat16")
    assert rough.precision == "bfloat16" and rough.describe(IMAGES[0], BOXES).features["fc7"].dtype == np.float32


def test_too_little_memory_for_the_weights_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("refdet.detector.optimize.optimize_for_inference", fails)
    with pytest.raises(RuntimeFailure, match="cpu has too little memory for the detector; free some"):
        refdet.load_detector(run, device="cpu")


def test_too_little_memory_is_told(detector: refdet.Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("refdet.detector.detector.detect_batch", fails)
    with pytest.raises(RuntimeFailure, match="cpu has too little memory for 1 image; free some"):
        detector.detect(IMAGES[0])
