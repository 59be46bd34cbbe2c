"""Parity with detectron2: recorded results of its C4 and FPN networks on real images, against those of refdet.

The weights are random, in the format of its model zoo. ``make parity`` runs all images, with each network as trained
and as optimized for inference, and prints the errors.
"""

import functools
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from parity import match_detections, relative_error
from PIL import Image
from pycocotools import mask as coco_mask
from recorded_results import results_of

from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size, network_inputs
from refdet.detector import checkpoint, loading
from refdet.detector.predictor import detect_batch
from refdet.detector.weights.import_weights import import_weights
from refdet.structures import boxes as box_ops
from refdet.structures.detection_options import DetectionOptions

pytestmark = [pytest.mark.golden, pytest.mark.slow]

IMAGES = ("000000194322", "000000466137")
CASES = [(name, image, optimized) for name in ("C4", "FPN") for image in IMAGES for optimized in (False, True)]
# without the kernels, conv5 takes half a minute for the 1000 proposals of an image
CASES.remove(("C4", IMAGES[1], False))
ALWAYS = [("C4", IMAGES[0], True), ("FPN", IMAGES[0], False), ("FPN", IMAGES[1], True)]
# detectron2's defaults at test time
OPTIONS = DetectionOptions(score_threshold=0.05, nms_threshold=0.5, max_regions=100)
Arrays = dict[str, np.ndarray]
Networks = Callable[[str, bool], loading.TrainedDetector]


@pytest.fixture(scope="module")
def networks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    """The detectors of checkpoints through import-weights, by name, as trained or optimized for inference."""
    folder = tmp_path_factory.mktemp("detectron2")
    imported = functools.cache(lambda name: import_checkpoint(shared, name, folder / name))
    yield functools.cache(lambda name, optimized: loading.load(imported(name), for_inference=optimized))
    for model in folder.glob(f"*/run/{checkpoint.MODEL}"):
        model.unlink()


def import_checkpoint(shared: Path, name: str, folder: Path) -> Path:
    """Write a checkpoint in detectron2's format, and import it to a run directory."""
    state = state_dict(shared, name)
    folder.mkdir()
    if name == "C4":  # the format of the model zoo
        with (folder / "model.pkl").open("wb") as file:
            pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, file)
    else:  # the format that its training saves
        tensors = {key: torch.from_numpy(value) for key, value in state.items()}
        torch.save({"model": tensors, "iteration": 269999}, folder / "model.pth")
    (source,) = folder.iterdir()
    done = import_weights(source, folder / "run")
    assert done.recipe == f"d2-{name.lower()}-res50" and done.classes == 80
    source.unlink()
    return folder / "run"


def state_dict(shared: Path, name: str) -> Arrays:
    """Weights from shared/detectron2/make_checkpoint.py, which itself imports shared/seed/make_checkpoint.py."""
    path = str(shared / "detectron2")
    sys.path.insert(0, path)
    saved = sys.modules.pop(
        "make_checkpoint", None
    )  # another test may have imported the reference's module of that name
    try:
        text = (shared / "detectron2" / "make_checkpoint.py").read_text()
        sys.path.insert(0, str(shared / "seed"))
        sys.modules.pop("make_checkpoint", None)
        importlib.import_module("make_checkpoint")
        space = {"__name__": "maker", "__file__": str(shared / "detectron2" / "make_checkpoint.py")}
        exec(compile(text, "make_checkpoint.py", "exec"), space)
        found: Arrays = space["make_state_dict"](name)  # type: ignore[operator]
        return found
    finally:
        sys.path[:] = [entry for entry in sys.path if entry not in (path, str(shared / "seed"))]
        sys.modules.pop("make_checkpoint", None)
        if saved is not None:
            sys.modules["make_checkpoint"] = saved


@pytest.mark.parametrize(
    ("name", "image", "optimized"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{'optimized' if case[2] else 'trained'}",
            marks=[] if case in ALWAYS else pytest.mark.thorough,
        )
        for case in CASES
    ],
)
@torch.inference_mode()
def test_detections_and_features_equal_those_of_detectron2(
    networks: Networks, shared: Path, name: str, image: str, optimized: bool
) -> None:
    detector = networks(name, optimized)
    model, options = detector.model, detector.meta.recipe.input
    with np.load(shared / "detectron2" / f"golden_{name}_{image}.npz") as file:
        golden = {key: file[key] for key in file.files}
    pixels = np.array(Image.open(shared / "seed" / "images" / f"{image}.png").convert("RGB"))
    size = input_size(*pixels.shape[:2], options)
    assert [size.height, size.width] == golden["input_hw"].tolist()
    inputs = network_inputs([pixels], [size], options)

    record = ImageRecord(1, f"{image}.png", *pixels.shape[:2])
    with (
        results_of(model, "extract_feature_maps") as maps,
        results_of(model.rpn, "filter_proposals") as filtered,
        results_of(model, "predict") as predicted,
    ):
        (found,) = detect_batch(model, [pixels], [record], detector.meta.category_ids, OPTIONS)
    ((proposals,),), ((output,),) = filtered, predicted
    overlap = box_ops.iou(proposals, torch.from_numpy(golden["proposals"])).max(dim=1).values
    same = int((overlap > 0.999).sum())

    pairs = match_detections(output.boxes.numpy(), output.labels.numpy(), golden["det_box"], golden["det_class"] + 1)
    rows, ours = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
    scores = np.abs(output.scores.numpy()[ours] - golden["det_score"][rows]).max()
    assert output.masks is not None and found.masks is not None
    masks = np.abs(output.masks.numpy()[ours] - golden["mask_prob"][rows]).max()
    # rounding decides about pixels with a probability near 0.5: even a mask of 50 pixels may differ by one
    areas = np.array(
        [coco_mask.area({"size": pixels.shape[:2], "counts": found.masks[row]}) for row in ours], np.float64
    )
    pixels_off = np.abs(areas - golden["mask_area"][rows])
    area = (np.maximum(pixels_off - 1, 0) / np.maximum(golden["mask_area"][rows], 1)).max()

    with patch.object(model, "extract_feature_maps", return_value=maps[0]):  # computed above
        (given,) = model.extract_features(inputs, [size], [torch.from_numpy(golden["given_box_xyxy"])])
    pool5, fc7 = (relative_error(given.features[key].numpy(), golden[f"given_{key}"]) for key in ("pool5", "fc7"))
    form = "optimized" if optimized else "trained"
    print(f"{name} {image} {form}: proposals {same} of 1000, detections {len(pairs)} of 100, score {scores:.1e}, "
          f"masks {masks:.1e}, areas {pixels_off.max():.0f} pixels, pool5 {pool5:.1e}, fc7 {fc7:.1e}")  # fmt: skip
    assert len(proposals) == 1000 and same >= 990
    assert len(pairs) == len(output.boxes) == 100 and scores < 1e-3
    assert masks < 2e-3 and area < 5e-3
    assert pool5 < 1e-4 and fc7 < 1e-4
