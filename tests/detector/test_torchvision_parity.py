"""Parity with torchvision: its detectors on real images, against refdet with the same weights.

The weights are random, rescaled until activations and outputs spread like those of a trained network. To be quick, the
input has half the usual size and there is a tenth of the proposals. ``make parity`` runs all models and prints the
errors.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from parity import match_detections
from PIL import Image
from pycocotools import mask as coco_mask
from recorded_results import results_of
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops.misc import FrozenBatchNorm2d

from refdet.config import recipe as recipes
from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.optimize import optimize_for_inference
from refdet.detector.predictor import detect_batch
from refdet.detector.weights import torchvision as theirs
from refdet.detector.weights.identify import identify_checkpoint
from refdet.structures.detection_options import DetectionOptions

SIZES = {"min_size": 320, "max_size": 512, "rpn_post_nms_top_n_test": 100}
CHANGES = ["input.min_sizes=[320]", "input.max_size=512", "proposals.post_nms_top_n_test=100"]
OPTIONS = DetectionOptions(score_threshold=0.05, nms_threshold=0.5, max_regions=100)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "maskrcnn_resnet50_fpn": detection.maskrcnn_resnet50_fpn,
    "maskrcnn_resnet50_fpn_v2": detection.maskrcnn_resnet50_fpn_v2,
    "fasterrcnn_resnet50_fpn": partial(detection.fasterrcnn_resnet50_fpn, num_classes=5),
    "fasterrcnn_resnet50_fpn_v2": partial(detection.fasterrcnn_resnet50_fpn_v2, num_classes=5),
}
# standard deviations of outputs; layers of a later step depend on the outputs of the earlier ones
SPREAD = (
    {"rpn.head.cls_logits": 2.0, "rpn.head.bbox_pred": 0.2},
    {"roi_heads.box_predictor.cls_score": 3.0, "roi_heads.box_predictor.bbox_pred": 1.0},
    {"roi_heads.mask_predictor.mask_fcn_logits": 2.0},
)


@torch.no_grad()
def rescale_weights(model: nn.Module, image: Tensor) -> None:
    """Set the statistics of norms from an image, and scale the predictors until their outputs spread as in `SPREAD`."""
    torch.manual_seed(0)
    detections = model.roi_heads.detections_per_img
    model.roi_heads.detections_per_img = 10  # masks of more would take long
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.register_forward_pre_hook(set_norm_statistics)
            module.weight.copy_(1 + 0.1 * torch.randn_like(module.weight))
            module.bias.copy_(0.1 * torch.randn_like(module.bias))
    with results_of(model.backbone, "forward") as features:
        model.eval()([image])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    modules = dict(model.named_modules())
    for step in SPREAD:
        chosen = {name: spread for name, spread in step.items() if name in modules}
        with ExitStack() as recording, patch.object(model.backbone, "forward", return_value=features[0]):
            outputs = {name: recording.enter_context(results_of(modules[name], "forward")) for name in chosen}
            if chosen:
                model([image])
        for name, spread in chosen.items():
            modules[name].weight.mul_(spread / torch.cat([output.flatten() for output in outputs[name]]).std())
    model.roi_heads.detections_per_img = detections


def set_norm_statistics(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """A forward pre-hook of norms."""
    if len(inputs[0]):  # the mask branch has no input without detections
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3)))


@pytest.fixture(scope="module")
def photo(shared: Path) -> np.ndarray:
    return np.array(Image.open(shared / "seed" / "images" / "000000466137.png").convert("RGB"))


# the layers of this model are also in two of the others
THOROUGH = {"fasterrcnn_resnet50_fpn_v2": pytest.mark.thorough}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=THOROUGH.get(name, ())) for name in MODELS])
@torch.inference_mode()
def test_detections_and_masks_equal_those_of_torchvision(name: str, photo: np.ndarray) -> None:
    torch.manual_seed(1)
    network = MODELS[name](weights=None, weights_backbone=None, **SIZES)
    image = torch.from_numpy(photo).permute(2, 0, 1) / 255
    rescale_weights(network, image)
    (expected,) = network([image])
    found = identify_checkpoint(network.state_dict())
    assert found.recipe.name == ("torchvision-fpn-res50-v2" if name.endswith("v2") else "torchvision-fpn-res50")
    model = MaskRCNN(found.recipe.with_changes(CHANGES), found.classes or 0).eval()
    model.load_state_dict(found.tensors)
    record = ImageRecord(1, "a.png", *photo.shape[:2])
    for form in ("trained", "optimized"):
        model = optimize_for_inference(model) if form == "optimized" else model
        (regions,) = detect_batch(model, [photo], [record], range(1, model.classes + 1), OPTIONS)
        pairs = match_detections(
            regions.boxes, regions.category_ids, expected["boxes"].numpy(), expected["labels"].numpy()
        )
        rows, ours = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
        scores = np.abs(regions.scores[ours] - expected["scores"].numpy()[rows]).max()
        overlaps = [1.0]
        for row, our in pairs if found.recipe.model.masks else ():
            assert regions.masks is not None
            decoded = coco_mask.decode({"size": photo.shape[:2], "counts": regions.masks[our]})
            mask = expected["masks"][row, 0].numpy() >= 0.5
            overlaps.append((decoded & mask).sum() / max((decoded | mask).sum(), 1))
        print(f"{name} {form}: {len(pairs)} of {len(expected['boxes'])}, score {scores:.1e}, "
              f"mask IoU {np.mean(overlaps):.5f}, least {min(overlaps):.3f}")  # fmt: skip
        # rounding may exchange one detection for another of nearly the same score
        assert len(expected["boxes"]) == len(regions.boxes) == 100 and len(pairs) >= 99
        # a few masks of the optimized network have many cells near the threshold of 0.5
        assert scores < 2e-3 and np.mean(np.array(overlaps) > 0.99) >= (1 if form == "trained" else 0.95)
    assert found.label_order == "ids"


@pytest.mark.parametrize("height", [37, 213, 333, 426, 427, 480, 500, 612, 640])
@pytest.mark.parametrize("width", [41, 333, 427, 480, 500, 612, 640, 2000])
def test_input_sizes_equal_those_of_torchvision(height: int, width: int) -> None:
    options = recipes.load("torchvision-fpn-res50").input
    scale = min(800 / min(height, width), 1333 / max(height, width))
    resized = nn.functional.interpolate(
        torch.zeros(1, 1, height, width), scale_factor=scale, mode="bilinear", recompute_scale_factor=True
    )
    size = input_size(height, width, options)
    assert (size.height, size.width) == tuple(resized.shape[2:])


@pytest.mark.parametrize("name", MODELS)
def test_names_of_each_version_are_imported_and_exported_again(name: str) -> None:
    with torch.device("meta"):  # only its names and shapes are needed
        network = MODELS[name](weights=None, weights_backbone=None)
    state = {key: torch.rand(value.shape) for key, value in network.state_dict().items()}
    found = identify_checkpoint(state)
    exported = theirs.name_mapping(found.recipe).export(found.tensors)
    if name.endswith("v2"):  # norms of the neck and the heads were folded into biases
        exported = theirs.unfold_norms(exported)
        again = identify_checkpoint(exported)
        for key, value in found.tensors.items():
            torch.testing.assert_close(again.tensors[key], value, atol=1e-5, rtol=1e-5)
    else:
        old = {name_before_0_13(key): value for key, value in state.items()}
        assert set(old) != set(state)
        for key, value in identify_checkpoint(old).tensors.items():
            assert torch.equal(value, found.tensors[key])
        for key, value in exported.items():
            assert torch.equal(value, state[key])
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert set(state) - counters == set(exported) - counters
    network.load_state_dict(exported, strict=not counters, assign=True)


def name_before_0_13(name: str) -> str:
    """The name of a parameter before torchvision 0.13, as in the published files."""
    for index in range(4):
        name = name.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
        for part in ("inner", "layer"):
            name = name.replace(f"{part}_blocks.{index}.0.", f"{part}_blocks.{index}.")
    return name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")


def test_norms_are_converted_to_another_epsilon() -> None:
    torch.manual_seed(0)
    norm, x = FrozenBatchNorm2d(8, eps=0.0), torch.randn(2, 8, 4, 4)
    for value in norm.state_dict().values():
        value.copy_(torch.rand(8) * 1e-4 + 1e-6)
    changed = theirs.convert_eps({f"bn1.{key}": value for key, value in norm.state_dict().items()}, eps=0.0)
    usual = FrozenBatchNorm2d(8, eps=1e-5)
    usual.load_state_dict({key.removeprefix("bn1."): value for key, value in changed.items()})
    torch.testing.assert_close(usual(x), norm(x), atol=1e-4, rtol=1e-4)
