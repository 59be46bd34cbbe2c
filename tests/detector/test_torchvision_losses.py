"""Each loss and its gradient against torchvision's functions, in float64, on the same samples and head outputs."""

import pytest
import torch
from detector_examples import small_model
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from refdet.detector import mask_rcnn
from refdet.detector.roi_sampling import SampledRois, sample_rois
from refdet.detector.rpn import RpnOutput
from refdet.detector.sampling import image_seeds, subsample_labels
from refdet.detector.target_assignment import compute_mask_targets
from refdet.structures import boxes as box_ops
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

SIZES = [(96, 128), (96, 128), (96, 128)]
LABELS = [[2], [4, 1, 3], []]
BOXES = [[(10, 10, 60, 60)], [(5, 20, 40, 90), (50, 8, 120, 50), (70, 60, 90, 80)], []]


def ellipse(x1: int, y1: int, x2: int, y2: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 < 1


def truths() -> list[GroundTruth]:
    return [
        GroundTruth(
            torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            [coco_mask.encode(ellipse(*box).numpy().astype("uint8", order="F")) for box in boxes],
            torch.zeros(0, 4),
            (1.0, 1.0),
        )
        for boxes, labels in zip(BOXES, LABELS, strict=True)
    ]


def random_leaf(*shape: int, spread: float = 1.0) -> Tensor:
    """Random float64 values that require gradients."""
    return (torch.randn(*shape, dtype=torch.float64) * spread).requires_grad_()


def assert_equal_losses(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """The losses are equal and above 0, and their gradients are equal and not all 0."""
    assert ours.dtype == torch.float64 and ours > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for found, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_rpn_losses_equal_torchvision() -> None:
    torch.manual_seed(0)
    rpn = small_model().rpn
    given, seeds = truths(), image_seeds(3, 1, torch.Generator().manual_seed(1))[0]
    (anchors,) = rpn.anchors([torch.zeros(1, 1, 12, 16)])
    count = len(anchors)
    logits, deltas = random_leaf(3, count), random_leaf(3, count, 4)
    output = RpnOutput(logits, deltas, anchors.double(), (count,))
    padded = PaddedGroundTruth.pad(given, torch.device("cpu"))
    sums, sampled_anchors = rpn.compute_losses(output, SIZES, padded, seeds)
    losses = {name: total / sampled_anchors for name, total in sums.items()}

    options = rpn.options
    labels, _ = rpn.assign_targets(output.anchors, SIZES, padded)
    samples = subsample_labels(labels, options.batch_size_per_image, options.positive_fraction, seeds)

    def sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Our samples, as torchvision's sampler returns its own."""
        positive, negative = (torch.zeros(3, count, dtype=torch.bool) for _ in range(2))
        positive.scatter_(1, samples.index, samples.positive)
        negative.scatter_(1, samples.index, samples.valid & ~samples.positive)
        stacked = torch.stack(labels)
        assert (stacked[positive] == 1).all() and (stacked[negative] == 0).all()
        return list(positive), list(negative)

    theirs = RegionProposalNetwork(
        AnchorGenerator(), RPNHead(1, 1), options.positive_iou, options.negative_iou, 1, 1.0, {}, {}, 0.7
    )
    theirs.fg_bg_sampler = sampler
    targets = [{"boxes": truth.boxes} for truth in given]
    labels, matched = theirs.assign_targets_to_anchors([output.anchors] * 3, targets)
    regression = theirs.box_coder.encode(list(matched), [output.anchors] * 3)
    labels = [label.double() for label in labels]
    score, box = theirs.compute_loss(logits.reshape(-1, 1), deltas.reshape(-1, 4), labels, list(regression))
    assert_equal_losses(losses["loss_objectness"], score, [logits])
    assert_equal_losses(losses["loss_rpn_box_reg"], box, [deltas])


class SecondStage:
    """The losses of the second stage for random head outputs, with the samples and outputs they are computed from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
        torch.manual_seed(0)
        model, self.truths = small_model(*changes).train(), truths()
        self.samples: list[SampledRois] = []
        self.inputs: dict[str, Tensor] = {}

        def sample(*args: object) -> SampledRois:
            self.samples.append(sample_rois(*args))
            return self.samples[-1]

        def predict_boxes(fc7: Tensor) -> tuple[Tensor, Tensor]:
            self.inputs |= {"logits": random_leaf(len(fc7), 5), "deltas": random_leaf(len(fc7), 5, 4, spread=0.5)}
            return self.inputs["logits"], self.inputs["deltas"]

        def mask_logits(maps: object, rois: Tensor, features: object, labels: Tensor) -> Tensor:
            every = self.inputs["masks"] = random_leaf(len(rois), 5, model.head.mask_size, model.head.mask_size)
            return every[torch.arange(len(rois)), labels]

        monkeypatch.setattr(mask_rcnn, "sample_rois", sample)
        monkeypatch.setattr(model.head, "predict_boxes", predict_boxes)
        monkeypatch.setattr(model.head, "mask_logits", mask_logits)
        self.mask_size = model.head.mask_size
        images = torch.randn(3, 3, 96, 128)
        self.losses = model.compute_losses(images, SIZES, self.truths, torch.Generator().manual_seed(0))
        (self.sampled,) = self.samples

    def positives_by_image(self) -> tuple[list[Tensor], list[Tensor]]:
        """Positive RoIs of each image, and the index of the object of each."""
        pairs = self.sampled.positive.split_by_image(3)
        return [boxes for boxes, _ in pairs], [objects for _, objects in pairs]


@pytest.mark.parametrize("changes", [(), ("head.sample_with_replacement=true",), ("head.append_gt_boxes=false",)])
def test_class_and_box_losses_equal_torchvision(monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]) -> None:
    stage = SecondStage(monkeypatch, "head.smooth_l1_beta=0.1111111111111111", *changes)
    sampled, logits, deltas = stage.sampled, stage.inputs["logits"], stage.inputs["deltas"]
    expected = box_ops.encode(sampled.matched_boxes, sampled.rois[:, 1:], mask_rcnn.DELTA_WEIGHTS)
    score, box = fastrcnn_loss(logits, deltas.flatten(1), [sampled.labels], [expected])
    assert (sampled.labels > 0).sum() > 3
    assert_equal_losses(stage.losses["loss_classifier"], score, [logits])
    assert_equal_losses(stage.losses["loss_box_reg"], box, [deltas])


def test_box_loss_with_other_betas_equals_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    for beta in (0.0, 1.0):
        stage = SecondStage(monkeypatch, f"head.smooth_l1_beta={beta}")
        sampled, deltas = stage.sampled, stage.inputs["deltas"]
        positive = sampled.labels > 0
        expected = box_ops.encode(sampled.matched_boxes, sampled.rois[:, 1:], mask_rcnn.DELTA_WEIGHTS)[positive]
        distance = (deltas[positive, sampled.labels[positive]] - expected).abs()
        loss = distance if beta == 0 else torch.where(distance < 1, distance**2 / 2, distance - 0.5)
        assert_equal_losses(stage.losses["loss_box_reg"], loss.sum() / len(sampled.labels), [deltas])


def test_mask_loss_equals_torchvision_on_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's targets are bilinear samples of a bitmap, so the test replaces ours by them."""

    def torchvision_targets(rois: Tensor, objects: Tensor, truth: GroundTruth, size: int, convention: object) -> Tensor:
        if not len(rois):
            return torch.zeros(0, size, size, dtype=torch.float64)
        bitmaps = torch.stack([torch.from_numpy(coco_mask.decode(rle)) for rle in truth.masks or []])
        return project_masks_on_boxes(bitmaps, rois.double(), objects, size)

    monkeypatch.setattr(mask_rcnn, "compute_mask_targets", torchvision_targets)
    stage = SecondStage(monkeypatch)
    rois, objects = stage.positives_by_image()
    bitmaps = [
        torch.stack([ellipse(*box) for box in boxes]) if boxes else torch.zeros(0, 96, 128, dtype=torch.bool)
        for boxes in BOXES
    ]
    labels = [truth.labels for truth in stage.truths]
    rois = [boxes.double() for boxes in rois]
    theirs = maskrcnn_loss(stage.inputs["masks"], rois, bitmaps, labels, objects)
    assert_equal_losses(stage.losses["loss_mask"], theirs, [stage.inputs["masks"]])


def test_mask_targets_are_close_to_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our cells are 0 or 1; torchvision's are fractions, which are near 0.5 only along the outline."""
    stage = SecondStage(monkeypatch)
    for boxes, objects, truth, own in zip(*stage.positives_by_image(), stage.truths, BOXES, strict=True):
        if not own:  # the image without objects
            continue
        bitmaps = torch.stack([ellipse(*box) for box in own])
        theirs = project_masks_on_boxes(bitmaps, boxes, objects, stage.mask_size)
        ours = compute_mask_targets(boxes, objects, truth, stage.mask_size)
        assert set(ours.unique().tolist()) == {0.0, 1.0} and theirs.unique().numel() > 2
        assert ((theirs >= 0.5).float() == ours).float().mean() > 0.95
