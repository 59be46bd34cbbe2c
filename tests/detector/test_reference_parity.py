"""Parity with the reference: recorded results of its own code on real images, against those of refdet.

``make parity`` prints the errors.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from parity import match_detections, relative_error
from PIL import Image
from recorded_results import results_of
from torch import Tensor

from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size, network_input
from refdet.detector import checkpoint, loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.outputs import Detections
from refdet.detector.predictor import detect_batch
from refdet.detector.rpn import DELTA_WEIGHTS
from refdet.detector.target_assignment import NEGATIVE, POSITIVE
from refdet.detector.weights.import_weights import import_weights
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import InputSize
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

pytestmark = [pytest.mark.golden, pytest.mark.slow]

TO_HALF_OPEN = np.array([0, 0, 1, 1], np.float32)  # from the reference's inclusive boxes to half-open ones
IMAGES = {50: ("000000194322", "000000249346", "000000466137", "000000551757"), 101: ("000000466137",)}
# "optimized" is the network as extract-features runs it: norms folded, conv5 split, kernels for convolutions
CASES = [(depth, image, "trained") for depth, images in IMAGES.items() for image in images]
CASES += [(50, "000000249346", "optimized"), (101, "000000466137", "optimized")]
# Minimum numbers of equal proposals and detections for cases that cannot match completely. In the first, 858 anchors
# have a probability of exactly 1, and their order after the reference's unstable sort depends on the processor. In the
# others, rounding accumulates over 101 layers; refdet in float32 differs as much from refdet in float64.
MIN_EQUAL = {
    (50, "000000194322", "trained"): (296, 96),
    (101, "000000466137", "trained"): (294, 98),
    (101, "000000466137", "optimized"): (288, 97),
}
Key = tuple[int, str, str]
Detectors = Callable[[int, str], loading.TrainedDetector]
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture(scope="module")
def detectors(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detectors]:
    """The detectors of the reference's checkpoints, through import-weights, by depth and form."""
    sys.path.insert(0, str(shared / "seed"))
    try:
        from make_checkpoint import make_state_dict  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("seed")

    @functools.cache
    def imported(depth: int) -> Path:
        torch.save(make_state_dict(depth), folder / "seed.pth")
        import_weights(folder / "seed.pth", folder / str(depth))
        (folder / "seed.pth").unlink()
        return folder / str(depth)

    @functools.cache
    def detector(depth: int, form: str) -> loading.TrainedDetector:
        precision = "bfloat16" if form == "bfloat16" else "float32"
        return loading.load(imported(depth), for_inference=form != "trained", precision=precision)

    yield detector
    for model in folder.glob(f"*/{checkpoint.MODEL}"):
        model.unlink()


@dataclass(frozen=True)
class Case:
    """One image, the recorded results of the reference, and what refdet computed from it."""

    model: MaskRCNN
    golden: dict[str, np.ndarray]
    pixels: np.ndarray
    size: InputSize
    inputs: Tensor
    conv4: Tensor
    boxes: Tensor  # the proposals
    logits: Tensor  # of the proposals
    deltas: Tensor  # of the proposals
    found: Detections


@pytest.fixture(scope="module", params=CASES, ids=["res{}-{}-{}".format(*case) for case in CASES])
def key(request: pytest.FixtureRequest) -> Key:
    return request.param


@pytest.fixture(scope="module")
def case(key: Key, cases: Callable[[Key], Case]) -> Case:
    return cases(key)


@pytest.fixture(scope="module")
def cases(detectors: Detectors, shared: Path) -> Callable[[Key], Case]:
    return functools.cache(functools.partial(make_case, detectors, shared))


def make_case(detectors: Detectors, shared: Path, key: Key) -> Case:
    depth, image, form = key
    model = detectors(depth, form).model
    with np.load(shared / "seed" / f"golden_res{depth}_{image}.npz") as file:
        golden = {name: file[name] for name in file.files}
    pixels = np.array(Image.open(shared / "seed" / "images" / f"{image}.png").convert("RGB"))
    size = input_size(*pixels.shape[:2], model.recipe.input)
    inputs = network_input(pixels, size, model.recipe.input)[None]
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with (
        torch.inference_mode(),
        results_of(model, "extract_feature_maps") as maps,
        results_of(model.rpn, "filter_proposals") as proposals,
        results_of(model.head, "predict_boxes") as classified,
    ):
        (found,) = model.predict(inputs, [size], DetectionOptions(score_threshold=0.0))
    ((conv4,),), ((boxes,),), ((logits, deltas),) = maps, proposals, classified
    return Case(model, golden, pixels, size, inputs, conv4, boxes, logits, deltas, found)


