"""The command import-weights, and training runs that start from imported weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_weights import Tensors, call, refused, resnet50_of_inputs, resnet_shapes
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import refdet.training.trainer as train_module
from refdet.config import recipe
from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.import_weights import import_weights, read_foreign
from refdet.errors import InputError
from refdet.structures.coco_categories import coco_categories
from refdet.structures.provenance import file_sha256
from refdet.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def resnet18() -> Tensors:
    torch.manual_seed(4)
    return models.resnet18().state_dict()


@pytest.fixture(scope="module")
def imagenet(resnet18: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of resnet18.safetensors and of `run`, the import of it."""
    folder = tmp_path_factory.mktemp("imagenet")
    save_file(resnet18, folder / "resnet18.safetensors")
    import_weights(folder / "resnet18.safetensors", folder / "run")
    yield folder


def test_the_command_reports_what_it_imported(imagenet: Path, tmp_path: Path) -> None:
    source = imagenet / "resnet18.safetensors"
    done = call("import-weights", "--from", source, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    note = f"imported: {source.name}, sha256 {file_sha256(source)}, training data unknown"
    assert (report["recipe"], report["classes"], report["provenance"]["note"]) == ("c4-res18", 80, note)
    assert report["untrained"] == ["rpn.", "head.box.", "head.mask."]
    assert (
        report["numbers"] == sum(v.numel() for k, v in read_foreign(source).items() if "fc." not in k) - 20
    )  # without num_batches_tracked
    assert f"trained on: {note}" in done.stderr and "use it as initial weights (--weights)" in done.stderr
    meta = checkpoint.load_meta(tmp_path / "run")
    assert meta.categories == coco_categories() and meta.provenance.is_unknown
    assert meta.warnings()[0] == f"detector: {note}" and "not trained" in meta.warnings()[1]
    first, again = ((folder / "run" / "model.safetensors").read_bytes() for folder in (imagenet, tmp_path))
    assert first == again
    shown = call("inspect", tmp_path / "run")
    assert shown.exit_code == 0 and note in shown.stdout
    assert json.loads(call("inspect", tmp_path / "run", "--json").stdout)["provenance"]["note"] == note
    refused(
        call("import-weights", "--from", source, "--out", tmp_path / "run"),
        f"--out {tmp_path / 'run'}: exists and is not an empty folder",
    )
    refused(call("import-weights", "--from", source, "--out", source), f"--out {source}: exists and")
    refused(call("import-weights", "--from", source, "--out", tmp_path / "b", "--weight-format", "darknet"), "darknet")
    refused(call("import-weights", "--from", source, "--out", tmp_path / "b", "--trained-on", tmp_path / "no.json"),
            "no.json", "no such file")  # fmt: skip
    refused(call("import-weights", "--from", source, "--out", tmp_path / "b", "--weight-format", "caffe"), str(source))
    assert not (tmp_path / "b").exists()


def test_damaged_safetensors_are_refused(imagenet: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((imagenet / "resnet18.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut\.safetensors: not a readable safetensors file"):
        read_foreign(path)
    save_file({"conv1.weight": torch.ones(2, dtype=torch.complex64)}, path)
    with pytest.raises(InputError, match=r"cut\.safetensors: 'conv1.weight' is not a named tensor of real numbers"):
        read_foreign(path)


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_weights_inside_a_training_checkpoint_are_imported(resnet18: Tensors, tmp_path: Path, wrap: str) -> None:
    tree = {"epoch": 3, wrap: {f"module.{name}": nn.Parameter(v.float()) for name, v in resnet18.items()}}
    torch.save(tree, tmp_path / "weights.pth", _use_new_zipfile_serialization=wrap == "model")
    found = identify_checkpoint(read_foreign(tmp_path / "weights.pth")).tensors
    assert torch.equal(found["backbone.layer2.0.conv1.weight"], resnet18["layer2.0.conv1.weight"])
    assert not found["backbone.conv1.weight"].requires_grad


SMALL = ["input.min_sizes=[64]", "head.batch_size_per_image=8", "proposals.post_nms_top_n_train=20", "train.workers=0",
         "train.batch_size=1", "train.steps=1", "model.rpn_channels=16", "model.mask_channels=8"]  # fmt: skip


def parameters(run: Path) -> Tensors:
    return checkpoint.read_tensors(run / checkpoint.MODEL)[0]


@pytest.mark.parametrize("neck", ["c4", "fpn"])
def test_training_starts_from_an_imagenet_resnet(
    imagenet: Path, resnet18: Tensors, shapes_root: Path, instances: Path, tmp_path: Path, neck: str
) -> None:
    """It takes the layers of the ResNet and trains them, except for frozen ones; the other layers are new."""
    name = "c4-res18" if neck == "c4" else "fpn-res50"
    size = ["model.depth=18", "model.fpn_channels=16", "model.fc_dim=16", "train.lr=0.001", "train.warmup_steps=0"]
    chosen = recipe.load(name).with_changes([*SMALL, *size])
    run = tmp_path / "run"
    assert train(chosen, instances, shapes_root / "val2014", run, weights=imagenet / "run", device="cpu").steps == 1
    conv5 = "head.conv5" if neck == "c4" else "backbone.layer4"
    found = parameters(run)
    for ours, theirs, frozen in (("backbone.conv1", "conv1", True), ("backbone.layer1.1.conv2", "layer1.1.conv2", True),
                                 ("backbone.layer3.1.conv1", "layer3.1.conv1", False),
                                 (f"{conv5}.0.conv1", "layer4.0.conv1", False)):  # fmt: skip
        move = (found[f"{ours}.weight"] - resnet18[f"{theirs}.weight"]).abs().max()
        assert (move == 0) if frozen else (0 < move < 0.05), ours
    assert torch.equal(found[f"{conv5}.1.bn2.running_var"], resnet18["layer4.1.bn2.running_var"])
    meta = checkpoint.load_meta(run)
    assert meta.recipe.model.norm == "frozen" and meta.untrained == ()
    assert dict(meta.categories) == CocoIndex.load(instances).categories
    weights = meta.provenance.weights
    assert weights is not None and "run (sha256 " in weights and "imported: resnet18.safetensors" in weights
    assert weights.endswith("training data unknown)")
    assert meta.warnings() == [f"detector: started from {weights}"]


def test_an_error_for_weights_of_another_format_names_the_changes(
    shapes_root: Path, instances: Path, tmp_path: Path
) -> None:
    quiet = {name: value if name.startswith(("conv1", "bn1")) or "running_var" in name else value[..., :1] * 0
             for name, value in resnet50_of_inputs(60.0).items()}  # fmt: skip
    torch.save({name: quiet[name].expand(shape) for name, shape in resnet_shapes(50).items()}, tmp_path / "res50.pth")
    run = tmp_path / "caffe"
    import_weights(tmp_path / "res50.pth", run)
    words = ["train", "--recipe", "c4-res50", "--instances", instances, "--images", shapes_root / "val2014", "--device",
             "cpu", "--weights", run, "--out", tmp_path / "run",
             *(word for change in SMALL for word in ("--set", change))]  # fmt: skip
    fix = ("--set input.order=bgr --set input.mean=[102.9801,115.9465,122.7717] --set input.std=[1.0,1.0,1.0] "
            "--set model.stride_in_1x1=true")  # fmt: skip
    done = call(*words)
    assert done.exit_code == 2
    note, error = done.stderr.splitlines()
    assert note.startswith("starts from caffe, imported: res50.pth") and note.endswith("training data unknown")
    assert error == f"error: --weights {run}: trained with other options than the recipe's; add {fix}"
    assert not (tmp_path / "run").exists()
    done = call(*words, *fix.split())
    assert done.exit_code == 0 and (tmp_path / "run" / "model.safetensors").exists(), done.output


def tiny(*changes: str) -> Recipe:
    return recipe.load("demo").with_changes(
        [*SMALL, "model.width=8", "model.fpn_channels=8", "model.fc_dim=16", "train.lr=0.05",
         "train.warmup_steps=0", "train.max_grad_norm=0", "train.checkpoint_interval=1", *changes]
    )  # fmt: skip


@pytest.fixture(scope="module")
def frcn(shapes_root: Path, instances: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frcn") / "run"
    train(tiny("model.masks=false"), instances, shapes_root / "val2014", out, device="cpu")
    return out


def test_a_faster_rcnn_starts_a_mask_rcnn(frcn: Path, shapes_root: Path, instances: Path, tmp_path: Path) -> None:
    """Loaded layers move by `pretrained_lr_mult` times the full step; those of the new mask branch by the full step."""
    moved = {}
    for rate in (0.0, 0.1, 1.0):
        out = tmp_path / str(rate)
        train(tiny(f"train.pretrained_lr_mult={rate}"), instances, shapes_root / "val2014", out, weights=frcn,
              device="cpu")  # fmt: skip
        moved[rate] = parameters(out)
    names = {name for name, _ in MaskRCNN(tiny(), 1).named_parameters()}
    masks, before = {name for name in names if "mask" in name}, parameters(frcn)
    assert masks and names - masks <= before.keys() and not masks & before.keys()
    steps = 0
    for name in names - masks:
        assert torch.equal(moved[0.0][name], before[name]), name
        full_step, tenth_of_step = (moved[rate][name] - before[name] for rate in (1.0, 0.1))
        torch.testing.assert_close(tenth_of_step, full_step * 0.1, atol=1e-6, rtol=1e-3)
        steps += bool(full_step.abs().max() > 1e-4)
    assert steps > 20
    for name in masks:
        assert torch.equal(moved[0.0][name], moved[1.0][name]), name
    torch.manual_seed(tiny().train.seed)
    start = MaskRCNN(tiny(), len(CocoIndex.load(instances).categories)).state_dict()
    assert (moved[0.0]["head.mask.logits.bias"] - start["head.mask.logits.bias"]).abs().max() > 1e-4
    torch.testing.assert_close(
        moved[0.0]["head.mask.hidden.0.weight"], start["head.mask.hidden.0.weight"], atol=0.05, rtol=0
    )


def test_a_resumed_run_with_pretrained_weights_equals_an_uninterrupted_one(
    frcn: Path, shapes_root: Path, instances: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, **more: Any) -> None:
        train(tiny("train.pretrained_lr_mult=0.1", "train.steps=2"), instances, shapes_root / "val2014", out,
              device="cpu", **more)  # fmt: skip

    run(tmp_path / "whole", weights=frcn)
    step, calls = train_module.start_step, []

    def killed(*given: Any) -> train_module.PendingStep:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "start_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halves", weights=frcn)
    assert checkpoint.load_meta(tmp_path / "halves").step == 1
    run(tmp_path / "halves", resume=True)
    whole, halves, before = (parameters(folder) for folder in (tmp_path / "whole", tmp_path / "halves", frcn))
    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name
    assert not torch.equal(whole["rpn.conv.weight"], before["rpn.conv.weight"])
