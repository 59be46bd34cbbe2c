"""`load_detector` and `Detector`: kinds of images, given boxes, errors, and the same regions as an extraction."""

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


def save_run(folder: Path, *changes: str, provenance: Provenance = KNOWN) -> Path:
    model: MaskRCNN = trained_model(*changes)
    meta = checkpoint.CheckpointMetadata(model.recipe, tuple((i, NAMES[i]) for i in IDS), provenance, 5)
    folder.mkdir(parents=True)
    checkpoint.save(folder, model, meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def detector(run: Path) -> refdet.Detector:
    return refdet.load_detector(run, device="cpu")


def assert_same_regions(a: refdet.Regions, b: refdet.Regions) -> None:
    """All fields are equal bit for bit."""
    for name in ("boxes", "scores", "category_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.masks == b.masks and set(a.features) == set(b.features)
    for name in a.features:
        np.testing.assert_array_equal(a.features[name], b.features[name])


def extract_one(
    run: Path, folder: Path, pixels: np.ndarray, options: refdet.ExtractOptions, **more: Any
) -> refdet.Regions:
    """Run an extraction of one image, and read its regions from the store."""
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
def test_detect_returns_what_an_extraction_writes(tmp_path: Path, changes: tuple[str, ...]) -> None:
    run = save_run(tmp_path / "run", *changes)
    found = refdet.load_detector(run, device="cpu").detect(IMAGES[0], score_threshold=0.1, max_regions=30)
    options = refdet.ExtractOptions(score_threshold=0.1, max_regions=30)
    assert len(found) > 5 and found.masks is not None
    assert_same_regions(found, extract_one(run, tmp_path / "a", IMAGES[0], options))


def test_describe_returns_what_an_extraction_of_given_boxes_writes(
    tmp_path: Path, run: Path, detector: refdet.Detector
) -> None:
    results = [{"image_id": 5, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1]}
               for c, (x1, y1, x2, y2) in zip((3, 44), BOXES, strict=True)]  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(results))
    options = refdet.ExtractOptions(masks="predicted")
    expected = extract_one(run, tmp_path / "a", IMAGES[0], options, boxes=tmp_path / "boxes.json")
    found = detector.describe(IMAGES[0], BOXES, category_ids=[3, 44])
    assert expected.masks is not None
    assert_same_regions(found, expected)


def test_an_image_may_be_an_array_a_pil_image_or_a_path(tmp_path: Path, detector: refdet.Detector) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    expected = detector.detect(IMAGES[0], max_regions=5)
    assert (expected.image_id, expected.file_name, expected.height, expected.width) == (0, "", 96, 128)
    for image in (Image.fromarray(IMAGES[0]), tmp_path / "a.png", str(tmp_path / "a.png"), IMAGES[0][:, ::-1][:, ::-1]):
        assert_same_regions(detector.detect(image, max_regions=5), expected)
    assert detector.detect(tmp_path / "a.png", max_regions=5).file_name == "a.png"


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_give_no_warning(detector: refdet.Detector) -> None:
    pixels = np.asarray(Image.fromarray(IMAGES[0]))
    assert not pixels.flags.writeable
    assert_same_regions(detector.detect(pixels, max_regions=5), detector.detect(IMAGES[0], max_regions=5))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_pil_images_and_files_of_other_modes_give_the_same_regions(
    tmp_path: Path, detector: refdet.Detector, mode: str
) -> None:
    gray = (IMAGES[0][..., 0].astype(np.uint16) << 8) + 77
    image = Image.fromarray(gray) if mode == "I;16" else Image.fromarray(IMAGES[0]).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert_same_regions(detector.detect(image, max_regions=5), detector.detect(path, max_regions=5))


