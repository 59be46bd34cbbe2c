"""The whole detector computes the same on a GPU as on the CPU, and the same each time.

Compared are detections, features of given boxes, losses and gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_modules import benchmark_module
from detector_examples import PYRAMID, VARIANTS, ground_truth, small_model, some_images
from devices import is_gpu, on_devices, runs, variants_on_devices
from pycocotools import mask as coco_mask
from torch import Tensor
from trained_models import VARIANTS as TRAINED_VARIANTS
from trained_models import saved_model

import refdet
from refdet.detector import vgg
from refdet.detector.roi_sampling import sample_rois
from refdet.detector.sampling import image_seeds
from refdet.device import float32_arithmetic, resolve_device
from refdet.errors import RuntimeFailure
from refdet.structures import boxes as box_ops
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

pytestmark = pytest.mark.slow

row_difference = benchmark_module("differences").row_difference
MAX_DIFFERENCE = 1e-4  # limit of `row_difference`, as in benchmarks/gpu/network_parity.py
BOXES = [[10, 20, 60, 70], [0.5, 1, 90, 80], [0, 0, 128, 96], [30.25, 40, 31, 41]]
FEATURES = ("pool5", "fc7", "class_prob", "spatial_pool5", "spatial_fc7", "head")
SEEDS = itertools.count()  # another for each network: a GPU's random numbers are never those of the CPU
IMAGES = [*some_images(3), *some_images(2, 60, 50), *some_images(1, 200, 130)]


@pytest.fixture(scope="module")
def run_folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the run directory of a variant of `TRAINED_VARIANTS`."""
    made: dict[str, Path] = {}

    def run_folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = saved_model(tmp_path_factory.mktemp(variant) / "run", *TRAINED_VARIANTS[variant][0])
        return made[variant]

    return run_folder


def features_of(variant: str) -> tuple[str, ...]:
    """The features that are compared: all that the variant has, but of a pyramid only those of a vector per box."""
    names = FEATURES[:3] if variant == "fpn" else FEATURES
    return tuple(name for name in names if (variant, name) != ("vgg16", "spatial_fc7"))  # its fc7 is a linear layer


def share_found(found: refdet.Regions, expected: refdet.Regions) -> float:
    """The share of expected regions found with the same class and nearly the same box and score."""
    overlap = box_ops.iou(torch.from_numpy(expected.boxes), torch.from_numpy(found.boxes)).numpy() > 0.99
    same = overlap & (expected.category_ids[:, None] == found.category_ids)
    same &= np.abs(expected.scores[:, None] - found.scores) < 1e-4
    return float(same.any(axis=1).mean()) if len(expected) else float(len(found) == 0)


