"""Anchors, labels, box deltas, flips and initial weights against those of torchvision."""

import math

import pytest
import torch
from detector_examples import small_recipe
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as transforms

from refdet.config import recipe as recipes
from refdet.data.training_batches import _mirror
from refdet.detector.anchors import AnchorGenerator
from refdet.detector.mask_rcnn import DELTA_WEIGHTS, MaskRCNN
from refdet.detector.target_assignment import IGNORE, assign_labels, compute_mask_targets
from refdet.structures import boxes as box_ops
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

SIZES, RATIOS, STRIDES = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0), (4, 8, 16, 32, 64)


def random_boxes(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random, dtype=torch.float64) * 100
    return torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=random, dtype=torch.float64) * 60), dim=1)


def test_anchors_equal_rounded_and_shifted_ones_of_torchvision() -> None:
    """torchvision rounds anchors and starts at 0; by default, ours start at half a stride and are not rounded."""
    maps = [torch.zeros(2, 1, 256 // stride, 320 // stride) for stride in STRIDES]
    images = ImageList(torch.zeros(2, 3, 256, 320), [(256, 320)] * 2)
    theirs, _ = TorchvisionAnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * 5)(images, maps)
    levels = [(float(size),) for size in SIZES]
    same = AnchorGenerator(levels, RATIOS, STRIDES, offset=0, torchvision=True)
    torch.testing.assert_close(torch.cat(same(maps)), theirs, rtol=0, atol=0)
    ours = AnchorGenerator(levels, RATIOS, STRIDES)(maps)
    shifted = torch.cat([anchors - stride / 2 for anchors, stride in zip(ours, STRIDES, strict=True)])
    assert 0 < (shifted - theirs).abs().max() <= 0.5


@pytest.mark.parametrize(("high", "low", "best"), [(0.7, 0.3, True), (0.5, 0.5, False)])
def test_anchor_labels_equal_torchvisions_matcher(high: float, low: float, best: bool) -> None:
    candidates, objects = random_boxes(3000, 0), random_boxes(12, 1)
    matcher = Matcher(high, low, allow_low_quality_matches=best)
    theirs = matcher(box_iou(objects.float(), candidates.float()))
    truth = PaddedGroundTruth(
        objects[None].float(), torch.ones(1, 12, dtype=torch.int64), torch.ones(1, 12, dtype=torch.bool),
        torch.zeros(1, 0, 4),
    )  # fmt: skip
    (labels,), (matched,) = assign_labels(candidates[None].float(), truth, high, low, allow_low_quality_matches=best)
    expected = torch.where(theirs >= 0, 1, torch.where(theirs == Matcher.BETWEEN_THRESHOLDS, IGNORE, 0))
    assert {-1, 0, 1} >= set(expected.tolist()) >= {0, 1}
    assert torch.equal(labels.long(), expected) and torch.equal(matched[labels == 1], theirs[theirs >= 0])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), DELTA_WEIGHTS])
def test_deltas_equal_torchvisions_box_coder(weights: tuple[float, float, float, float]) -> None:
    objects, anchors, coder = random_boxes(50, 0), random_boxes(50, 1), BoxCoder(weights)
    torch.testing.assert_close(
        box_ops.encode(objects, anchors, weights), coder.encode_single(objects, anchors), rtol=1e-12, atol=1e-12
    )
    deltas = torch.randn(50, 4, dtype=torch.float64) * 8  # some exceed the limit of dw and dh
    theirs = coder.decode_single(deltas, anchors)
    torch.testing.assert_close(box_ops.decode(deltas, anchors, weights), theirs, rtol=1e-12, atol=1e-9)


def test_flipped_boxes_and_masks_equal_torchvisions_transform() -> None:
    boxes = torch.tensor([[5.0, 10, 40, 60], [50, 8, 99, 50]])
    theirs = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(80, 101))
    assert torch.equal(_mirror(boxes, 101), transforms.horizontal_flip(theirs).as_subclass(Tensor))
    bitmaps = torch.rand(2, 80, 101, generator=torch.Generator().manual_seed(0)) > 0.6
    rois, objects = torch.tensor([[3.5, 9, 47, 66], [52, 11, 90, 45.25]]), torch.arange(2)

    def targets(masks: Tensor, flipped: float | None) -> Tensor:
        rles = [coco_mask.encode(mask.numpy().astype("uint8", order="F")) for mask in masks]
        truth = GroundTruth(boxes, objects + 1, rles, torch.zeros(0, 4), (1.0, 1.0), flipped)
        return compute_mask_targets(rois, objects, truth, 14)

    flipped = transforms.horizontal_flip(tv_tensors.Mask(bitmaps)).as_subclass(Tensor)
    assert torch.equal(targets(bitmaps, 101.0), targets(flipped, None))