def test_results_of_a_list_are_in_the_order_of_its_images(
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


def test_empty_lists_of_images_or_boxes_give_empty_results(detector: refdet.Detector) -> None:
    assert detector.detect([]) == [] and detector.describe([], []) == []
    for boxes in ([], np.zeros((0, 4)), np.zeros((0, 4), np.int64)):
        for ids in (None, []):
            regions = detector.describe(IMAGES[0], boxes, category_ids=ids)
            assert len(regions) == 0 and regions.features["fc7"].shape[0] == 0


def test_each_option_changes_the_regions(detector: refdet.Detector) -> None:
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


def test_regions_have_the_names_of_their_categories(detector: refdet.Detector) -> None:
    for regions in (detector.detect(IMAGES[0]), detector.describe(IMAGES[0], BOXES, category_ids=[1, 3])):
        assert regions.names == detector.classes == NAMES
        assert regions.draw(IMAGES[0]).size == (128, 96)
    assert detector.describe(IMAGES[0], BOXES).category_ids.tolist() == [-1, -1]


def test_boxes_are_clipped_to_the_image(detector: refdet.Detector) -> None:
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
def test_an_error_names_an_invalid_image(detector: refdet.Detector, kind: str) -> None:
    image, message = BAD_IMAGES[kind]
    with pytest.raises(ValueError, match=f"^{message}"):
        detector.detect(image)
    with pytest.raises(ValueError, match=f"^{message}".replace("image", r"image\[1\]", 1)):
        detector.detect([IMAGES[0], image])


def test_an_error_names_an_unreadable_file(tmp_path: Path, detector: refdet.Detector) -> None:
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
def test_an_error_names_invalid_boxes(detector: refdet.Detector, kind: str) -> None:
    boxes, message = BAD_BOXES[kind]
    with pytest.raises(ValueError, match=f"^boxes: {message}"):
        detector.describe(IMAGES[0], boxes)
    with pytest.raises(ValueError, match=rf"^boxes\[1\]: {message}"):
        detector.describe([IMAGES[0], IMAGES[2]], [BOXES, boxes])


def test_an_error_names_invalid_category_ids(detector: refdet.Detector) -> None:
    for ids, message in (
        ([1, 2], "row 1, 2, is not a category of the detector; see its classes"),
        ([1], r"\(2,\) integers are needed, one per box, not int64 \(1,\)"),
        ([1.0, 3.0], r"\(2,\) integers are needed, one per box, not float64"),
    ):
        with pytest.raises(ValueError, match=f"^category_ids: {message}"):
            detector.describe(IMAGES[0], BOXES, category_ids=ids)
    with pytest.raises(ValueError, match="^boxes: a list of 2 is needed, one for each image"):
        detector.describe(IMAGES[:2], [BOXES])


def test_an_error_names_an_invalid_option(run: Path, detector: refdet.Detector) -> None:
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


def test_repr_and_attributes_of_a_detector(run: Path, detector: refdet.Detector) -> None:
    assert detector.recipe.name == "demo" and detector.provenance == KNOWN
    assert detector.device == torch.device("cpu") and detector.precision == "float32" and detector.path == run
    assert repr(detector) == (
        f"Detector({str(run)!r}: recipe demo, 4 classes, cpu, float32;\n"
        "  trained on 12 images of split.json, 1 split held out)"
    )


def test_unknown_training_data_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = refdet.load_detector(
        save_run(tmp_path / "run", provenance=Provenance.imported("a.pth", "cd")), device="cpu"
    )
    assert "training data unknown" in caplog.text and "imported: a.pth" in repr(detector)
    assert len(repr(detector).splitlines()) == 2


def test_bfloat16_falls_back_to_float32_without_hardware_support(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("refdet.detector.detector.supported_precision", lambda precision, device: "float32")
    assert refdet.load_detector(run, device="cpu", precision="bfloat16").precision == "float32"
    assert "no bfloat16 arithmetic; computing in float32" in caplog.text
    monkeypatch.setattr("refdet.detector.detector.supported_precision", lambda precision, device: precision)
    rough = refdet.load_detector(run, device="cpu", precision="bfloat16")
    assert rough.precision == "bfloat16" and rough.describe(IMAGES[0], BOXES).features["fc7"].dtype == np.float32


def test_out_of_memory_while_loading_is_a_runtime_failure(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_out_of_memory(*given: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("refdet.detector.optimize.optimize_for_inference", raise_out_of_memory)
    with pytest.raises(RuntimeFailure, match="cpu has too little memory for the detector; free some"):
        refdet.load_detector(run, device="cpu")


def test_out_of_memory_while_detecting_is_a_runtime_failure(
    detector: refdet.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_out_of_memory(*given: Any, **named: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("refdet.detector.detector.detect_batch", raise_out_of_memory)
    with pytest.raises(RuntimeFailure, match="cpu has too little memory for 1 image; free some"):
        detector.detect(IMAGES[0])
