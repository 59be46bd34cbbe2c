"""Real COCO images with real refs, where they lie beside the repository."""

import json
from pathlib import Path

import numpy as np
import pytest

from refdet import checkpoint, recipe, store
from refdet.data.coco import CocoIndex
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.evaluate.refer import evaluate_on_refer
from refdet.extract import ExtractOptions, ImageList, extract_features
from refdet.provenance import Provenance
from refdet.train import train

SMALL = ["model.width=16", "input.short_sides=[160]", "input.long_side=240", "model.rpn_channels=32",
         "model.mask_channels=16", "head.samples=32", "model.anchor_sizes=[8,16,32,64,128]"]  # fmt: skip


@pytest.fixture(scope="module")
def annotated(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the annotated objects of all 80 images, by an untrained network."""
    root, folder = shared / "data" / "coco_mini", tmp_path_factory.mktemp("real")
    index = CocoIndex.load(root / "annotations" / "instances_train2017.json")
    chosen = recipe.load("c4-res18").with_changes([*SMALL, "model.norm=batch"])
    model = MaskRCNN(chosen, len(index.categories))
    meta = checkpoint.Meta(chosen, tuple(index.categories.items()), Provenance.of_instances(index), 0)
    checkpoint.save(folder / "run", model, meta)
    images = ImageList.of_instances(index.path)
    extract_features(folder / "run", root / "train2017", folder / "f.h5", images, ExtractOptions(regions="annotations"))
    return folder / "f.h5"


def test_every_annotation_but_the_crowds_has_its_region(shared: Path, annotated: Path) -> None:
    tree = json.loads((shared / "data" / "coco_mini" / "annotations" / "instances_train2017.json").read_text())
    truth = {a["id"]: a for a in tree["annotations"] if not a["iscrowd"]}
    assert len(tree["annotations"]) == 739 and len(truth) == 731
    seen = {}
    with store.open(annotated) as file:
        for image_id in file:
            regions = file[image_id]
            assert regions.ann_ids is not None
            for ann_id, box, category in zip(regions.ann_ids, regions.boxes, regions.category_ids, strict=True):
                seen[int(ann_id)] = box
                assert truth[int(ann_id)]["image_id"] == image_id
                assert truth[int(ann_id)]["category_id"] == category
            assert np.isfinite(regions.features["fc7"]).all() and np.isfinite(regions.features["pool5"]).all()
    assert seen.keys() == truth.keys()
    for ann_id, box in seen.items():
        x, y, w, h = truth[ann_id]["bbox"]
        np.testing.assert_allclose(box, [x, y, x + w, y + h], atol=0.02)


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_annotated_regions_cover_every_referent(
    shared: Path, annotated: Path, tmp_path: Path, dataset: str, split_by: str
) -> None:
    found = evaluate_on_refer(annotated, shared / "data" / "coco_mini" / "refer", dataset, split_by)
    assert found["splits"]
    for values in found["splits"].values():
        assert values["refs"] > 0
        assert values["referent_recall"]["0.9"] == values["referent_recall"]["with_category@0.5"] == 1.0


def test_training_on_real_images_lowers_the_loss(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "coco_mini"
    changes = ["train.steps=24", "train.batch_size=2", "train.workers=0", "train.log_every=6", "train.lr=0.01",
               "train.warmup_steps=4"]  # fmt: skip
    chosen = recipe.load("c4-res18").with_changes([*SMALL, *changes])
    train(chosen, root / "annotations" / "instances_train2017.json", root / "train2017", tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