# our layer -> torchvision's, of the same shape
LAYERS = {
    "neck.lateral.{}": "backbone.fpn.inner_blocks.{}.0",
    "neck.output.{}": "backbone.fpn.layer_blocks.{}.0",
    "rpn.conv": "rpn.head.conv.0.0",
    "rpn.score": "rpn.head.cls_logits",
    "rpn.delta": "rpn.head.bbox_pred",
    "head.mask.hidden.{0}": "roi_heads.mask_head.{1}.0",
    "head.mask.hidden.8": "roi_heads.mask_predictor.conv5_mask",
}
# initialized as in detectron2: torchvision's layer, and the standard deviations of ours and of torchvision's
DIFFERENT = {
    "head.fc6": ("roi_heads.box_head.fc6", (256 * 49) ** -0.5, (3 * 256 * 49) ** -0.5),
    "head.fc7": ("roi_heads.box_head.fc7", 1024**-0.5, (3 * 1024) ** -0.5),
    "head.box.score": ("roi_heads.box_predictor.cls_score", 0.01, (3 * 1024) ** -0.5),
    "head.box.delta": ("roi_heads.box_predictor.bbox_pred", 0.001, (3 * 1024) ** -0.5),
    "head.mask.logits": ("roi_heads.mask_predictor.mask_fcn_logits", 0.001, (2 / 91) ** 0.5),
}


def assert_distributed(values: Tensor, deviation: float, other: Tensor | None = None) -> None:
    """Values have the given standard deviation, a mean of 0, and, given others, tails as long as theirs."""
    tolerance = 4 / math.sqrt(values.numel())  # four standard errors
    assert abs(values.std() / deviation - 1) < tolerance and abs(values.mean()) < tolerance * deviation
    if other is not None:  # normal ones reach four deviations, uniform ones less than two
        assert (values.abs().max() > 2.5 * deviation) == (other.abs().max() > 2.5 * deviation)


@pytest.fixture(scope="module")
def networks() -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    torch.manual_seed(0)
    with torch.no_grad():
        ours = MaskRCNN(recipes.load("fpn-res50").with_changes(["model.norm=batch", "model.depth=18"]), 90)
        theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return dict(ours.named_modules()), dict(theirs.named_modules())


def test_initial_weights_of_the_neck_and_the_heads(networks: tuple[dict[str, nn.Module], ...]) -> None:
    ours, theirs = networks
    for pattern, other in LAYERS.items():
        every = range(4) if "{" in pattern else range(1)
        for index in every:
            layer = ours[pattern.format(2 * index if "{0}" in pattern else index)]
            their_layer = theirs[other.format(index, index)]
            if layer.weight.shape == their_layer.weight.shape:
                assert_distributed(layer.weight, float(their_layer.weight.std()), their_layer.weight)
            else:  # ours is on a ResNet-18, torchvision's on a ResNet-50
                assert pattern == "neck.lateral.{}"
                assert_distributed(layer.weight, layer.weight[0].numel() ** -0.5)
            if pattern != "head.mask.hidden.8":  # torchvision's biases of transposed convolutions are random
                assert not layer.bias.any() and not their_layer.bias.any(), pattern
    for name, (other, deviation, their_deviation) in DIFFERENT.items():
        assert_distributed(ours[name].weight, deviation)
        assert_distributed(theirs[other].weight, their_deviation)
        assert not ours[name].bias.any()


def test_initial_weights_of_the_resnet(networks: tuple[dict[str, nn.Module], ...]) -> None:
    """As in torchvision, where ``zero_init_residual`` is off by default too. Runs without the key have it on."""
    ours, theirs = networks
    for name in ("conv1", "layer2.0.conv2", "layer4.1.conv2"):
        layer, their_layer = ours[f"backbone.{name}"], theirs[f"backbone.body.{name}"]
        for weight in (layer.weight, their_layer.weight):
            assert_distributed(weight, (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5, their_layer.weight)
    norms = [module for module in ours.values() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20 and all((norm.weight == 1).all() for norm in norms)
    older = dict(MaskRCNN(small_recipe("model.zero_init_residual=true"), 3).named_modules())
    assert (older["backbone.layer1.0.bn1"].weight == 1).all() and not older["backbone.layer1.0.bn2"].weight.any()


def test_initial_weights_of_conv5_on_rois() -> None:
    """The C4 head, which torchvision does not have: He initialization and detectron2's predictors."""
    torch.manual_seed(0)
    model = MaskRCNN(small_recipe("model.width=64", "model.mask_channels=256", "model.depth=18"), 80)
    head = dict(model.head.named_modules())
    assert_distributed(head["conv5.1.conv2"].weight, (2 / (512 * 9)) ** 0.5)
    assert_distributed(head["box.score"].weight, 0.01)
    assert_distributed(head["box.delta"].weight, 0.001)
    assert_distributed(head["mask.logits"].weight, 0.001)
