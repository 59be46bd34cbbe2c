"""Weights of detectron2 and Caffe2: reading pickles of arrays, identifying the network, and what is rejected."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_weights import Tensors, call, refused, resnet_shapes

from refdet.config import recipe as recipes
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights import detectron2
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import read_foreign
from refdet.errors import InputError


def weights(name: str, classes: int = 80, masks: bool = True) -> tuple[Tensors, Tensors]:
    """Random weights of a recipe in our names and in detectron2's, with what the model zoo's files hold besides."""
    recipe = recipes.load(name).with_changes([f"model.masks={str(masks).lower()}"])
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in MaskRCNN(recipe, classes).state_dict().items()}
    own = {key: torch.tensor((index + 1) / 1024).expand(shape) for index, (key, shape) in enumerate(shapes.items())}
    sizes = torch.arange(float(len(recipe.model.anchor_sizes) if "fpn" not in name else 1))
    ratios = torch.tensor([0.1, 0.2, 0.3])
    own["rpn.score.bias"] = (ratios[:, None] + sizes).flatten()
    own["rpn.delta.bias"] = own["rpn.score.bias"].repeat_interleave(4) + torch.arange(4.0).repeat(
        len(ratios) * len(sizes)
    )
    own["head.box.score.bias"] = torch.arange(classes + 1.0)
    for key, rows in (("head.box.delta.", 4), ("head.mask.logits.", 1)):
        for end in ("weight", "bias") if masks or "mask" not in key else ():
            own[key + end] = own[key + end].clone()
            own[key + end][:rows] = 0
    theirs = detectron2.name_mapping(recipe).export(own)
    theirs["pixel_mean"], theirs["pixel_std"] = (
        torch.tensor([103.53, 116.28, 123.675])[:, None, None],
        torch.ones(3, 1, 1),
    )
    theirs["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(15, 4)
    return own, theirs


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("d2-")])
@pytest.mark.parametrize("masks", [True, False])
def test_each_network_of_the_model_zoo_is_recognized(name: str, masks: bool) -> None:
    own, theirs = weights(name, masks=masks)
    found = identify_checkpoint(theirs)
    assert found.recipe == recipes.load(name).with_changes([f"model.masks={str(masks).lower()}"])
    assert found.classes == 80 and not found.missing_prefixes and set(found.tensors) == set(own)
    for key, value in own.items():
        assert torch.equal(found.tensors[key], value), key


def test_exported_anchors_and_classes_are_in_detectron2s_order() -> None:
    _, theirs = weights("d2-c4-res50", classes=3)
    # sizes outer, ratios inner; the background last, without boxes
    order = theirs["proposal_generator.rpn_head.objectness_logits.bias"]
    torch.testing.assert_close(order[:4], torch.tensor([0.1, 0.2, 0.3, 1.1]))
    deltas = theirs["proposal_generator.rpn_head.anchor_deltas.bias"]
    torch.testing.assert_close(deltas[:5], torch.tensor([0.1, 1.1, 2.1, 3.1, 0.2]))
    assert theirs["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 3, 0]
    assert theirs["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 2048)


def test_lvis_models_have_another_number_of_classes() -> None:
    _, theirs = weights("d2-fpn-res101", classes=1230)
    assert identify_checkpoint(theirs).classes == 1230


OTHERS = {
    "a detectron2 Keypoint R-CNN": ("roi_heads.keypoint_head.conv_fcn1.weight",),
    "a detectron2 Panoptic FPN": ("sem_seg_head.p2.0.weight",),
    "a detectron2 Cascade R-CNN": ("roi_heads.box_head.0.fc1.weight", "roi_heads.box_predictor.0.cls_score.weight"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_error_names_other_heads(tmp_path: Path, what: str) -> None:
    _, theirs = weights("d2-fpn-res50", classes=2)
    small = {key: value[:1].clone() for key, value in theirs.items()} | {key: torch.ones(1) for key in OTHERS[what]}
    torch.save({"model": small}, tmp_path / "model.pth")
    done = call("import-weights", "--from", tmp_path / "model.pth", "--out", tmp_path / "run")
    refused(done, f"{tmp_path / 'model.pth'}: {what}, which cannot be imported; supported are Mask and Faster R-CNN")


def test_an_error_names_other_norms_and_class_agnostic_boxes() -> None:
    _, theirs = weights("d2-fpn-res50", classes=3)
    for name in ("backbone.fpn_lateral2.norm.weight", "roi_heads.mask_head.mask_fcn1.norm.bias"):
        with pytest.raises(InputError, match=r"norms in its pyramid or heads \(GN or SyncBN\); supported are Mask"):
            identify_checkpoint({**theirs, name: torch.ones(256)})
    with pytest.raises(InputError, match=r"one box for all classes \(CLS_AGNOSTIC_BBOX_REG\); supported are Mask"):
        identify_checkpoint({**theirs, "roi_heads.box_predictor.bbox_pred.weight": torch.ones(4, 1024)})


def test_an_error_names_other_backbones() -> None:
    _, theirs = weights("d2-fpn-res101")
    wide = {**theirs, "backbone.bottom_up.res2.0.conv1.weight": torch.ones(256, 64, 1, 1)}
    with pytest.raises(InputError, match="ResNeXt or another width; supported are"):
        identify_checkpoint(wide)
    less = {key: value for key, value in theirs.items() if not key.startswith("backbone.bottom_up.res4.22.")}
    with pytest.raises(InputError, match="another backbone .blocks per stage: 3, 4, 22, 3."):
        identify_checkpoint(less)
    with pytest.raises(InputError, match=r"unexpected: backbone\.bottom_up\.res3\.0\.conv2_offset\.weight"):
        identify_checkpoint({**theirs, "backbone.bottom_up.res3.0.conv2_offset.weight": torch.ones(18, 128, 3, 3)})


def test_an_error_names_other_preprocessing() -> None:
    """As in models trained from torchvision's ResNets, whose strides also differ."""
    _, theirs = weights("d2-c4-res50", classes=3)
    others = {
        "pixel_mean": (
            torch.tensor([123.675, 116.28, 103.53]),
            r"\[123.675, 116.28, 103.53\], the model zoo's have \[103",
        ),
        "pixel_std": (torch.tensor([57.375, 57.12, 58.395])[:, None, None], r"\[57.375, 57.12, 58.395\], the model"),
    }
    for name, (value, message) in others.items():
        with pytest.raises(InputError, match=f"a detectron2 detector with {name} {message}"):
            identify_checkpoint({**theirs, name: value})
    for value in (torch.ones(0), torch.ones(5), torch.full((3,), torch.nan)):
        with pytest.raises(InputError, match="a detectron2 detector with pixel_mean"):
            identify_checkpoint({**theirs, "pixel_mean": value})
    identify_checkpoint({name: value for name, value in theirs.items() if not name.startswith("pixel_")})


