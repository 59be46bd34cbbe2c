"""Weights under the parameter names of other programs, for tests."""

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.nn import functional as F
from torchvision import models

from refdet.cli.main import main

Tensors = dict[str, Tensor]

# prefix of a name in refdet -> prefix in the reference, longer ones first
SEED_NAMES = (
    ("head.conv5.", "resnet.layer4."), ("backbone.", "resnet."), ("rpn.conv.", "rpn_net."),
    ("rpn.score.", "rpn_cls_score_net."), ("rpn.delta.", "rpn_bbox_pred_net."), ("head.box.score.", "cls_score_net."),
    ("head.box.delta.", "bbox_pred_net."), ("head.mask.hidden.0.", "mask_up_sampling."),
    ("head.mask.logits.", "mask_pred_net."),
)  # fmt: skip


def of_one_number(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Constant tensors of these shapes, each with a different value; they are expanded, so take no memory."""
    return {name: torch.tensor((i + 1) / 1024).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def resnet_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a ResNet of torchvision before 0.3 or of Caffe, which lack ``num_batches_tracked``."""
    with torch.device("meta"):
        state = getattr(models, f"resnet{depth}")().state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def seed_weights(depth: int, anchors: int = 12, classes: int = 80, masks: bool = True) -> Tensors:
    """Weights with the names and shapes of lichengunc/mask-faster-rcnn."""
    shapes: dict[str, tuple[int, ...]] = {f"resnet.{name}": shape for name, shape in resnet_shapes(depth).items()}
    layers = {"rpn_net": (512, 1024, 3, 3), "rpn_cls_score_net": (2 * anchors, 512, 1, 1),
              "rpn_bbox_pred_net": (4 * anchors, 512, 1, 1), "cls_score_net": (classes + 1, 2048),
              "bbox_pred_net": (4 * classes + 4, 2048)}  # fmt: skip
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    if masks:
        shapes |= {"mask_up_sampling.weight": (2048, 256, 2, 2), "mask_up_sampling.bias": (256,),
                   "mask_pred_net.weight": (classes + 1, 256, 1, 1), "mask_pred_net.bias": (classes + 1,)}  # fmt: skip
    weights = of_one_number(shapes)
    # background scores come first; the object score minus the background score is 1, 2, ... for anchors 0, 1, ...
    objects = torch.arange(1.0, anchors + 1)
    weights["rpn_cls_score_net.bias"] = torch.cat((objects, 2 * objects))
    weights["rpn_cls_score_net.weight"] = torch.cat((objects, 2 * objects))[:, None, None, None].expand(-1, 512, 1, 1)
    return weights


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(done: Result, *names: str) -> None:
    """Assert that a command printed one error line that contains these texts."""
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    assert all(name in done.stderr for name in names), done.stderr


def photographs(spread: float) -> Tensor:
    """Smooth random images (4, 3, 96, 96); as in photographs, neighboring pixels are similar."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(4, 3, 12, 12), size=96, mode="bilinear") * spread


def resnet50_of_inputs(spread: float) -> Tensors:
    """A ResNet-50 whose first norm has the running variance that images of this spread produce.

    Half of its first filters have a mean of 0, as edge filters have.
    """
    torch.manual_seed(1)
    state = of_one_number(resnet_shapes(50))
    filters = torch.randn(64, 3, 7, 7) * 0.05
    filters[32:] -= filters[32:].mean((2, 3), keepdim=True)
    variance = F.conv2d(photographs(spread), filters, stride=2).var((0, 2, 3))
    return {**state, "conv1.weight": filters, "bn1.running_var": variance}
