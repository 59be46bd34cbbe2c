"""VGG-16 and MobileNet v1 on the synthetic dataset: importing, training, and every command that uses a detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_weights import call
from reference_networks import VGG_HIDDEN, mobilenet_weights, vgg_weights
from safetensors.torch import load_file

from refdet import store
from refdet.config import recipe
from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.import_weights import import_weights
from refdet.training.optim import build_optimizer
from refdet.training.summary import Summary
from refdet.training.train import train

pytestmark = pytest.mark.slow

SMALL = ["model.width=8", "model.rpn_channels=512", "input.min_sizes=[96]", "input.max_size=160", "train.steps=2",
         "train.batch_size=2", "train.workers=0", "train.log_every=1", "head.batch_size_per_image=16",
         "proposals.post_nms_top_n_train=50", "proposals.post_nms_top_n_test=40"]  # fmt: skip
NETWORKS = {"vgg16": vgg_weights, "mobilenet-v1": mobilenet_weights}
# values per region of the features pool5 and fc7
FEATURE_WIDTHS = {"vgg16": (64, VGG_HIDDEN), "mobilenet-v1": (128, 256)}
FIRST_TRAINED_LAYER = {"vgg16": 4, "mobilenet-v1": 5}  # in the backbone
TRAINED_HEAD_WEIGHT = {"vgg16": "head.fc6.weight", "mobilenet-v1": "head.conv5.1.pointwise.0.weight"}


def small(name: str, *changes: str) -> Recipe:
    """The reference's recipe for a network, made small."""
    hidden = [f"model.fc_dim={VGG_HIDDEN}"] if name == "vgg16" else []
    return recipe.load(f"reference-{name}").with_changes([*SMALL, *hidden, *changes])


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def split(shapes_root: Path) -> Path:
    return shapes_root / "annotations" / "instances_train2014.json"


@pytest.fixture(scope="module")
def imported(name: str, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory imported from random weights under the reference's names, with smaller input images."""
    folder = tmp_path_factory.mktemp(name)
    classes = len(CocoIndex.load(split).categories)
    torch.save(NETWORKS[name](classes), folder / "faster_rcnn_iter_1190000.pth")
    found = import_weights(folder / "faster_rcnn_iter_1190000.pth", folder / "run", trained_on=split)
    assert (found.recipe, found.classes, found.untrained) == (f"reference-{name}", classes, ())
    tree = json.loads((folder / "run" / checkpoint.META).read_text())
    tree["recipe"]["input"] |= {"min_sizes": [96], "max_size": 160}
    (folder / "run" / checkpoint.META).write_text(json.dumps(tree))
    return folder / "run"


def train_small(chosen: Recipe, split: Path, out: Path, weights: Path | None = None, resume: bool = False) -> Summary:
    """Train on the images of a split of the synthetic dataset."""
    images = split.parents[1] / "train2014"
    return train(chosen, split, images, out, weights=weights, resume=resume, device="cpu")


def test_training_on_imported_weights_changes_all_but_the_frozen_layers(
    name: str, imported: Path, split: Path, tmp_path: Path
) -> None:
    summary = train_small(small(name), split, tmp_path / "run", imported)
    assert summary.steps == 2 and np.isfinite(summary.loss or np.nan)
    before, after = (load_file(folder / checkpoint.MODEL) for folder in (imported, tmp_path / "run"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    layers = {int(key.split(".")[2]) for key in changed if key.startswith("backbone.")}
    assert layers == set(range(FIRST_TRAINED_LAYER[name], 13 if name == "vgg16" else 12))
    assert {"rpn.conv.weight", "head.box.score.weight", TRAINED_HEAD_WEIGHT[name]} <= changed
    # the norms of a MobileNet are frozen
    assert not [
        key for key in changed if ".1." in key and key.startswith(("backbone.layers", "head.conv5.0.depthwise.1"))
    ]


def test_a_run_from_random_weights_resumes_exactly(name: str, split: Path, tmp_path: Path) -> None:
    chosen = small(name, "model.norm=batch", "train.steps=3", "train.warmup_steps=0")
    train_small(chosen, split, tmp_path / "whole")
    train_small(chosen.with_changes(["train.steps=2"]), split, tmp_path / "parts")
    train_small(chosen, split, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / run / checkpoint.MODEL) for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_all_commands_that_use_a_detector_work(name: str, imported: Path, shapes_root: Path, tmp_path: Path) -> None:
    refer = ["--refer-root", shapes_root / "refer", "--dataset", "refcoco", "--split-by", "unc"]
    images = shapes_root / "train2014"
    done = call("extract-features", "--checkpoint", imported, "--images", images, "--out", tmp_path / "f.h5", *refer,
                "--split", "val", "--score-threshold", "0.01")  # fmt: skip
    assert done.exit_code == 0, done.output
    with store.open(tmp_path / "f.h5") as found:
        assert not found.has_masks
        regions = found.read(next(iter(found)))
        assert tuple(regions.features[feature].shape[1] for feature in ("pool5", "fc7")) == FEATURE_WIDTHS[name]
    tree = json.loads((shapes_root / "annotations" / "instances_val2014.json").read_text())
    tree["images"] = tree["images"][:4]
    ids = {image["id"] for image in tree["images"]}
    tree["annotations"] = [each for each in tree["annotations"] if each["image_id"] in ids]
    (instances := tmp_path / "few.json").write_text(json.dumps(tree))
    done = call(
        "evaluate", "--checkpoint", imported, "--instances", instances, "--images", shapes_root / "val2014", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["segm"] is None
    done = call(
        "evaluate-on-refer", "--store", tmp_path / "f.h5", *refer, "--split", "val", "--out", tmp_path / "metrics"
    )
    assert done.exit_code == 0, done.output
    done = call("audit", "--checkpoint", imported, "--refer-root", shapes_root / "refer")
    assert done.exit_code == 1 and "val" in done.stdout + done.stderr, done.output
    done = call("export", "--store", tmp_path / "f.h5", "--format", "mattnet", "--out", tmp_path / "mattnet")
    assert done.exit_code == 0, done.output
    pool5, fc7 = FEATURE_WIDTHS[name]
    assert f"pool5 of f.h5 has {pool5} values per region, but MAttNet's layers expect 1024" in done.stderr
    assert f"fc7 of f.h5 has {fc7} values per region" in done.stderr and "no masks.json" in done.stderr
    done = call("export-weights", "--checkpoint", imported, "--format", "torchvision", "--out", tmp_path / "x.pth")
    assert done.exit_code == 2 and "torchvision has no network with model.backbone=" in done.stderr


def test_learning_rates_and_weight_decay_are_the_references(name: str) -> None:
    chosen = small(name, "model.norm=frozen")
    model = MaskRCNN(chosen, 3)
    groups = {id(p): group for group in build_optimizer(model, chosen.train).param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in groups
            continue
        group, depthwise = groups[id(parameter)], ".depthwise." in key
        assert group["lr_mult"] == (2 if name == "vgg16" and key.endswith("bias") else 1), key
        assert (group["weight_decay"] == 0) == (key.endswith("bias") or depthwise), key
    decays = {group["weight_decay"] for group in groups.values()}
    assert decays == {0.0, 1e-4 if name == "vgg16" else 4e-5}
