"""TrainingObjects: which objects and images are trained on, the notes about the others, and the hash of all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_examples import Change, mark_crowds, run, squares, tiny

from refdet.data.coco import CocoIndex, TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.detector.checkpoint import load_meta
from refdet.errors import InputError


def objects(tmp_path: Path, change: Change, masks: bool = True, empty: bool = False) -> TrainingObjects:
    return TrainingObjects(CocoIndex.load(squares(tmp_path, change)), masks, empty)


def remove_segmentations(*indices: int) -> Change:
    """Replace segmentations by null or an empty list, in turn."""

    def change(tree: dict[str, Any]) -> None:
        for index in indices:
            tree["annotations"][index]["segmentation"] = [] if index % 2 else None

    return change


def keep_annotations_of_first_image(tree: dict[str, Any]) -> None:
    tree["annotations"] = tree["annotations"][:2]


@pytest.mark.parametrize(
    ("change", "empty", "records", "messages"),
    [
        (lambda tree: None, False, [1, 2, 3, 4], []),
        (
            mark_crowds(1),
            False,
            [1, 2, 3, 4],
            ["1 of 8 annotations has iscrowd 1 and is neither object nor background"],
        ),
        (
            mark_crowds(0, 1),
            False,
            [2, 3, 4],
            ["2 of 8 annotations have iscrowd 1", "1 of 4 images has no objects and is excluded"],
        ),
        (remove_segmentations(0, 3, 7), False, [1, 2, 3, 4], ["3 of 8 objects have no segmentation"]),
        (keep_annotations_of_first_image, False, [1], ["3 of 4 images have no objects and are excluded"]),
        (
            keep_annotations_of_first_image,
            True,
            [1, 2, 3, 4],
            ["3 of 4 images have no objects and are used as negatives"],
        ),
    ],
)
def test_ignored_objects_and_images_are_counted(
    tmp_path: Path, change: Change, empty: bool, records: list[int], messages: list[str]
) -> None:
    found = objects(tmp_path, change, empty=empty)
    assert [record.id for record in found.records] == records
    assert len(found.notes) == len(messages)
    assert all(text in note for text, note in zip(messages, found.notes, strict=True)), found.notes


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mark_crowds(*range(8)), r"iscrowd is 1 on all 8 annotations \(CVAT .*`crowd_as_object=True`"),
        (lambda tree: tree.update(annotations=[]), "no annotations to train on"),
        (lambda tree: tree.update(images=[], annotations=[]), "no images to train on"),
        (
            lambda tree: [a["bbox"].__setitem__(2, 0) for a in tree["annotations"]],
            "its 8 annotations cannot be used .*box has no area",
        ),
    ],
)
def test_the_error_says_why_there_is_nothing_to_train_on(
    tmp_path: Path, change: Change, message: str, empty: bool
) -> None:
    with pytest.raises(InputError, match=message):
        objects(tmp_path, change, empty=empty)


def test_crowd_as_object_trains_on_crowds_and_is_recorded(tmp_path: Path) -> None:
    path = squares(tmp_path, mark_crowds(*range(8)))
    index = CocoIndex.load(path, need_segmentation=True, crowd_as_object=True)
    assert not any(a["iscrowd"] for a in index.raw["annotations"])  # evaluation reads index.raw
    assert len(TrainingObjects(index, True).records) == 4
    run(tmp_path, crowd_as_object=True)
    assert "`crowd_as_object=True`" in load_meta(tmp_path / "run").provenance.note
    with pytest.raises(InputError, match="iscrowd is 1 on all"):
        run(tmp_path, resume=True)


def test_objects_without_segmentation_are_refused_even_if_crowds_have_one(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        remove_segmentations(*range(2, 8))(tree)
        mark_crowds(0, 1)(tree)

    path = squares(tmp_path, change)
    with pytest.raises(InputError, match="its 6 objects have no segmentation; .*model.masks=false"):
        CocoIndex.load(path, need_segmentation=True)
    assert len(CocoIndex.load(path).images) == 4


def test_objects_without_a_mask_keep_their_box_and_class(tmp_path: Path) -> None:
    index = CocoIndex.load(squares(tmp_path, remove_segmentations(0)))
    batches = TrainingBatches(index, ImageSource.open(tmp_path / "images"), tiny())
    seen = 0
    for step in range(2):
        batch = batches[step]
        assert isinstance(batch, Batch)
        for image, truth in zip(batch.image_ids, batch.targets, strict=True):
            assert len(truth.boxes) == len(truth.labels) == 2 and truth.masks is not None
            assert [mask is None for mask in truth.masks] == [image == 1, False]
            seen += 1
    assert seen == 4


def move_a_polygon(tree: dict[str, Any]) -> None:
    tree["annotations"][3]["segmentation"][0][0] = 51


# Changes to fields that training reads, and to fields that it does not.
USED_BY_TRAINING: list[Change] = [
    lambda t: t["annotations"][3]["bbox"].__setitem__(0, 51),
    lambda t: t["annotations"][3].update(category_id=3),
    lambda t: t["annotations"][3].update(iscrowd=1),
    move_a_polygon,
    lambda t: t["annotations"][3].update(segmentation=None),
    lambda t: t["annotations"].pop(3),
    lambda t: t["images"][2].update(file_name="4.png"),
    lambda t: t["categories"][0].update(name="c"),
    lambda t: t["categories"].reverse(),
    lambda t: t["images"].reverse(),
]
UNUSED_BY_TRAINING: list[Change] = [
    lambda t: t["annotations"][3].update(area=5),
    lambda t: t.update(info={"year": 2014}, licenses=[1]),
    lambda t: t["images"][2].update(license=4, coco_url="x"),
    lambda t: [a.update(id=a["id"] + 1000) for a in t["annotations"]],
]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    read=st.sets(st.integers(0, len(USED_BY_TRAINING) - 1), max_size=1),
    unread=st.sets(st.integers(0, len(UNUSED_BY_TRAINING) - 1)),
)
def test_the_hash_changes_with_what_training_reads_and_with_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, read: set[int], unread: set[int]
) -> None:
    def change(tree: dict[str, Any]) -> None:
        for number in unread:
            UNUSED_BY_TRAINING[number](tree)
        for number in read:
            USED_BY_TRAINING[number](tree)

    root = tmp_path_factory.mktemp("hash")
    plain = objects(root, lambda tree: None).sha256()
    assert (objects(root, change).sha256() == plain) == (not read)


def test_the_hash_ignores_masks_if_they_are_not_trained(tmp_path: Path) -> None:
    plain = objects(tmp_path, lambda tree: None, masks=False).sha256()
    assert objects(tmp_path, move_a_polygon, masks=False).sha256() == plain


def test_numbers_beyond_64_bits_are_hashed_or_refused(tmp_path: Path) -> None:
    def widen_box(tree: dict[str, Any]) -> None:
        tree["annotations"][0]["bbox"][2] = 10**30

    def move_point_far_away(tree: dict[str, Any]) -> None:
        tree["annotations"][0]["segmentation"][0][0] = 10**30

    assert objects(tmp_path, widen_box).sha256() != objects(tmp_path, lambda tree: None).sha256()
    with pytest.raises(InputError, match=r"a polygon reaches 1e\+30"):
        objects(tmp_path, move_point_far_away)


def test_batches_without_any_object_can_be_trained_on(tmp_path: Path) -> None:
    squares(tmp_path, keep_annotations_of_first_image)
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "kept.png")
    with pytest.raises(InputError, match="1 of 4 images"):
        run(tmp_path, "train.empty_images=true")
    (tmp_path / "images" / "kept.png").rename(tmp_path / "images" / "1.png")
    # Two of the four batches have no objects.
    assert run(tmp_path, "train.empty_images=true", "train.steps=4").loss is not None
    assert load_meta(tmp_path / "run").recipe.train.empty_images
