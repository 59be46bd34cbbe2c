"""The losses of the detector against their formulas written out in float64, and training in bfloat16."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, VARIANTS, ground_truth, records_of, small_model, some_images

from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.optimize import optimize_for_inference
from refdet.detector.predictor import detect_batch
from refdet.detector.roi_sampling import sample_rois
from refdet.detector.sampling import image_seeds
from refdet.detector.target_assignment import NEGATIVE, POSITIVE, assign_labels
from refdet.ops.masks import mask_coverage
from refdet.structures import boxes as box_ops
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

pytestmark = pytest.mark.slow


def one_object_and_an_empty_image() -> list[GroundTruth]:
    return [
        GroundTruth(torch.tensor([[10.0, 10, 60, 60]]), torch.tensor([2]), None, torch.zeros(0, 4), (1.0, 1.0)),
        GroundTruth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None, torch.zeros(0, 4), (1.0, 1.0)),
    ]


def test_rpn_losses_equal_their_formulas() -> None:
    """All anchors are sampled, so the loss is a sum that can be written out in float64."""
    model = small_model("model.masks=false", "proposals.batch_size_per_image=100000", "proposals.positive_fraction=1.0")
    output, truths = model.rpn(model.extract_feature_maps(torch.randn(2, 3, 96, 128))), one_object_and_an_empty_image()
    padded, seeds = PaddedGroundTruth.pad(truths, torch.device("cpu")), image_seeds(2, 1, None)[0]
    sums, sampled = model.rpn.compute_losses(output, [(96, 128)] * 2, padded, seeds)
    found = {name: value / sampled for name, value in sums.items()}
    score, box, count = 0.0, 0.0, 0
    for logits, deltas, truth in zip(output.logits.double(), output.deltas.double(), truths, strict=True):
        own = PaddedGroundTruth.pad([truth], torch.device("cpu"))
        ((labels,), _) = assign_labels(output.anchors, own, 0.7, 0.3, allow_low_quality_matches=True)
        for anchor in range(len(labels)):
            probability = 1 / (1 + torch.exp(-logits[anchor]))
            if labels[anchor] == POSITIVE:
                score -= torch.log(probability)
                x1, y1, x2, y2 = output.anchors[anchor].double().tolist()
                w, h = x2 - x1, y2 - y1
                wanted = [(35 - (x1 + x2) / 2) / w, (35 - (y1 + y2) / 2) / h, np.log(50 / w), np.log(50 / h)]
                for d, t in zip(deltas[anchor], wanted, strict=True):
                    distance = abs(d - t)
                    box += 4.5 * distance**2 if distance < 1 / 9 else distance - 0.5 / 9
            elif labels[anchor] == NEGATIVE:
                score -= torch.log(1 - probability)
            count += int(labels[anchor] in (POSITIVE, NEGATIVE))
    torch.testing.assert_close(found["loss_objectness"].double(), score / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["loss_rpn_box_reg"].double(), box / count, rtol=1e-5, atol=0)


OBJECTS, LABELS = [[(10, 10, 60, 60)], [(5, 20, 40, 90), (50, 8, 120, 50)]], [[2], [4, 1]]


def some_truths() -> list[GroundTruth]:
    """Two images with the objects above, whose masks fill their boxes."""
    return [ground_truth(boxes, labels) for boxes, labels in zip(OBJECTS, LABELS, strict=True)]


def test_second_stage_losses_equal_their_formulas() -> None:
    """Two images with objects; every RoI is sampled, so that the losses can be written out in float64."""
    model = small_model(
        "head.batch_size_per_image=20000", "head.positive_fraction=1.0", "proposals.post_nms_top_n_test=150"
    )
    truths = some_truths()
    images, sizes = torch.randn(2, 3, 96, 128), [(96, 128)] * 2
    found = model.compute_losses(images, sizes, truths)

    maps = model.extract_feature_maps(images)
    score, box, mask, count, cells = 0.0, 0.0, 0.0, 0, 0
    for image, proposals in enumerate(model.rpn.filter_proposals(model.rpn(maps), sizes)):
        for roi in torch.cat((proposals, truths[image].boxes)):
            overlaps = box_ops.iou(roi[None], truths[image].boxes)[0]
            best = int(overlaps.argmax())
            label = LABELS[image][best] if overlaps[best] >= 0.5 else 0
            row = torch.cat((torch.tensor([image]), roi))[None]
            features = model.head.features(maps, row)
            logits, deltas = (t.double() for t in model.head.predict_boxes(features.fc7))
            score -= logits[0].log_softmax(0)[label]
            count += 1
            if not label:
                continue
            x1, y1, x2, y2 = roi.double().tolist()
            a1, b1, a2, b2 = OBJECTS[image][best]
            w, h = x2 - x1, y2 - y1
            wanted = [
                10 * ((a1 + a2) / 2 - (x1 + x2) / 2) / w, 10 * ((b1 + b2) / 2 - (y1 + y2) / 2) / h,
                5 * np.log((a2 - a1) / w), 5 * np.log((b2 - b1) / h),
            ]  # fmt: skip
            for d, t in zip(deltas[0, label], wanted, strict=True):
                box += 0.5 * (d - t) ** 2 if abs(d - t) < 1 else abs(d - t) - 0.5
            cell = mask_coverage(truths[image].masks, torch.tensor([best]), roi[None], 14)[0] >= 0.5
            p = model.head.mask_logits(maps, row, features, torch.tensor([label]))[0].double().sigmoid()
            mask -= torch.where(cell, p.log(), (1 - p).log()).sum()
            cells += cell.numel()
    assert count > 100 and cells > 14 * 14 * 3
    for name, expected in (
        ("loss_classifier", score / count),
        ("loss_box_reg", box / count),
        ("loss_mask", mask / cells),
    ):
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_losses_with_the_arithmetic_of_the_reference() -> None:
    """Inclusive boxes with +1, cropping, only anchors inside the image, and RoIs sampled with replacement."""
    model = small_model(
        "model.legacy_plus_one=true", "model.pooling=crop_and_resize", "proposals.inside_only=true",
        "proposals.batch_size_per_image=100000",
        "proposals.positive_fraction=1.0", "head.append_gt_boxes=false", "head.sample_with_replacement=true",
        "head.batch_size_per_image=40",
        "model.stride=16", "model.anchor_sizes=[16,32,64]", "model.legacy_rounded_anchors=true", "model.masks=false",
    )  # fmt: skip
    truth = GroundTruth(torch.tensor([[10.0, 10, 61, 59]]), torch.tensor([2]), None, torch.zeros(0, 4), (1.0, 1.0))
    images, sizes = torch.randn(1, 3, 96, 128), [(96, 128)]
    maps = model.extract_feature_maps(images)
    output = model.rpn(maps)
    padded = PaddedGroundTruth.pad([truth], torch.device("cpu"))
    sums, sampled = model.rpn.compute_losses(output, sizes, padded, image_seeds(1, 1, None)[0])
    found = {name: value / sampled for name, value in sums.items()}
    score, box, count = 0.0, 0.0, 0
    inclusive = output.anchors.double() - torch.tensor([0.0, 0, 1, 1])
    overlaps = box_ops.iou(output.anchors, truth.boxes)[:, 0]
    x1, y1, x2, y2 = inclusive.T
    inside = (x1 >= 0) & (y1 >= 0) & (x2 < 128) & (y2 < 96)
    highest = overlaps[inside].max()
    for anchor in inside.nonzero()[:, 0].tolist():
        probability = output.logits[0, anchor].double().sigmoid()
        if overlaps[anchor] >= 0.7 or overlaps[anchor] == highest:
            score -= probability.log()
            a1, b1, a2, b2 = inclusive[anchor].tolist()
            w, h = a2 - a1 + 1, b2 - b1 + 1
            gw, gh = 60 - 10 + 1, 58 - 10 + 1
            wanted = [(10 + gw / 2 - a1 - w / 2) / w, (10 + gh / 2 - b1 - h / 2) / h, np.log(gw / w), np.log(gh / h)]
            for d, t in zip(output.deltas[0, anchor].double(), wanted, strict=True):
                box += 4.5 * (d - t) ** 2 if abs(d - t) < 1 / 9 else abs(d - t) - 0.5 / 9
        elif overlaps[anchor] < 0.3:
            score -= (1 - probability).log()
        else:
            continue
        count += 1
    assert 0 < count < inside.sum() < len(inside)
    torch.testing.assert_close(found["loss_objectness"].double(), score / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["loss_rpn_box_reg"].double(), box / count, rtol=1e-5, atol=0)
    generator = torch.Generator().manual_seed(0)
    proposals, (seeds,) = model.rpn.filter_proposals(output, sizes), image_seeds(1, 1, generator)
    sampled = sample_rois(proposals, padded, model.recipe.head, seeds)
    assert len(sampled.rois) == 40 and (sampled.labels == 2).any()
    losses = model.compute_losses(images, sizes, [truth], generator)
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", ["c4", "fpn"])
def test_training_and_detection_run_in_bfloat16(variant: str) -> None:
    model = small_model(*VARIANTS[variant]).train()
    truth = ground_truth([(10, 10, 60, 60)], [2])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.compute_losses(torch.randn(1, 3, 96, 128), [(96, 128)], [truth])
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    images = some_images(2)
    rough = optimize_for_inference(model.eval(), bf16=True)
    found = detect_batch(rough, images, records_of(images), CATEGORY_IDS, DetectionOptions())
    assert all(len(r) and r.boxes.dtype == np.float32 and np.isfinite(r.boxes).all() for r in found)


def test_every_trainable_parameter_gets_a_finite_gradient() -> None:
    for variant in ("c4", "fpn"):
        model = small_model(*VARIANTS[variant]).train()
        truth = ground_truth([(10, 10, 60, 60)], [2])
        losses = model.compute_losses(torch.randn(1, 3, 96, 128), [(96, 128)], [truth])
        assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
        torch.stack(list(losses.values())).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_batch_without_objects_trains_on_background_alone() -> None:
    model = small_model().train()
    empty = ground_truth([], [])
    losses = model.compute_losses(torch.randn(2, 3, 96, 128), [(96, 128)] * 2, [empty, empty])
    assert losses["loss_box_reg"].item() == losses["loss_mask"].item() == losses["loss_rpn_box_reg"].item() == 0
    assert losses["loss_classifier"].item() > 0
    torch.stack(list(losses.values())).sum().backward()


def drop_masks(truths: list[GroundTruth], *missing: tuple[int, int]) -> list[GroundTruth]:
    """Copies without the masks of some objects, given as (image, object)."""
    return [
        replace(t, masks=[None if (i, j) in missing else m for j, m in enumerate(t.masks or [])])
        for i, t in enumerate(truths)
    ]


def losses_of(model: MaskRCNN, truths: list[GroundTruth]) -> dict[str, torch.Tensor]:
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    return model.compute_losses(images, [(96, 128)] * 2, truths, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "vgg16"])
def test_an_object_without_a_mask_is_left_out_of_the_mask_loss_only(variant: str) -> None:
    model, truths = small_model(*VARIANTS[variant]).train(), some_truths()
    whole = losses_of(model, truths)
    for missing in (((0, 0),), ((1, 0),), ((1, 1), (0, 0)), ((0, 0), (1, 0), (1, 1))):
        found = losses_of(model, drop_masks(truths, *missing))
        for name in whole.keys() - {"loss_mask"}:
            assert torch.equal(found[name], whole[name]), (name, missing)
        model.zero_grad()
        sum(found.values(), torch.zeros(())).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), missing
        if len(missing) == 3:
            assert found["loss_mask"] == 0
        else:
            assert found["loss_mask"].isfinite() and found["loss_mask"] > 0, missing


def test_the_mask_loss_is_the_mean_over_the_objects_that_have_a_mask() -> None:
    """The mean of two objects' losses lies between the loss of one and the loss of the other."""
    model, truths, objects = small_model().train(), some_truths(), [(0, 0), (1, 0), (1, 1)]
    alone = {}
    for one in objects:
        others = [other for other in objects if other != one]
        alone[one] = losses_of(model, drop_masks(truths, *others))["loss_mask"]
    for dropped in objects:
        found = losses_of(model, drop_masks(truths, dropped))["loss_mask"]
        low, high = sorted(alone[one] for one in objects if one != dropped)
        assert low < found < high


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_without_objects_has_losses_in_every_network(variant: str) -> None:
    model, empty = small_model(*VARIANTS[variant]).train(), ground_truth([], [])
    found = losses_of(model, [empty, empty])
    assert found.get("loss_mask", 0) == found["loss_box_reg"] == found["loss_rpn_box_reg"] == 0
    assert found["loss_classifier"] > 0 and found["loss_objectness"] > 0
    sum(found.values(), torch.zeros(())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
