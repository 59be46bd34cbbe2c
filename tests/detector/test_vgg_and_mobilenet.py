"""The reference's other networks: VGG-16 against torchvision's layers, MobileNet v1 against its formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_networks import (
    MOBILENET_WIDTH,
    VGG_HIDDEN,
    VGG_WIDTH,
    Tensors,
    crop_and_max,
    mobilenet_layers,
    mobilenet_weights,
    torchvision_vgg,
    vgg_weights,
)
from torch import Tensor
from torchvision.ops import roi_align

from refdet.config import recipe
from refdet.detector import loading
from refdet.detector.backbone_channels import network_name
from refdet.detector.feature_names import check_features
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.optimize import optimize_for_inference
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import import_weights
from refdet.errors import ArgumentError, InputError
from refdet.structures import known_weights
from refdet.structures.box_convention import InputSize
from refdet.structures.known_weights import IMAGENET, KnownFile
from refdet.structures.provenance import file_sha256

BOXES = torch.tensor([[3.0, 5, 60, 90], [0, 0, 140, 104], [100.5, 20.25, 130, 33], [90, 60, 139, 103]])  # inclusive
SIZE = InputSize(105, 141, 1.0, 1.0, 105, 141)


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(0, 60, (1, 3, 105, 141)).astype(np.float32))


def detector(weights: Tensors, form: str, weight_format: str | None = None) -> MaskRCNN:
    found = identify_checkpoint(weights, weight_format)
    assert found.classes is not None and not found.missing_prefixes
    model = loading.build_on_meta(found.recipe, found.classes)
    loading.load_weights(model, found.tensors, Path("weights"))
    model.to(memory_format=torch.channels_last).eval()
    return optimize_for_inference(model) if form == "optimized" else model


def features_of(model: MaskRCNN, names: tuple[str, ...] = ("pool5", "fc7", "class_prob")) -> dict[str, Tensor]:
    half_open = BOXES + torch.tensor([0.0, 0, 1, 1])
    return model.extract_features(images(), [SIZE], [half_open], features=names).features


@pytest.mark.parametrize("form", ["trained", "optimized"])
@torch.inference_mode()
def test_a_vgg_equals_torchvisions_layers(form: str) -> None:
    weights, theirs = vgg_weights(), torchvision_vgg()
    model = detector(weights, form)
    assert model.recipe.name == "reference-vgg16" and not model.recipe.model.masks
    expected = theirs.features[:-1](images())
    (found,) = model.extract_feature_maps(images())
    assert found.shape == (1, 8 * VGG_WIDTH, 6, 8) and expected.std() > 0.1  # rounded down
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    cells = crop_and_max(expected, BOXES)
    fc7 = theirs.classifier[:-1](cells.flatten(1))
    probabilities = (fc7 @ weights["cls_score_net.weight"].T + weights["cls_score_net.bias"]).softmax(1)
    features = features_of(model, ("pool5", "fc7", "class_prob", "spatial_pool5"))
    assert fc7.std() > 0.1 and features["fc7"].shape == (4, VGG_HIDDEN)
    torch.testing.assert_close(features["spatial_pool5"], cells, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(features["pool5"], cells.mean((2, 3)), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(features["fc7"], fc7, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(features["class_prob"], probabilities, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", ["trained", "optimized"])
@pytest.mark.parametrize(("weight_format", "eps"), [(None, 1e-5), ("tf-faster-rcnn", 1e-3)])
@torch.inference_mode()
def test_a_mobilenet_equals_its_formulas(form: str, weight_format: str | None, eps: float) -> None:
    weights = mobilenet_weights(counters=weight_format is None)
    model = detector(weights, form, weight_format)
    assert model.recipe.name == "reference-mobilenet-v1" and network_name(model.recipe.model).endswith("of width 8")
    expected = mobilenet_layers(weights, images(), range(12), eps)
    (found,) = model.extract_feature_maps(images())
    assert found.shape == (1, 512 * MOBILENET_WIDTH // 32, 7, 9) and expected.std() > 0.1  # rounded up
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if form == "trained":  # another epsilon gives other features
        other = mobilenet_layers(weights, images(), range(12), 1e-5 if eps == 1e-3 else 1e-3)
        assert (other - expected).abs().max() > 5e-3
    cells = crop_and_max(expected, BOXES)
    fc7 = mobilenet_layers(weights, cells, range(12, 14), eps).mean((2, 3))
    features = features_of(model)
    torch.testing.assert_close(features["pool5"], cells.mean((2, 3)), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(features["fc7"], fc7, atol=2e-4, rtol=2e-4)
    assert fc7.std() > 0.1 and features["class_prob"].shape == (4, 5)


@torch.inference_mode()
def test_weights_of_current_pytorch_faster_rcnn_use_roi_align() -> None:
    model = detector(vgg_weights(), "trained", "pytorch-faster-rcnn")
    (x,) = model.extract_feature_maps(images())
    rois = torch.cat((torch.zeros(4, 1), BOXES), dim=1)
    expected = roi_align(x, rois, 7, 1 / 16, sampling_ratio=0, aligned=False)
    found = features_of(model, ("spatial_pool5",))["spatial_pool5"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (
        features_of(detector(vgg_weights(), "trained"), ("spatial_pool5",))["spatial_pool5"] - expected
    ).std() > 0.05


@pytest.mark.parametrize("weights", [vgg_weights, mobilenet_weights])
def test_every_tensor_is_imported(weights: type[Tensors]) -> None:
    given = weights(classes=20, anchors=9)
    found = identify_checkpoint({f"module.{name}": value for name, value in given.items()})
    assert found.classes == 20 and found.recipe.model.anchor_sizes == (128, 256, 512)
    own = {tuple(value.flatten()[:3].tolist()) for value in found.tensors.values()}
    kept = [name for name in given if not name.endswith("num_batches_tracked") and "rpn_cls" not in name]
    assert all(tuple(given[name].flatten()[:3].tolist()) in own for name in kept)
    background, objects = given["rpn_cls_score_net.weight"].chunk(2)
    assert torch.equal(found.tensors["rpn.score.weight"], objects - background)
    assert len(found.tensors) == len(kept) + 2


WRONG = {
    "masks": (vgg_weights() | {"mask_pred_net.bias": torch.ones(5)}, "a VGG-16 with a mask branch"),
    "missing": ({n: v for n, v in vgg_weights().items() if "classifier.3" not in n}, "missing: vgg.classifier.3.bias"),
    "unexpected": (vgg_weights() | {"vgg.classifier.6.bias": torch.ones(3)}, "unexpected: vgg.classifier.6.bias"),
    "anchors": (vgg_weights(anchors=15), "15 anchors per cell with a vgg match no recipe"),
    "width": (mobilenet_weights() | {"mobilenet.Conv2d_0.0.weight": torch.ones(0, 3, 3, 3)}, "model.width: must be"),
    "no axis": (mobilenet_weights() | {"mobilenet.Conv2d_0.0.weight": torch.ones(())}, "model.width: must be"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_names_the_wrong_tensor(kind: str) -> None:
    weights, message = WRONG[kind]
    with pytest.raises(InputError) as refusal:
        identify_checkpoint(weights)
    assert message in str(refusal.value), str(refusal.value)


def test_a_weight_format_of_other_networks_is_refused() -> None:
    with pytest.raises(InputError, match="`weight_format` caffe: .* for which only tf-faster-rcnn and"):
        identify_checkpoint(vgg_weights(), "caffe")
    with pytest.raises(InputError, match="`weight_format` tf-faster-rcnn: the tensors do not have the names"):
        identify_checkpoint(torchvision_vgg().state_dict(), "tf-faster-rcnn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.masks=true"], "model.masks: must be false with model.backbone=vgg16"),
        (["model.neck=fpn", "model.pooling=align"], "model.backbone: vgg16 and mobilenet_v1 need model.neck=c4"),
        (["model.backbone=vgg19"], "model.backbone"),
    ],
)
def test_recipes_that_the_backbone_does_not_support_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.load("reference-vgg16").with_changes(changes)


def test_a_vgg_has_no_spatial_fc7() -> None:
    check_features(["pool5", "fc7", "spatial_pool5", "head"], recipe.load("reference-vgg16"))
    check_features(["spatial_fc7"], recipe.load("reference-mobilenet-v1"))
    with pytest.raises(ArgumentError, match="a VGG-16 has no 'spatial_fc7'"):
        check_features(["spatial_fc7"], recipe.load("reference-vgg16"))


def test_the_format_of_a_known_file_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torchvision_vgg().state_dict(), tmp_path / "vgg16.pth")
    with pytest.raises(InputError, match="vgg16.pth: an ImageNet VGG-16, whose tensors do not show its preprocessing"):
        import_weights(tmp_path / "vgg16.pth", tmp_path / "run")
    known = KnownFile("somebody's vgg16", IMAGENET, weight_format="torchvision")
    monkeypatch.setitem(known_weights._TORCHVISION, file_sha256(tmp_path / "vgg16.pth")[:8], known)
    found = import_weights(tmp_path / "vgg16.pth", tmp_path / "run")
    assert found.kind == "an ImageNet VGG-16 in torchvision style" and found.provenance.training_set is IMAGENET


def test_imagenet_weights_of_vgg_and_mobilenet_are_imported() -> None:
    theirs = torchvision_vgg().state_dict()
    with pytest.raises(InputError, match="`weight_format='torchvision'` for torchvision's, `weight_format='caffe'`"):
        identify_checkpoint(theirs)
    ours = identify_checkpoint(theirs, "torchvision")
    assert ours.kind == "an ImageNet VGG-16 in torchvision style" and ours.recipe.input.order == "rgb"
    assert ours.missing_prefixes == ("rpn.", "head.box.", "head.mask.")
    assert torch.equal(ours.tensors["backbone.convs.12.bias"], theirs["features.28.bias"])
    assert torch.equal(ours.tensors["head.fc7.weight"], theirs["classifier.3.weight"])
    numbers = {
        "classifier.0": "classifier.1",
        "classifier.3": "classifier.4",
    }  # numbering with a flatten layer first, for Caffe's weights
    caffe = {numbers.get(name[:12], name[:12]) + name[12:]: value for name, value in theirs.items()}
    found = identify_checkpoint(caffe)
    assert found.kind == "an ImageNet VGG-16 in caffe style" and found.recipe.input.order == "bgr"
    assert torch.equal(found.tensors["head.fc6.bias"], theirs["classifier.0.bias"])
    mobile = {n.replace("mobilenet.", "features."): v for n, v in mobilenet_weights().items() if n[0] == "m"}
    last = identify_checkpoint({**mobile, "classifier.weight": torch.ones(10, 256)})
    assert last.kind == "an ImageNet MobileNet v1 in caffe style"
    own = last.tensors["head.conv5.1.pointwise.0.weight"]
    assert torch.equal(own, mobile["features.Conv2d_13.pointwise.0.weight"])
