"""Names in other programs' weights: duplicate tensors, and the category of each label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_weights import of_one_number, resnet_shapes

from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex
from refdet.detector.weights import detectron2
from refdet.detector.weights.conversion import ConvertedWeights, LabelOrder
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import label_categories
from refdet.errors import InputError

SOURCE = Path("weights.pth")


DUPLICATES = [  # two names of the same tensor, then names by which the program is identified
    ("module.conv1.weight", "conv1.weight"),
    ("rpn.head.conv.weight", "rpn.head.conv.0.0.weight", "backbone.body.conv1.weight"),
    ("backbone.fpn.inner_blocks.2.bias", "backbone.fpn.inner_blocks.2.0.bias", "backbone.body.conv1.weight"),
    ("res4_11_branch2b_w", "res4.11.conv2.weight", "stem.conv1.weight", "res2.0.conv1.weight"),
    ("stem.conv1.weight", "conv1.weight", "res2.0.conv1.weight"),
]


@pytest.mark.parametrize("names", DUPLICATES)
def test_two_names_of_the_same_tensor_are_refused(names: tuple[str, ...]) -> None:
    """Whichever is used, the detector could be a mixture of two."""
    with pytest.raises(InputError, match=f"^{names[0]} and {names[1]} are the same tensor of the network; save"):
        identify_checkpoint(dict.fromkeys(names, torch.ones(1)))


def test_caffe2s_classifier_is_dropped_under_either_name() -> None:
    tensors = {name: torch.ones(1) for name in ("fc1000_w", "fc1000_b", "pred_b", "stem.fc.weight", "conv1_w")}
    assert list(detectron2.to_torchvision_names(tensors)) == ["conv1.weight"]


def test_names_of_data_parallel_models_are_imported() -> None:
    plain = of_one_number(resnet_shapes(18))
    parallel = identify_checkpoint({f"module.{name}": value for name, value in plain.items()}).tensors
    assert parallel.keys() == identify_checkpoint(plain).tensors.keys()


def detector_weights(classes: int, label_order: LabelOrder) -> ConvertedWeights:
    return ConvertedWeights("a detector", Recipe(), classes, {}, (), label_order)


def instances(path: Path, ids: list[int]) -> CocoIndex:
    categories = [{"id": id_, "name": f"class {id_}"} for id_ in ids]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return CocoIndex.load(path)


@pytest.mark.parametrize(
    ("label_order", "classes", "ids", "expected"),
    [
        ("file", 3, [7, 2, 5], [7, 2, 5]),
        ("ascending_ids", 3, [7, 2, 5], [2, 5, 7]),
        ("ids", 3, [3, 1, 2], [1, 2, 3]),
        ("ids", 4, [4, 2], [1, 2, 3, 4]),
        ("ids", 3, [7, 2, 5], [7, 2, 5]),
        ("ids", 3, [0, 2, 1], [0, 2, 1]),
        ("ids", 90, [44, 3], list(range(1, 91))),
    ],
)
def test_labels_get_categories_in_the_order_of_the_program(
    tmp_path: Path, label_order: LabelOrder, classes: int, ids: list[int], expected: list[int]
) -> None:
    """detectron2 sorts the categories of a file by id; torchvision's labels are the ids, if they can be."""
    categories = label_categories(
        detector_weights(classes, label_order), SOURCE, instances(tmp_path / "instances.json", ids)
    )
    assert [id_ for id_, _ in categories] == expected
    assert all(name == (f"class {id_}" if id_ in ids else f"N/A {id_}") for id_, name in categories)


@pytest.mark.parametrize(("label_order", "classes"), [("ids", 5), ("file", 5), ("ascending_ids", 90)])
def test_an_instances_file_with_another_number_of_categories_is_rejected(
    tmp_path: Path, label_order: LabelOrder, classes: int
) -> None:
    index = instances(tmp_path / "instances.json", [1, 2, 3])
    with pytest.raises(InputError, match=rf"instances\.json: 3 categories, weights\.pth has {classes}"):
        label_categories(detector_weights(classes, label_order), SOURCE, index)
    with pytest.raises(InputError, match=rf"weights\.pth: {classes} classes instead of COCO's 80; give `trained_on`"):
        label_categories(detector_weights(classes, label_order), SOURCE, None)


def test_labels_get_cocos_categories_without_a_file() -> None:
    assert len(label_categories(detector_weights(80, "ascending_ids"), SOURCE, None)) == 80
    by_id = dict(label_categories(detector_weights(90, "ids"), SOURCE, None))
    assert (by_id[90], by_id[12]) == ("toothbrush", "N/A 12") and len(by_id) == 90