def caffe2(depth: int) -> dict[str, np.ndarray]:
    """An ImageNet ResNet in Caffe2's names: scales and shifts, no statistics."""
    found = {"fc1000_w": np.ones((1000, 4), np.float32), "conv1_w_momentum": np.ones(1, np.float32)}
    for index, (name, shape) in enumerate(resnet_shapes(depth).items()):
        parts, value = name.split("."), np.full(shape, (index + 1) / 1024, np.float32)
        if parts[0] == "fc" or parts[-1].startswith("running"):
            continue
        end = "w" if parts[-1] == "weight" else "b"
        if parts[0] in ("conv1", "bn1"):
            found["conv1_w" if parts[0] == "conv1" else f"res_conv1_bn_{end.replace('w', 's')}"] = value
            continue
        block = f"res{int(parts[0][5:]) + 1}_{parts[1]}_branch"
        if parts[2] == "downsample":
            found[f"{block}1_w" if parts[3] == "0" else f"{block}1_bn_{end.replace('w', 's')}"] = value
        else:
            letter = "abc"[int(parts[2][-1]) - 1]
            norm = parts[2].startswith("bn")
            found[f"{block}2{letter}_bn_{end.replace('w', 's')}" if norm else f"{block}2{letter}_w"] = value
    return found


@pytest.mark.parametrize(("depth", "blobs"), [(50, True), (101, False)])
def test_imagenet_backbones_of_caffe2_are_imported(tmp_path: Path, depth: int, blobs: bool) -> None:
    arrays = caffe2(depth)
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps({"blobs": arrays} if blobs else arrays, protocol=2))
    found = identify_checkpoint(read_foreign(path))
    assert found.recipe == recipes.load(f"d2-c4-res{depth}") and found.classes is None and found.missing_prefixes
    np.testing.assert_array_equal(found.tensors["head.conv5.1.conv2.weight"], arrays["res5_1_branch2b_w"])
    np.testing.assert_array_equal(found.tensors["backbone.layer1.0.downsample.1.bias"], arrays["res2_0_branch1_bn_b"])
    assert (found.tensors["backbone.bn1.running_mean"] == 0).all() and (
        found.tensors["backbone.bn1.running_var"] == 1
    ).all()


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big endian": np.arange(6, dtype=">f8").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
    "counter": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_in_every_pickle_protocol_are_read(tmp_path: Path, protocol: int, kind: str) -> None:
    path = tmp_path / "model.pkl"
    state = {"a.weight": ARRAYS[kind], "b.bias": np.ones(2, np.float32)}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "me", "iteration": np.int64(3)}, protocol=protocol))
    found = read_foreign(path)
    assert list(found) == ["a.weight", "b.bias"]
    np.testing.assert_array_equal(found["a.weight"].numpy(), ARRAYS[kind])
    assert found["a.weight"].shape == ARRAYS[kind].shape


