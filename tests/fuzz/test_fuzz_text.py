"""Lists, instances, refs, predictions, boxes and plans, damaged at random: read, or a one-line error."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluate_examples import regions, write_grefer, write_refer, write_store
from fuzzing import change_bytes, change_tree, fuzz
from split_examples import coco, write_refs
from store_examples import HEADER, PLAN

from refdet import store
from refdet.data.coco import CocoIndex, TrainingObjects
from refdet.evaluation import tables, targets
from refdet.evaluation.language import load_expressions
from refdet.evaluation.predictions import load_predictions
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.extraction.boxes_from_file import load_boxes
from refdet.files.strict_json import strict_json
from refdet.splits.build import build_split
from refdet.splits.held_out import held_out
from refdet.splits.inspect import describe
from refdet.splits.leak_audit import audit
from refer import REFER

pytestmark = pytest.mark.slow

OBJECTS = [
    {"image_id": 1, "bbox": [10, 10, 40, 30], "category_id": 1, "split": "val"},
    {"image_id": 2, "bbox": [0, 0, 50, 50], "category_id": 2, "split": "testA"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_refer(tmp_path / "refer", OBJECTS)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    path = tmp_path / "f.h5"
    write_store(path, [regions(1, [[10, 10, 50, 40], [0, 0, 9, 9]]), regions(2, [[0, 0, 50, 50]])], masks=False)
    return path


def damaged_json_writer(path: Path, tree: Any) -> Callable[[random.Random], None]:
    """A function that writes a JSON value with changed parts or, one time in four, changed bytes."""
    text = json.dumps(tree).encode()

    def write(rng: random.Random) -> None:
        if rng.random() < 0.25:
            path.write_bytes(change_bytes(text, rng))
        else:
            path.write_bytes(json.dumps(change_tree(tree, rng)).encode("utf-8", "surrogatepass"))

    return write


LISTS: dict[str, Any] = {
    "instances": coco([1, 2, 9], [1, 2, 9]),
    "list": [{"id": 9, "image": ["a/000000000002.jpg", "b.jpg"]}, 7, "9.jpg", {"coco_id": 4, "url": "VG_100K/1.jpg"}],
    "object": {"info": {"a": 1}, "train": [{"image_id": 9}], "val": {"000000000009.jpg": [{"caption": "a cat"}]}},
}


@pytest.mark.parametrize("kind", LISTS)
def test_damaged_lists_are_never_split_with_leaks(root: Path, tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / "list.json", tmp_path / "out" / "out.json"

    def work() -> None:
        for path in (out, out.with_name("out.report.json")):
            path.unlink(missing_ok=True)
        audit(source, root)
        build_split(source, root, out)
        assert audit(out, root).leaked == []

    fuzz(damaged_json_writer(source, LISTS[kind]), work, tmp_path)


def test_damaged_json_lines_are_never_split_with_leaks(root: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "list.jsonl", tmp_path / "out" / "out.jsonl"
    lines = "".join(json.dumps({"filename": f"{n:012d}.jpg", "detection": {"a": [n]}}) + "\n" for n in (2, 9, 1))

    def change(rng: random.Random) -> None:
        source.write_bytes(change_bytes(lines.encode(), rng))

    def work() -> None:
        for path in (out, out.with_name("out.report.json")):
            path.unlink(missing_ok=True)
        audit(source, root)
        build_split(source, root, out)
        assert audit(out, root).leaked == []

    fuzz(change, work, tmp_path)


def test_damaged_training_instances_have_boxes_with_area(tmp_path: Path) -> None:
    tree = coco([1, 2, 9], [1, 2, 9])
    tree["annotations"][0] |= {"segmentation": [[0, 0, 5, 0, 5, 5]], "iscrowd": 0, "area": 12.5}
    tree["annotations"][1] |= {"segmentation": {"size": [9, 9], "counts": [40, 41]}, "iscrowd": 1}
    source = tmp_path / "instances.json"

    def work() -> None:
        index = CocoIndex.load(source)
        for records in index.annotations.values():
            for annotation in records:
                assert annotation.box[0] < annotation.box[2] and annotation.box[1] < annotation.box[3]
        describe(source)
        TrainingObjects(index, masks=True).sha256()

    fuzz(damaged_json_writer(source, tree), work, tmp_path)


def test_damaged_refs(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})
    write_refer(tmp_path / "toys", OBJECTS)
    for path, work in (
        (root / "refcoco" / "refs(unc).p", lambda: held_out(root)),
        (tmp_path / "toys" / "toy" / "refs(me).p", lambda: REFER(tmp_path / "toys", "toy", "me")),
    ):
        data = path.read_bytes()
        tree = pickle.loads(data)

        def change(rng: random.Random, path: Path = path, data: bytes = data, tree: Any = tree) -> None:
            if rng.random() < 0.5:
                path.write_bytes(change_bytes(data, rng))
            else:
                path.write_bytes(pickle.dumps(change_tree(tree, rng), protocol=rng.choice((0, 2, 4))))

        fuzz(change, work, tmp_path, 100)


def test_damaged_predictions_and_expressions(root: Path, features: Path, tmp_path: Path) -> None:
    index = CocoIndex.load(root / "toy" / "instances.json")
    refer = REFER(root, "toy", "me")
    images = {sent_id: index.images[ref["image_id"]] for sent_id, ref in refer.sentToRef.items()}
    sent_ids = list(images)
    tree = [
        {"sent_id": sent_ids[0], "region": 0}, {"sent_id": sent_ids[1], "box": [10, 10, 40, 30]},
        {"sent_id": sent_ids[2], "segmentation": {"size": [100, 120], "counts": [6000, 6000]}},
        {"sent_id": sent_ids[3], "ranked_boxes": [[0, 0, 50, 50], [1, 1, 9, 9]]},
    ]  # fmt: skip
    source = tmp_path / "predictions.json"
    with store.open(features) as opened:
        fuzz(damaged_json_writer(source, tree), lambda: load_predictions(source, opened, images), tmp_path)
    expressions = [{"ref_id": 0, "sent": "the cat"}, {"ref_id": 1, "sent": "left"}]
    fuzz(damaged_json_writer(source, expressions), lambda: load_expressions(source, refer.Refs.keys()), tmp_path)


def test_damaged_grefs(tmp_path: Path) -> None:
    root = write_grefer(tmp_path / "refer", OBJECTS, [(1, [0], "val"), (2, [1], "testA"), (2, [], "testA")])
    path = root / "toy" / "grefs(me).json"

    def work() -> None:
        refer = REFER(root, "toy", "me")
        for ref in refer.data["refs"]:
            targets.objects_of(refer, ref)

    fuzz(damaged_json_writer(path, json.loads(path.read_text())), work, tmp_path)


@pytest.mark.parametrize("kind", ["refs", "instances", "predictions"])
def test_evaluate_on_refer_with_a_damaged_input(root: Path, features: Path, tmp_path: Path, kind: str) -> None:
    answers = [{"sent_id": n, "region": n // 10} for n in (0, 1)] + [
        {"sent_id": 10, "box": [0, 0, 50, 50]}, {"sent_id": 11, "box": [0, 0, 50, 49]},
    ]  # fmt: skip
    files = {"refs": root / "toy" / "refs(me).p", "instances": root / "toy" / "instances.json"}
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(answers))
    if kind == "refs":
        tree = pickle.loads(files[kind].read_bytes())

        def change(rng: random.Random) -> None:
            files["refs"].write_bytes(pickle.dumps(change_tree(tree, rng), protocol=2))

    else:
        source = files.get(kind, predictions)
        change = damaged_json_writer(source, json.loads(source.read_text()))

    def work() -> None:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        tables.write(out, evaluate_on_refer(features, root, "toy", "me", predictions=predictions), "<svg/>")
        strict_json((out / "metrics.json").read_bytes())

    fuzz(change, work, tmp_path)


def test_damaged_boxes(root: Path, tmp_path: Path) -> None:
    index = CocoIndex.load(root / "toy" / "instances.json")
    tree = [
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5},
        {"image_id": 2, "category_id": 2, "bbox": [1, 2, 30, 40.5]},
    ]
    with_masks = [entry | {"segmentation": {"size": [100, 120], "counts": [6000, 6000]}} for entry in tree]
    source = tmp_path / "boxes.json"
    for boxes in (tree, with_masks):

        def work() -> None:
            for record in index.images.values():
                load_boxes(source, index).for_image(record)

        fuzz(damaged_json_writer(source, boxes), work, tmp_path, 100)


def test_damaged_plans(tmp_path: Path) -> None:
    folder = tmp_path / "f.h5.parts"
    folder.mkdir()
    plan = PLAN.to_json([], HEADER)
    fuzz(damaged_json_writer(folder / "plan.json", plan), lambda: describe(folder), tmp_path)