def assert_same_bits(found: Sequence[refdet.Regions], expected: Sequence[refdet.Regions]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("boxes", "scores", "category_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.masks == other.masks
        for name, values in {**other.features, **other.maps}.items():
            np.testing.assert_array_equal({**one.features, **one.maps}[name], values)


@variants_on_devices(TRAINED_VARIANTS, {"basic-blocks", "fpn"})
def test_detections_equal_those_of_the_cpu(device: str, variant: str, run_folder_of: Callable[[str], Path]) -> None:
    def detect(where: str) -> list[refdet.Regions]:
        detector = refdet.load_detector(run_folder_of(variant), device=where)
        return detector.detect(IMAGES, score_threshold=0.1, max_regions=50, features=features_of(variant))

    expected, (found, again, on_side_stream) = detect("cpu"), runs(lambda: detect(device), device)
    assert sum(map(len, expected)) > 50
    assert np.mean([share_found(*pair) for pair in zip(found, expected, strict=True)]) >= 0.97
    assert_same_bits(again, found)
    assert_same_bits(on_side_stream, found)


@variants_on_devices(TRAINED_VARIANTS, {"basic-blocks", "fpn"})
def test_features_of_given_boxes_equal_those_of_the_cpu(
    device: str, variant: str, run_folder_of: Callable[[str], Path]
) -> None:
    def describe(where: str) -> list[refdet.Regions]:
        detector, labels = refdet.load_detector(run_folder_of(variant), device=where), [[1, 3, 7, 44], [3]]
        return detector.describe(IMAGES[:2], [BOXES, BOXES[:1]], category_ids=labels, features=features_of(variant))

    expected, (found, again, _) = describe("cpu"), runs(lambda: describe(device), device)
    for ours, theirs in zip(found, expected, strict=True):
        for name in features_of(variant):
            one, other = ({**r.features, **r.maps}[name] for r in (ours, theirs))
            # the rows are boxes, or channels of the map
            assert row_difference(*map(torch.from_numpy, (one, other))) <= MAX_DIFFERENCE, name
        for mask, other in zip(ours.rles(), theirs.rles(), strict=True):
            # in a small mask, one pixel that lies on the threshold changes the IoU a lot
            assert coco_mask.iou([mask], [other], [0])[0, 0] > 0.99 or coco_mask.area(other) < 50
    assert_same_bits(again, found)


@pytest.mark.parametrize("variant", ["basic-blocks", "crop", "fpn"])
def test_features_of_boxes_off_by_a_tenth_of_a_pixel_differ(variant: str, run_folder_of: Callable[[str], Path]) -> None:
    """So the comparison above detects a kernel that samples the map at slightly wrong positions."""
    detector, names = refdet.load_detector(run_folder_of(variant), device="cpu"), ("pool5", "fc7")
    moved = np.array(BOXES[:2]) + [[0.1, 0, 0.1, 0]]
    found, expected = (detector.describe(IMAGES[0], boxes, features=names) for boxes in (moved, BOXES[:2]))
    for name in names:
        assert row_difference(*(torch.from_numpy(r.features[name]) for r in (found, expected))) > MAX_DIFFERENCE, name


@on_devices
@pytest.mark.parametrize("count", [0, 1])
def test_images_without_boxes(device: str, count: int, run_folder_of: Callable[[str], Path]) -> None:
    detector = refdet.load_detector(run_folder_of("c4"), device=device)
    none, some = detector.describe(IMAGES[:2], [[], BOXES[:count]])
    assert len(none) == 0 and len(some) == count and none.features["fc7"].shape == (0, some.features["fc7"].shape[1])
    assert [len(found) for found in detector.detect(IMAGES[:2], score_threshold=1.0)] == [0, 0]


@on_devices
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("variant", ["c4", "fpn"])
def test_other_precisions_are_close_to_float32(
    device: str, precision: str, variant: str, run_folder_of: Callable[[str], Path]
) -> None:
    exact = refdet.load_detector(run_folder_of(variant), device="cpu").describe(IMAGES[0], BOXES[:3])
    rough = refdet.load_detector(run_folder_of(variant), device=device, precision=precision)
    assert not is_gpu(device) or rough.precision == precision
    one, other = exact.features["fc7"], rough.describe(IMAGES[0], BOXES[:3]).features["fc7"]
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > (0.9999 if precision == "tf32" else 0.99)
    found = rough.detect(IMAGES, score_threshold=0.1)
    assert sum(map(len, found)) > 0 and all(np.isfinite(regions.boxes).all() for regions in found)


@on_devices
def test_weights_that_yield_nan_are_an_error(device: str, run_folder_of: Callable[[str], Path]) -> None:
    detector = refdet.load_detector(run_folder_of("c4"), device=device)
    for parameter in detector._model.rpn.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(RuntimeFailure, match="contain NaN or inf"):
        detector.detect(IMAGES[0])


@pytest.mark.gpu(count=2)
def test_detectors_on_two_gpus_used_in_turn(run_folder_of: Callable[[str], Path]) -> None:
    """Each detector computes on its own GPU, whichever is the current one."""
    detectors = [refdet.load_detector(run_folder_of("c4"), device=name) for name in ("cuda:0", "cuda:1")]
    assert torch.cuda.current_device() == 1  # the one of the detector loaded last
    for _ in range(2):
        first, second = (detector.describe(IMAGES[0], BOXES) for detector in detectors)
        np.testing.assert_allclose(first.features["fc7"], second.features["fc7"], rtol=1e-4, atol=1e-5)


def truths() -> list[GroundTruth]:
    """The objects of three images: one object, two and none, each beside a crowd."""
    objects, labels = [[(10, 10, 60, 60)], [(5, 20, 40, 90), (50, 8, 120, 50)], []], [[2], [4, 1], []]
    return [ground_truth(*pair, crowds=[[0, 0, 9, 9]]) for pair in zip(objects, labels, strict=True)]


def losses_and_gradients(device: str, variant: str, bf16: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients, on the CPU, of all anchors and RoIs, so that there is no random sampling."""
    where = resolve_device(device)
    model = small_model(
        *VARIANTS[variant], "proposals.batch_size_per_image=100000", "head.batch_size_per_image=20000",
        "proposals.post_nms_top_n_train=60", "head.positive_fraction=1.0", "proposals.positive_fraction=1.0",
    )  # fmt: skip
    model = model.train().to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.manual_seed(next(SEEDS))
    images = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(0)).to(where)
    generator = torch.Generator().manual_seed(0)
    with float32_arithmetic("float32"), torch.autocast(where.type, torch.bfloat16, enabled=bf16):
        found = model.compute_losses(images, [(96, 128), (90, 128), (96, 100)], truths(), generator)
    with float32_arithmetic("float32"):
        torch.stack(list(found.values())).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in found.items()}, gradients


@variants_on_devices(VARIANTS, {"c4", "fpn", "vgg16"})
def test_losses_and_gradients_equal_those_of_the_cpu(
    device: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vgg, "DROPOUT", 0.0)  # it would drop other values on a GPU
    losses, gradients = losses_and_gradients(device, variant)
    expected, expected_gradients = losses_and_gradients("cpu", variant)
    assert (
        losses.keys() == expected.keys()
        and gradients.keys() == expected_gradients.keys()
        and len(expected_gradients) > 20
    )
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-5)
    scale = max(float(value.norm()) for value in expected_gradients.values())
    for name, value in expected_gradients.items():
        assert float((gradients[name] - value).norm()) <= 1e-2 * float(value.norm()) + 1e-5 * scale, name


@on_devices
@pytest.mark.parametrize("variant", ["c4", "fpn"])
def test_losses_in_bfloat16_are_close_to_float32(device: str, variant: str) -> None:
    losses, gradients = losses_and_gradients(device, variant, bf16=True)
    expected, expected_gradients = losses_and_gradients("cpu", variant)
    assert gradients.keys() == expected_gradients.keys() and all(value.isfinite().all() for value in gradients.values())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].float(), value, rtol=0.2, atol=0.05)


@on_devices
def test_sampled_rois_are_repeated_with_the_same_seed(device: str) -> None:
    where = resolve_device(device)
    model = small_model(*PYRAMID, "head.batch_size_per_image=16").train().to(where)
    images = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(0)).to(where)
    maps = model.extract_feature_maps(images)
    samples = []
    for seed in (3, 3, 4):
        proposals = model.rpn.filter_proposals(model.rpn(maps), [(96, 128)] * 3)
        (seeds,) = image_seeds(3, 1, torch.Generator().manual_seed(seed))
        truth = PaddedGroundTruth.pad(truths(), where)
        samples.append(sample_rois(proposals, truth, model.recipe.head, seeds.to(where)).rois)
    first, again, other_seed = samples
    assert torch.equal(first, again) and not torch.equal(first, other_seed)
