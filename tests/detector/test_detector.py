"""The detector as a whole: shapes, invariances, and its parts against torchvision."""

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, VARIANTS, records_of, small_model, some_images
from pycocotools import mask as coco_mask
from torchvision.models import resnet18, resnet50

from refdet.detector.anchors import AnchorGenerator, cell_anchors
from refdet.detector.predictor import describe_boxes, detect_batch
from refdet.detector.resnet import ResNet
from refdet.ops.pooling import pyramid_roi_align, roi_align
from refdet.structures.detection_options import DetectionOptions


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_has_the_same_regions_whatever_its_batch(variant: str) -> None:
    model, images = small_model(*VARIANTS[variant]), some_images(4)
    records, options = records_of(images), DetectionOptions(score_threshold=0.1, max_regions=30)
    together = detect_batch(model, images, records, CATEGORY_IDS, options)
    alone = [detect_batch(model, [i], [r], CATEGORY_IDS, options)[0] for i, r in zip(images, records, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == len(b) > 3
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
        np.testing.assert_array_equal(a.category_ids, b.category_ids)
        assert (a.masks is None) == (b.masks is None) == (variant == "vgg16")
        if a.masks is not None and b.masks is not None:
            overlaps = np.diag(coco_mask.iou(a.rles(), b.rles(), [0] * len(b)))
            for mask, other, overlap in zip(a.masks, b.masks, overlaps, strict=True):
                assert mask == other or overlap > 0.95  # rounding decides about pixels at the threshold
        for name in ("pool5", "fc7"):
            error = np.linalg.norm(a.features[name] - b.features[name]) / np.linalg.norm(b.features[name])
            assert error < 1e-4


def test_regions_are_well_formed() -> None:
    model, images = small_model(), some_images(2, height=70, width=90)
    for regions in detect_batch(
        model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.05)
    ):
        assert 0 < len(regions) <= 100
        assert (regions.boxes[:, :2] >= 0).all()
        assert (regions.boxes[:, 2] <= 90 + 1e-3).all() and (regions.boxes[:, 3] <= 70 + 1e-3).all()
        assert (regions.boxes[:, 2:] > regions.boxes[:, :2]).all()
        assert set(regions.category_ids.tolist()) <= set(CATEGORY_IDS)
        assert (np.diff(regions.scores) <= 0).all() and (regions.scores > 0.05).all()
        assert regions.features["pool5"].shape == (len(regions), 8 * 4)
        assert regions.features["fc7"].shape == (len(regions), 8 * 8)


def test_given_boxes_have_the_features_of_detections() -> None:
    model, images = small_model(), some_images(3)
    found = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions())
    described = describe_boxes(model, images, [r.boxes for r in found])
    for regions, description in zip(found, described, strict=True):
        features = description.features
        for name in ("pool5", "fc7"):
            np.testing.assert_allclose(features[name], regions.features[name], rtol=1e-3, atol=1e-4)


def test_given_boxes_have_the_masks_of_detections() -> None:
    model, images = small_model(), some_images(2)
    found = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions())
    labels = [np.array([CATEGORY_IDS.index(c) + 1 for c in r.category_ids]) for r in found]
    described = describe_boxes(model, images, [r.boxes for r in found], labels=labels)
    for regions, description in zip(found, described, strict=True):
        assert description.masks is not None and regions.masks is not None and len(description.masks) > 3
        same = [a == b for a, b in zip(description.masks, regions.masks, strict=True)]
        assert np.mean(same) > 0.9  # rounding decides about pixels at the threshold
    assert all(d.masks is None for d in describe_boxes(model, images, [r.boxes for r in found]))


def test_images_of_different_sizes_in_a_batch_keep_their_own_scale() -> None:
    """Images of 96x128 and 192x256 have one input size; each has the boxes and features that it has alone."""
    model = small_model()
    (small,) = some_images(1)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    together = detect_batch(model, [small, large], records_of([small, large]), CATEGORY_IDS, DetectionOptions())
    alone = [detect_batch(model, [i], records_of([i]), CATEGORY_IDS, DetectionOptions())[0] for i in (small, large)]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert together[1].boxes.max() > 128
    boxes = [np.array([[8, 8, 48, 40]], np.float32), np.array([[16, 16, 96, 80]], np.float32)]
    first, second = describe_boxes(model, [small, large], boxes)
    one, other = (description.features["pool5"] for description in (first, second))
    assert np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_the_threshold_is_lowered_until_an_image_has_a_region() -> None:
    model, images = small_model(), some_images(2)
    every = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.0))
    best = [r.scores.max() for r in every]
    assert max(best) < 0.95
    none = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.95))
    assert [len(r.boxes) for r in none] == [0, 0]
    one = detect_batch(
        model,
        images,
        records_of(images),
        CATEGORY_IDS,
        DetectionOptions(score_threshold=0.95, lower_threshold_if_empty=True),
    )
    for regions, highest in zip(one, best, strict=True):
        threshold = 0.95
        while threshold > highest:  # lowered in steps of 0.1
            threshold -= 0.1
        assert len(regions.boxes) > 0 and regions.scores.max() == pytest.approx(highest)
        assert (regions.scores >= threshold).all()
    exact = DetectionOptions(score_threshold=float(np.float32(best[0])), lower_threshold_if_empty=True)
    (just,) = detect_batch(model, images[:1], records_of(images[:1]), CATEGORY_IDS, exact)
    assert just.scores.min() == pytest.approx(best[0])  # a score equal to the threshold suffices, so it is not lowered