def test_network_input_and_conv4_equal_the_reference(case: Case) -> None:
    blob = case.inputs[0].permute(1, 2, 0).numpy()
    assert case.size.scale == (case.golden["im_scale"],) * 2
    assert (1, *blob.shape) == tuple(case.golden["blob_shape"])
    pixels = np.abs(blob[::37, ::41] - case.golden["blob_sample"]).max()
    conv4 = case.conv4
    assert tuple(conv4.shape) == tuple(case.golden["net_conv_shape"])
    error = relative_error(conv4[0, ::64].numpy(), case.golden["net_conv_sample"])
    print(f"input {pixels:.1e} of 255, conv4 {error:.1e}")
    assert pixels < 2e-4 and error < 5e-5
    assert np.isclose(np.linalg.norm(conv4.numpy()), case.golden["net_conv_norm"], rtol=1e-5)


def test_proposals_equal_the_reference(case: Case, key: Key) -> None:
    golden = torch.from_numpy(case.golden["rois"][:, 1:] + TO_HALF_OPEN)
    overlap, matched = box_ops.iou(case.boxes, golden).max(dim=1)
    same = overlap > 0.999
    scaled = case.deltas.flatten(1) * torch.tensor([0.1, 0.1, 0.2, 0.2]).repeat(81)
    scores = np.abs(case.logits.softmax(1).numpy() - case.golden["cls_prob"][matched])[same].max()
    delta_errors = np.abs(scaled.numpy() - case.golden["bbox_deltas"][matched])[same].max()
    print(f"proposals {same.sum()} of 300, class probabilities {scores:.1e}, deltas {delta_errors:.1e}")
    assert len(case.boxes) == 300 and same.sum() >= MIN_EQUAL.get(key, (299,))[0]
    assert scores < (1e-3 if key[0] == 50 else 2e-3) and delta_errors < 1e-3


def test_detections_equal_the_reference(case: Case, key: Key) -> None:
    found = case.found
    pairs = match_detections(
        found.boxes.numpy(), found.labels.numpy(), case.golden["dets_xyxy"] + TO_HALF_OPEN, case.golden["dets_label"]
    )
    rows, ours = (np.array(side) for side in zip(*pairs, strict=True))
    scores = np.abs(found.scores.numpy()[ours] - case.golden["dets_score"][rows])
    assert found.masks is not None
    masks = np.abs(found.masks.numpy()[ours] - case.golden["mask_prob"][rows]).max(axis=(1, 2))
    print(f"detections {len(pairs)} of 100; score {scores.max():.1e}, {(scores < 1e-4).sum()} within 1e-4; "
          f"masks {masks.max():.1e}, {(masks < 1e-3).sum()} within 1e-3")  # fmt: skip
    assert len(pairs) >= MIN_EQUAL.get(key, (0, 99))[1]
    assert np.median(scores) < 1e-4 and scores.max() < (3e-3 if key == (101, "000000466137", "optimized") else 1e-3)
    assert np.median(masks) < 1e-3 and masks.max() < 2e-2
    if key not in MIN_EQUAL:
        assert (scores < 1e-4).sum() >= 99 and (masks < 1e-3).sum() >= 97


@torch.inference_mode()
def test_features_of_given_boxes_equal_the_reference(case: Case) -> None:
    boxes = torch.from_numpy(case.golden["given_xyxy"] + TO_HALF_OPEN)
    with patch.object(case.model, "extract_feature_maps", return_value=[case.conv4]):  # computed above
        (found,) = case.model.extract_features(case.inputs, [case.size], [boxes])
    pool5 = relative_error(found.features["pool5"].numpy(), case.golden["given_pool5"])
    fc7 = relative_error(found.features["fc7"].numpy(), case.golden["given_fc7"])
    print(f"pool5 {pool5:.1e}, fc7 {fc7:.1e}")
    assert pool5 < 5e-5 and fc7 < 5e-5


