"""A detector optimized for inference finds what the trained one finds."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from trained_models import IDS, VARIANTS, some_images, trained_model

from refdet.detector import optimize
from refdet.detector.predictor import describe_boxes, detect_batch
from refdet.detector.res5_head import SplitRes5
from refdet.detector.resnet import FrozenBatchNorm
from refdet.structures.detection_options import DetectionOptions

NAMES = ("pool5", "fc7", "class_prob")


@pytest.mark.parametrize("variant", VARIANTS)
def test_regions_and_features_are_the_same(variant: str) -> None:
    changes, has_split_res5 = VARIANTS[variant]
    model = trained_model(*changes)
    optimized = optimize.optimize_for_inference(copy.deepcopy(model))
    assert not any(isinstance(part, (FrozenBatchNorm, nn.BatchNorm2d)) for part in optimized.modules())
    assert isinstance(getattr(optimized.head, "conv5", None), SplitRes5) == has_split_res5
    images, records = some_images()
    options = DetectionOptions(score_threshold=0.1, max_regions=30)
    expected = detect_batch(model, images, records, IDS, options, features=NAMES)
    for a, b in zip(expected, detect_batch(optimized, images, records, IDS, options, features=NAMES), strict=True):
        assert len(a) > 5
        np.testing.assert_array_equal(a.category_ids, b.category_ids)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    boxes = [r.boxes for r in expected]
    found = describe_boxes(optimized, images, boxes, features=NAMES)
    for exact, other in zip(describe_boxes(model, images, boxes, features=NAMES), found, strict=True):
        for name in NAMES:
            np.testing.assert_allclose(other.features[name], exact.features[name], rtol=1e-4, atol=1e-5)


def test_conv5_is_split_only_for_enough_rois() -> None:
    optimized = optimize.optimize_for_inference(trained_model())
    maps = optimized.extract_feature_maps(torch.randn(1, 3, 96, 128))
    few, many = optimized.head.precompute(maps, 0), optimized.head.precompute(maps, 100)
    assert (len(few), len(many)) == (1, 2)
    rois = torch.tensor([[0, 10.0, 20, 60, 90], [0, -30, -30, 20, 20], [0, 0, 0, 128, 96]])
    torch.testing.assert_close(
        optimized.head.box_features(few, rois), optimized.head.box_features(many, rois), rtol=1e-5, atol=1e-5
    )


def test_features_that_are_not_requested_are_not_computed() -> None:
    optimized = optimize.optimize_for_inference(trained_model())
    images, _ = some_images()
    boxes = [np.array([[1, 1, 60, 60]])] * 2
    expected = describe_boxes(optimized, images, boxes)[0].features["pool5"]
    optimized.head.conv5 = None  # calling it would fail
    found = describe_boxes(optimized, images, boxes, features=("pool5",))[0]
    assert list(found.features) == ["pool5"]
    np.testing.assert_array_equal(found.features["pool5"], expected)


@pytest.mark.parametrize("variant", ["c4", "fpn", "crop"])
def test_features_in_bfloat16_are_close_to_float32(variant: str) -> None:
    model = trained_model(*VARIANTS[variant][0])
    half = optimize.optimize_for_inference(copy.deepcopy(model), bf16=True)
    assert half.head.box.score.weight.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.rpn.anchors.buffers(), half.rpn.anchors.buffers(), strict=True))
    images, records = some_images()
    boxes = [np.array([[1, 1, 60, 60], [20, 10, 120, 90]])] * 2
    exact, found = (describe_boxes(m, images, boxes)[0].features for m in (model, half))
    for name in exact:
        assert found[name].dtype == np.float32
        cosine = (exact[name] * found[name]).sum(1) / np.linalg.norm(exact[name], axis=1)
        assert (cosine / np.linalg.norm(found[name], axis=1)).min() > 0.999
    detected = detect_batch(half, images, records, IDS, DetectionOptions(score_threshold=0.1))
    assert all(len(r) and r.masks is not None for r in detected)


def test_a_norm_after_a_convolution_with_bias_is_refused() -> None:
    with pytest.raises(TypeError, match="a convolution without bias"):
        optimize.fuse_conv_bn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