def test_images_without_regions_or_boxes_have_empty_results() -> None:
    model, images = small_model(), some_images(2)
    found = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.9999))
    assert [len(r) for r in found] == [0, 0]
    described = describe_boxes(model, images, [np.zeros((0, 4)), np.array([[1, 1, 30, 30]])])
    assert [d.features["fc7"].shape for d in described] == [(0, 64), (1, 64)]


def test_images_of_different_input_size_are_refused() -> None:
    images = [*some_images(1), *some_images(1, 96, 160)]
    with pytest.raises(ValueError, match="group_by_input_size"):
        detect_batch(small_model(), images, records_of(images), CATEGORY_IDS, DetectionOptions())


def test_max_regions_keeps_the_best_regions() -> None:
    model, images = small_model(), some_images(1)
    few = detect_batch(
        model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.1, max_regions=5)
    )[0]
    many = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions(score_threshold=0.1))[0]
    assert len(few) == 5 and len(many) > 5
    np.testing.assert_allclose(few.boxes, many.boxes[:5], atol=1e-3)


def test_without_masks_there_is_no_mask_branch() -> None:
    model, images = small_model("model.masks=false"), some_images(1)
    assert not [name for name in model.state_dict() if "mask" in name]
    found = detect_batch(model, images, records_of(images), CATEGORY_IDS, DetectionOptions())[0]
    assert len(found) and found.masks is None


@pytest.mark.parametrize(("depth", "theirs"), [(18, resnet18), (50, resnet50)])
def test_resnet_equals_torchvision(depth: int, theirs: type) -> None:
    torch.manual_seed(0)
    reference = theirs(weights=None).eval()
    ours = ResNet(depth, 64, torch.nn.BatchNorm2d, (1, 2, 2, 2)).eval()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64)
    stem = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(stem))))
    torch.testing.assert_close(ours(x, 4)[-1], expected)


def test_frozen_norm_equals_batch_norm_in_eval_mode() -> None:
    torch.manual_seed(0)
    batch, frozen = small_model("model.norm=batch"), small_model("model.norm=frozen")
    for module in batch.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    frozen.load_state_dict(batch.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 128)
    torch.testing.assert_close(
        frozen.extract_feature_maps(x)[0], batch.extract_feature_maps(x)[0], atol=1e-4, rtol=1e-4
    )
    assert not any(p.requires_grad for p in frozen.backbone.layer1.parameters())


def test_cell_anchors_have_the_given_area_and_ratio() -> None:
    anchors = cell_anchors([16, 32], [0.5, 2.0])
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    torch.testing.assert_close((width * height).sqrt(), torch.tensor([16.0, 32, 16, 32]))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 0.5, 2, 2]))


def test_anchors_are_ordered_by_row_column_and_size() -> None:
    maps = [torch.zeros(1, 1, 2, 3)]
    anchors = AnchorGenerator([[8.0, 16.0]], [1.0], [10])(maps)[0]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    expected = [[x, y] for y in (5, 15) for x in (5, 15, 25) for _ in range(2)]
    assert centers.tolist() == expected


def test_roi_align_reads_a_linear_map_exactly() -> None:
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(20) + 0.5, indexing="ij")
    ramp = torch.stack((x, y))[None] * 8  # the value of a cell is the position of its center in pixels
    rois = torch.tensor([[0, 20.0, 16.0, 90.0, 72.0]])
    found = roi_align(ramp, rois, 7, 8)[0]
    torch.testing.assert_close(found[0, 0], 20 + (torch.arange(7) + 0.5) * 10)
    torch.testing.assert_close(found[1, :, 0], 16 + (torch.arange(7) + 0.5) * 8)


def test_pyramid_reads_each_roi_from_its_level() -> None:
    maps = [torch.full((1, 1, 256 // 2**level, 256 // 2**level), float(level)) for level in range(4)]
    rois = torch.tensor([[0, 0.0, 0.0, side, side] for side in (40, 111, 112, 224, 448, 1000)])
    found = pyramid_roi_align(maps, rois, 1, (4, 8, 16, 32))
    # a box of 40 pixels would belong to a finer level than there is
    assert found.flatten().tolist() == [0, 0, 1, 2, 3, 3]


def test_the_mask_predictor_computes_only_the_masks_of_the_labels() -> None:
    predictor = small_model().head.mask
    x, labels = torch.randn(3, 64, 7, 7), torch.tensor([1, 4, 2])
    every_class = predictor.logits(predictor.hidden(x))
    torch.testing.assert_close(predictor(x, labels), every_class[torch.arange(3), labels], atol=1e-4, rtol=1e-4)
