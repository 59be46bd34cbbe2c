"""The reference's other networks on the embedded dataset: trained, imported, and all that follows a detector."""

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
from refdet.training.train import train
from refdet.training.trainer import Summary

pytestmark = pytest.mark.slow

SMALL = ["model.width=8", "model.rpn_channels=512", "input.min_sizes=[96]", "input.max_size=160", "train.steps=2",
         "train.batch_size=2", "train.workers=0", "train.log_every=1", "head.batch_size_per_image=16",
         "proposals.post_nms_top_n_train=50", "proposals.post_nms_top_n_test=40"]  # fmt: skip
NETWORKS = {"vgg16": vgg_weights, "mobilenet-v1": mobilenet_weights}
WIDTHS = {"vgg16": (64, VGG_HIDDEN), "mobilenet-v1": (128, 256)}
FIRST = {"vgg16": 4, "mobilenet-v1": 5}  # number of the first layer that is not frozen
HEAD = {"vgg16": "head.fc6.weight", "mobilenet-v1": "head.conv5.1.pointwise.0.weight"}


def small(name: str, *changes: str) -> Recipe:
    hidden = [f"model.fpn_hidden={VGG_HIDDEN}"] if name == "vgg16" else []
    return recipe.load(f"reference-{name}").with_changes([*SMALL, *hidden, *changes])


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def split(shapes_root: Path) -> Path:
    return shapes_root / "annotations" / "instances_train2014.json"


@pytest.fixture(scope="module")
def imported(name: str, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a checkpoint in the reference's names, whose input is made small."""
    folder = tmp_path_factory.mktemp(name)
    classes = len(CocoIndex.load(split).categories)
    torch.save(NETWORKS[name](classes), folder / "faster_rcnn_iter_1190000.pth")
    found = import_weights(folder / "faster_rcnn_iter_1190000.pth", folder / "run", trained_on=split)
    assert (found.recipe, found.classes, found.untrained) == (f"reference-{name}", classes, ())
    tree = json.loads((folder / "run" / checkpoint.META).read_text())
    tree["recipe"]["input"] |= {"min_sizes": [96], "max_size": 160}
    (folder / "run" / checkpoint.META).write_text(json.dumps(tree))
    return folder / "run"


def learn(chosen: Recipe, split: Path, out: Path, weights: Path | None = None, resume: bool = False) -> Summary:
    images = split.parents[1] / "train2014"
    return train(chosen, split, images, out, weights=weights, resume=resume, device="cpu")


def test_it_trains_on_from_an_import_and_keeps_its_first_layers(
    name: str, imported: Path, split: Path, tmp_path: Path
) -> None:
    done = learn(small(name), split, tmp_path / "run", imported)
    assert done.steps == 2 and np.isfinite(done.loss or np.nan)
    before, after = (load_file(folder / checkpoint.MODEL) for folder in (imported, tmp_path / "run"))
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    layers = {int(key.split(".")[2]) for key in moved if key.startswith("backbone.")}
    assert layers == set(range(FIRST[name], 13 if name == "vgg16" else 12))
    assert {"rpn.conv.weight", "head.box.score.weight", HEAD[name]} <= moved
    assert not [
        key for key in moved if ".1." in key and key.startswith(("backbone.layers", "head.conv5.0.depthwise.1"))
    ]


def test_from_scratch_and_resumed_it_is_the_same_run(name: str, split: Path, tmp_path: Path) -> None:
    chosen = small(name, "model.norm=batch", "train.steps=3", "train.warmup_steps=0")
    learn(chosen, split, tmp_path / "whole")
    learn(chosen.with_changes(["train.steps=2"]), split, tmp_path / "parts")
    learn(chosen, split, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / run / checkpoint.MODEL) for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_all_that_follows_a_detector(name: str, imported: Path, shapes_root: Path, tmp_path: Path) -> None:
    refer = ["--refer-root", shapes_root / "refer", "--dataset", "refcoco", "--split-by", "unc"]
    images = shapes_root / "train2014"
    done = call("extract-features", "--checkpoint", imported, "--images", images, "--out", tmp_path / "f.h5", *refer,
                "--split", "val", "--score-threshold", "0.01")  # fmt: skip
    assert done.exit_code == 0, done.output
    with store.open(tmp_path / "f.h5") as found:
        assert not found.has_masks
        regions = found.read(next(iter(found)))
        assert tuple(regions.features[feature].shape[1] for feature in ("pool5", "fc7")) == WIDTHS[name]
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
    pool5, fc7 = WIDTHS[name]
    assert f"pool5 of f.h5 has {pool5} values per region, but MAttNet's layers expect 1024" in done.stderr
    assert f"fc7 of f.h5 has {fc7} values per region" in done.stderr and "no masks.json" in done.stderr
    done = call("export-weights", "--checkpoint", imported, "--format", "torchvision", "--out", tmp_path / "x.pth")
    assert done.exit_code == 2 and "torchvision has no network with model.backbone=" in done.stderr


def test_rates_and_decays_are_the_references(name: str) -> None:
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
