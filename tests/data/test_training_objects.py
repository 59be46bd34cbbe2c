"""Which objects and images are trained on, what is said of the others, and what the hash of it all is of."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_examples import run, squares

from refdet.data.coco import CocoIndex, TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.detector.checkpoint import load_meta
from refdet.errors import InputError

Change = Callable[[dict[str, Any]], object]


def objects(tmp_path: Path, change: Change, masks: bool = True, empty: bool = False) -> TrainingObjects:
    return TrainingObjects(CocoIndex.load(squares(tmp_path, change)), masks, empty)


def crowds(*which: int) -> Change:
    def change(tree: dict[str, Any]) -> None:
        for number in which:
            tree["annotations"][number]["iscrowd"] = 1

    return change


def bare(*which: int) -> Change:
    def change(tree: dict[str, Any]) -> None:
        for number in which:
            tree["annotations"][number]["segmentation"] = (None, [])[number % 2]

    return change


def only_first(tree: dict[str, Any]) -> None:
    tree["annotations"] = tree["annotations"][:2]


@pytest.mark.parametrize(
    ("change", "empty", "records", "said"),
    [
        (lambda tree: None, False, [1, 2, 3, 4], []),
        (crowds(1), False, [1, 2, 3, 4], ["1 of 8 annotations has iscrowd 1 and is neither object nor background"]),
        (
            crowds(0, 1),
            False,
            [2, 3, 4],
            ["2 of 8 annotations have iscrowd 1", "1 of 4 images has no objects and is excluded"],
        ),
        (bare(0, 3, 7), False, [1, 2, 3, 4], ["3 of 8 objects have no segmentation"]),
        (only_first, False, [1], ["3 of 4 images have no objects and are excluded"]),
        (only_first, True, [1, 2, 3, 4], ["3 of 4 images have no objects and are used as negatives"]),
    ],
)
def test_what_is_left_out_is_counted(
    tmp_path: Path, change: Change, empty: bool, records: list[int], said: list[str]
) -> None:
    found = objects(tmp_path, change, empty=empty)
    assert [record.id for record in found.records] == records
    assert len(found.notes) == len(said)
    assert all(text in note for text, note in zip(said, found.notes, strict=True)), found.notes


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (crowds(*range(8)), r"iscrowd is 1 on all 8 annotations \(CVAT .*`crowd_as_object=True`"),
        (lambda tree: tree.update(annotations=[]), "no annotations to train on"),
        (lambda tree: tree.update(images=[], annotations=[]), "no images to train on"),
        (
            lambda tree: [a["bbox"].__setitem__(2, 0) for a in tree["annotations"]],
            "its 8 annotations cannot be used .*box has no area",
        ),
    ],
)
def test_nothing_to_train_on_says_why(tmp_path: Path, change: Change, said: str, empty: bool) -> None:
    with pytest.raises(InputError, match=said):
        objects(tmp_path, change, empty=empty)


def test_crowds_as_objects(tmp_path: Path) -> None:
    path = squares(tmp_path, crowds(*range(8)))
    index = CocoIndex.load(path, need_segmentation=True, crowd_as_object=True)
    assert not any(a["iscrowd"] for a in index.raw["annotations"])  # what is evaluated is read from there
    assert len(TrainingObjects(index, True).records) == 4
    run(tmp_path, crowd_as_object=True)
    assert "`crowd_as_object=True`" in load_meta(tmp_path / "run").provenance.note
    with pytest.raises(InputError, match="iscrowd is 1 on all"):
        run(tmp_path, resume=True)


def test_a_file_whose_objects_have_no_segmentation_is_refused_whatever_its_crowds_have(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        bare(*range(2, 8))(tree)
        crowds(0, 1)(tree)

    path = squares(tmp_path, change)
    with pytest.raises(InputError, match="its 6 objects have no segmentation; .*model.masks=false"):
        CocoIndex.load(path, need_segmentation=True)
    assert len(CocoIndex.load(path).images) == 4


def test_objects_without_a_mask_keep_their_box_and_class(tmp_path: Path) -> None:
    from training_examples import tiny

    index = CocoIndex.load(squares(tmp_path, bare(0)))
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


# What training reads of an entry, and what it does not.
READ: list[Change] = [
    lambda t: t["annotations"][3]["bbox"].__setitem__(0, 51),
    lambda t: t["annotations"][3].update(category_id=3),
    lambda t: t["annotations"][3].update(iscrowd=1),
    lambda t: t["annotations"][3]["segmentation"][0].__setitem__(0, 51),
    lambda t: t["annotations"][3].update(segmentation=None),
    lambda t: t["annotations"].pop(3),
    lambda t: t["images"][2].update(file_name="4.png"),
    lambda t: t["categories"][0].update(name="c"),
    lambda t: t["categories"].reverse(),
    lambda t: t["images"].reverse(),
]
UNREAD: list[Change] = [
    lambda t: t["annotations"][3].update(area=5),
    lambda t: t.update(info={"year": 2014}, licenses=[1]),
    lambda t: t["images"][2].update(license=4, coco_url="x"),
    lambda t: [a.update(id=a["id"] + 1000) for a in t["annotations"]],
]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(read=st.sets(st.integers(0, len(READ) - 1), max_size=1), unread=st.sets(st.integers(0, len(UNREAD) - 1)))
def test_the_hash_is_of_all_that_is_read_and_of_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, read: set[int], unread: set[int]
) -> None:
    def change(tree: dict[str, Any]) -> None:
        for number in unread:
            UNREAD[number](tree)
        for number in read:
            READ[number](tree)

    root = tmp_path_factory.mktemp("hash")
    plain = objects(root, lambda tree: None).sha256()
    assert (objects(root, change).sha256() == plain) == (not read)


def test_masks_count_only_where_they_are_trained(tmp_path: Path) -> None:
    moved = READ[3]
    assert objects(tmp_path, moved, masks=False).sha256() == objects(tmp_path, lambda t: None, masks=False).sha256()


def test_numbers_beyond_64_bits_have_a_hash(tmp_path: Path) -> None:
    tree = json.loads(squares(tmp_path).read_text())
    index = CocoIndex.load(tmp_path / "instances.json")
    plain = TrainingObjects(index, True).sha256()
    wide = copy.deepcopy(tree)
    wide["annotations"][0]["segmentation"][0][0] = 10**30
    (tmp_path / "instances.json").write_text(json.dumps(wide))
    try:
        index = CocoIndex.load(tmp_path / "instances.json")
    except InputError:
        return  # refused already
    assert TrainingObjects(index, True).sha256() != plain


def test_negatives_alone_in_a_batch_train(tmp_path: Path) -> None:
    squares(tmp_path, only_first)
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "kept.png")
    with pytest.raises(InputError, match="1 of 4 images"):
        run(tmp_path, "train.empty_images=true")
    (tmp_path / "images" / "kept.png").rename(tmp_path / "images" / "1.png")
    assert run(tmp_path, "train.empty_images=true", "train.steps=4").loss is not None  # two batches are empty
    assert load_meta(tmp_path / "run").recipe.train.empty_images