@pytest.mark.skipif(
    not BFLOAT16,
    reason="this processor has no bfloat16 arithmetic: extraction does not use it here, and it would take minutes",
)
@torch.inference_mode()
def test_features_in_bfloat16_are_close_to_the_reference(case: Case, key: Key, detectors: Detectors) -> None:
    """The weights are random, not trained, so that rounding errors accumulate more over 101 layers."""
    boxes = torch.from_numpy(case.golden["given_xyxy"] + TO_HALF_OPEN)
    optimized = key[2] == "optimized"  # as in extract-features --precision bfloat16
    model = detectors(key[0], "bfloat16").model if optimized else case.model
    with torch.autocast("cpu", torch.bfloat16, enabled=not optimized):
        (found,) = model.extract_features(
            case.inputs.to(torch.bfloat16) if optimized else case.inputs, [case.size], [boxes]
        )
    expected = torch.from_numpy(case.golden["given_fc7"])
    cosine = torch.nn.functional.cosine_similarity(found.features["fc7"], expected).min().item()
    print(f"cosine of fc7 in bfloat16 {cosine:.5f}")
    assert cosine > (0.999 if key[0] == 50 else 0.996)


def test_extracted_boxes_equal_the_reference(cases: Callable[[Key], Case], detectors: Detectors) -> None:
    """By the function that extract-features calls. Boxes are half-open: x2 and y2 are 1 more than in the reference."""
    image, detector = IMAGES[50][1], detectors(50, "optimized")
    case, ids = cases((50, image, "optimized")), detector.meta.category_ids
    record = ImageRecord(1, f"{image}.png", *case.pixels.shape[:2])
    options = DetectionOptions(score_threshold=0.0)
    with torch.inference_mode(), patch.object(case.model, "predict", return_value=case.found) as predict:
        (found,) = detect_batch(case.model, [case.pixels], [record], ids, options)
    inputs, sizes, *_ = predict.call_args.args  # the recorded prediction is that of this input
    assert torch.equal(inputs, case.inputs) and sizes == [case.size] and predict.call_args.args[2] == options
    golden = case.golden
    order = np.argsort(-golden["dets_score"], kind="stable")
    boxes, scores = golden["dets_xyxy"][order] + TO_HALF_OPEN, golden["dets_score"][order]
    categories = np.array(ids)[golden["dets_label"][order] - 1]
    same = np.abs(found.boxes - boxes).max(axis=1) < 0.05
    assert same.sum() >= 95  # detections of nearly equal scores are swapped
    np.testing.assert_array_equal(found.category_ids[same], categories[same])
    np.testing.assert_allclose(found.scores, scores, atol=3e-4)


@pytest.mark.parametrize("image", ["000000249346", "000000466137"])
def test_anchor_labels_and_targets_equal_the_reference(detectors: Detectors, shared: Path, image: str) -> None:
    with np.load(shared / "seed" / f"golden_anchor_labels_{image}.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if file[name].ndim}
    rpn = detectors(50, "trained").model.rpn
    height, width = golden["feature_hw"].tolist()
    (anchors,) = rpn.anchors([torch.zeros(1, 1, height, width)])
    one = torch.from_numpy(TO_HALF_OPEN)
    torch.testing.assert_close(anchors[:24], golden["first_anchors"] + one, atol=0, rtol=0)
    boxes = golden["gt_xyxy_inclusive"] + one
    truth = GroundTruth(boxes, torch.ones(len(boxes), dtype=torch.int64), None, torch.zeros(0, 4), (1.0, 1.0))
    padded = PaddedGroundTruth.pad([truth], torch.device("cpu"))
    (labels,), (matched,) = rpn.assign_targets(anchors, [tuple(golden["image_hw"].tolist())], padded)
    assert (labels == POSITIVE).nonzero()[:, 0].tolist() == golden["positive"].tolist()
    assert (labels == NEGATIVE).nonzero()[:, 0].tolist() == golden["negative"].tolist()
    positive = golden["positive"]
    targets = box_ops.encode(boxes[matched[positive]], anchors[positive], DELTA_WEIGHTS)
    torch.testing.assert_close(targets, golden["positive_targets"], atol=1e-4, rtol=0)
