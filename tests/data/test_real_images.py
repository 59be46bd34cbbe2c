"""Training, extraction and evaluation on real COCO images and refs, if these are found beside the repository."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pycocotools import mask

from refdet import store
from refdet.cli.main import main
from refdet.config import recipe
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.structures.provenance import Provenance
from refdet.training.train import train

SMALL = ["model.width=16", "input.min_sizes=[160]", "input.max_size=240", "model.rpn_channels=32",
         "model.mask_channels=16", "head.batch_size_per_image=32", "model.anchor_sizes=[8,16,32,64,128]"]  # fmt: skip


@pytest.fixture(scope="module")
def annotated(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the annotated objects of all 80 images, by an untrained network."""
    root, folder = shared / "data" / "coco_mini", tmp_path_factory.mktemp("real")
    index = CocoIndex.load(root / "annotations" / "instances_train2017.json")
    chosen = recipe.load("c4-res18").with_changes([*SMALL, "model.norm=batch"])
    model = MaskRCNN(chosen, len(index.categories))
    meta = checkpoint.CheckpointMetadata(chosen, tuple(index.categories.items()), provenance_of_instances(index), 0)
    checkpoint.save(folder / "run", model, meta)
    images = ImageList.of_instances(index.path)
    extract_features(folder / "run", root / "train2017", folder / "f.h5", images,
                     options=ExtractOptions(regions="annotations"))  # fmt: skip
    return folder / "f.h5"


def test_every_annotation_except_crowds_has_a_region(shared: Path, annotated: Path) -> None:
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
    changes = ["train.steps=36", "train.batch_size=2", "train.workers=0", "train.log_every=6", "train.lr=0.01",
               "train.warmup_steps=4"]  # fmt: skip
    chosen = recipe.load("c4-res18").with_changes([*SMALL, *changes])
    train(chosen, root / "annotations" / "instances_train2017.json", root / "train2017", tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


def test_extraction_with_imported_weights_reports_unknown_training_data(shared: Path, tmp_path: Path) -> None:
    """With the reference's recipe and MAttNet's threshold; also predicts masks of annotated objects."""
    root = shared / "data" / "coco_mini"
    tree = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    tree["images"] = tree["images"][:3]
    kept = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in kept]
    (tmp_path / "three.json").write_text(json.dumps(tree))
    changes = ["model.width=8", "model.rpn_channels=16", "model.mask_channels=8", "input.min_sizes=[160]"]
    chosen = recipe.load("reference-c4-res50").with_changes(changes)
    torch.manual_seed(0)
    categories = tuple((c["id"], c["name"]) for c in tree["categories"])
    meta = checkpoint.CheckpointMetadata(chosen, categories, Provenance.imported("seed.pth", "ab" * 32), 0)
    model = MaskRCNN(chosen, len(categories))
    with torch.no_grad():
        for parameter in model.head.box.parameters():  # type: ignore[attr-defined]  # both heads have one
            parameter.zero_()  # all 81 classes, with the background, get a score of 1 / 81
    checkpoint.save(tmp_path / "run", model, meta)
    common = ["extract-features", "--checkpoint", str(tmp_path / "run"), "--images", str(root / "train2017"),
              "--instances", str(tmp_path / "three.json")]  # fmt: skip
    source = "detector: imported: seed.pth, sha256 abab"
    run = CliRunner().invoke(
        main, [*common, "--out", str(tmp_path / "d.h5"), "--score-threshold", "0.65", "--lower-threshold-if-empty"]
    )
    assert run.exit_code == 0 and source in run.output and "training data unknown" in run.output
    with store.open(tmp_path / "d.h5") as file:
        for image_id in file:
            regions = file[image_id]
            assert len(regions) == 100
            np.testing.assert_allclose(regions.scores, 1 / 81, rtol=1e-5)
            assert (regions.boxes[:, 2:] > regions.boxes[:, :2]).all() and (regions.boxes >= 0).all()
            assert (regions.boxes <= [regions.width, regions.height] * 2).all()
    run = CliRunner().invoke(
        main, [*common, "--out", str(tmp_path / "a.h5"), "--regions", "annotations", "--masks", "predicted"]
    )
    assert run.exit_code == 0, run.output
    with store.open(tmp_path / "a.h5") as file:
        regions = file[next(iter(file))]
        areas = mask.area(regions.rles())
        sizes = (regions.boxes[:, 2:] - regions.boxes[:, :2]).prod(axis=1)
        assert (areas <= sizes * 1.1 + 4).all()
    run = CliRunner().invoke(main, [*common, "--out", str(tmp_path / "n.h5"), "--masks", "predicted"])
    assert run.exit_code == 2 and "--regions annotations" in run.output
    tree["categories"][0]["name"] = "circle"
    (tmp_path / "three.json").write_text(json.dumps(tree))
    run = CliRunner().invoke(
        main, [*common, "--out", str(tmp_path / "n.h5"), "--regions", "annotations", "--masks", "predicted"]
    )
    assert run.exit_code == 2 and "(circle), which the regions may have" in run.output
