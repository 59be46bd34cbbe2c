"""Weights of other programs: which network is identified, and the name that each tensor gets."""

from pathlib import Path

import pytest
import torch
from foreign_weights import (
    SEED_NAMES,
    of_one_number,
    resnet50_of_inputs,
    resnet_shapes,
    seed_weights,
)
from torch import nn
from torchvision import models

from refdet.config import recipe
from refdet.detector import loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import import_weights


@pytest.mark.parametrize(
    ("depth", "anchors", "masks", "name"),
    [
        (50, 12, True, "reference-c4-res50"),
        (101, 12, False, "reference-c4-res101"),
        (101, 15, True, "reference-c4-res101-lg"),
        (152, 12, True, "reference-c4-res152"),
    ],
)
def test_every_tensor_of_the_reference_is_converted(depth: int, anchors: int, masks: bool, name: str) -> None:
    given = seed_weights(depth, anchors, masks=masks)
    found = identify_checkpoint({f"module.{key}": value for key, value in given.items()})
    assert found.kind == f"the reference's {'Mask' if masks else 'Faster'} R-CNN with a ResNet-{depth}, " + (
        f"{anchors} anchors per cell"
    )
    assert (found.recipe.name, found.recipe.model.masks, found.classes, found.missing_prefixes) == (name, masks, 80, ())
    unlike = [] if masks else ["model.masks=false"]
    assert found.recipe == recipe.load(name).with_changes(unlike)
    with torch.device("meta"):
        wanted = MaskRCNN(found.recipe, 80).state_dict()
    assert found.tensors.keys() == wanted.keys()
    for ours, value in found.tensors.items():
        assert value.shape == wanted[ours].shape and value.dtype == torch.float32, ours
        if ours.startswith("rpn.score."):
            of_anchors = torch.arange(1.0, anchors + 1).reshape(-1, *[1] * (value.ndim - 1))
            assert torch.equal(value, of_anchors.expand(value.shape)), ours
            continue
        beginning, theirs = next((a, b) for a, b in SEED_NAMES if ours.startswith(a))
        assert torch.equal(value, given[theirs + ours[len(beginning) :]]), ours


def test_caffe_and_torchvision_style_are_distinguished() -> None:
    ours, caffe = identify_checkpoint(resnet50_of_inputs(1.0)), identify_checkpoint(resnet50_of_inputs(60.0))
    assert (ours.kind, caffe.kind) == (
        "an ImageNet ResNet-50 in torchvision style",
        "an ImageNet ResNet-50 in caffe style",
    )
    assert (ours.recipe.name, caffe.recipe.name) == ("c4-res50", "reference-c4-res50")
    assert (ours.recipe.input.order, ours.recipe.model.stride_in_1x1) == ("rgb", False)
    assert (caffe.recipe.input.order, caffe.recipe.model.stride_in_1x1) == ("bgr", True)
    assert ours.recipe.model.norm == caffe.recipe.model.norm == "frozen"
    assert ours.classes is None and ours.missing_prefixes == ("rpn.", "head.box.", "head.mask.")
    assert not [name for name in ours.tensors if name.startswith(ours.missing_prefixes)]
    # whoever knows better says so
    assert identify_checkpoint(resnet50_of_inputs(60.0), "torchvision").recipe.name == "c4-res50"
    assert identify_checkpoint(resnet50_of_inputs(1.0), "caffe").recipe.name == "reference-c4-res50"


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_torchvision_files_of_every_version_are_converted(depth: int) -> None:
    torch.manual_seed(2)
    old = {**of_one_number(resnet_shapes(depth)), "conv1.weight": torch.randn(64, 3, 7, 7) * 0.1}
    counts = {f"{name.removesuffix('running_var')}num_batches_tracked": torch.tensor(7)
              for name in old if name.endswith("running_var")}  # fmt: skip
    for given in ({**old, **counts}, old):
        found = identify_checkpoint(given)
        assert found.kind == f"an ImageNet ResNet-{depth} in torchvision style"
        assert (found.recipe.name, found.recipe.model.depth) == (f"c4-res{depth}", depth)
        last = "conv2" if depth == 18 else "conv3"
        assert torch.equal(found.tensors[f"head.conv5.1.{last}.weight"], old[f"layer4.1.{last}.weight"])
        assert torch.equal(found.tensors["backbone.layer3.0.downsample.0.weight"], old["layer3.0.downsample.0.weight"])


@torch.inference_mode()
def test_an_imported_resnet_computes_the_same_as_torchvisions(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = models.resnet50().eval()
    for name, norm in theirs.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(*((0.1, 0.3) if name.endswith("bn3") else (0.8, 1.2))), norm.bias.uniform_(-0.2, 0.2)
    torch.save({"epoch": 90, "state_dict": theirs.state_dict()}, tmp_path / "resnet50.pth")
    import_weights(tmp_path / "resnet50.pth", tmp_path / "run")
    ours = loading.load(tmp_path / "run").model
    images = torch.randn(2, 3, 64, 96)
    wanted = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    wanted = theirs.layer3(theirs.layer2(theirs.layer1(wanted)))
    (found,) = ours.extract_feature_maps(images)
    assert found.shape == (2, 1024, 4, 6) and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    theirs.layer4[0].conv2.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    torch.testing.assert_close(ours.head.conv5(found), theirs.layer4(wanted), atol=1e-4, rtol=1e-4)