def bad(value: object) -> bytes:
    return pickle.dumps({"model": {"a": np.ones(2, np.float32), "b": value}}, protocol=2)


ONE = pickle.dumps(np.ones(2, np.float32), protocol=2)
REFUSED = {
    "objects": (bad(np.array([None, "x"])), "holds an array of 'O"),
    "text": (bad(np.array(["x"])), "holds an array of 'U"),
    "records": (bad(np.zeros(1, [("x", "f4")])), "holds an array of 'V"),
    "a function": (bad(print), "print', which is not a tensor and could run any code"),
    "a class": (bad(Path("x")), "which is not a tensor"),
    "too short": (ONE.replace(b"(K\x01K\x02\x85", b"(K\x01K\x03\x85"), "an array (3,) of float32 has 8 bytes"),
    "a list for a shape": (ONE.replace(b"(K\x01K\x02\x85", b"(K\x01]K\x02a"), "damaged"),
    "a far memo": (ONE[:-1] + b"r\xff\xff\xff\x7f.", "an entry 2147483647 in its memo"),
    "state of a function": (ONE[:-1] + b"c_codecs\nencode\n}b.", "a function has no state"),
    "truncated": (ONE[:-9], "damaged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pickles_of_anything_but_arrays_are_refused(tmp_path: Path, kind: str) -> None:
    code, message = REFUSED[kind]
    (tmp_path / "model.pkl").write_bytes(code)
    done = call("import-weights", "--from", tmp_path / "model.pkl", "--out", tmp_path / "run")
    refused(done, str(tmp_path / "model.pkl"), message)


def test_many_arrays_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    numeric = pytest.importorskip("numpy._core.numeric")
    content = np.ones(10_000, np.float32).tobytes()  # written once, and then taken from the memo

    class Again:
        def __reduce__(self) -> tuple[Any, ...]:
            return numeric._frombuffer, (content, np.dtype("f4"), (10_000,), "C")

    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {str(i): Again() for i in range(200)}}, 5))
    assert (tmp_path / "model.pkl").stat().st_size < 2 * len(content)
    with pytest.raises(InputError, match="it repeats itself"):
        read_foreign(tmp_path / "model.pkl")


def test_repeated_encoding_of_the_same_text_is_refused(tmp_path: Path) -> None:
    """One long text in the memo, which the file encodes to bytes 1000 times."""
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000
    start = ONE[:-1] + b"0(" + text + b"q\xf0c_codecs\nencode\nq\xf10"
    (tmp_path / "model.pkl").write_bytes(start + b"h\xf1h\xf0X\x06\x00\x00\x00latin1\x86R" * 1000 + b"l.")
    with pytest.raises(InputError, match="it repeats itself"):
        read_foreign(tmp_path / "model.pkl")


def test_ordered_dictionaries_of_python_2_are_read(tmp_path: Path) -> None:
    """Python 2 passes their items as an argument, Python 3 sets them afterwards."""

    class Python2(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            return (
                (OrderedDict, ([list(item) for item in value.items()],))
                if type(value) is OrderedDict
                else NotImplemented
            )

    arrays = OrderedDict((name, array[..., ::-1]) for name, array in caffe2(50).items())
    with (tmp_path / "R.pkl").open("wb") as file:
        Python2(file, protocol=2).dump(OrderedDict(model=arrays))
    found = read_foreign(tmp_path / "R.pkl")
    assert list(found) == list(arrays)
    np.testing.assert_array_equal(found["conv1_w"], arrays["conv1_w"])
