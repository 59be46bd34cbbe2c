"""Weights with NaN, inf or absurd values give an error when they are loaded, never a store without regions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_weights import Tensors, call, of_one_number, refused, resnet_shapes
from safetensors.torch import load_file, save_file

from refdet.config import recipe
from refdet.config.recipe_limits import LIMITS
from refdet.data.coco import ImageRecord
from refdet.detector import checkpoint, loading
from refdet.detector.finite import MAX_WEIGHT, find_unusable
from refdet.detector.loading import MAX_VALUES, build_on_meta, load_weights
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.predictor import describe_boxes, detect_batch
from refdet.detector.weights.identify import identify_checkpoint
from refdet.errors import InputError, RuntimeFailure
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.provenance import Provenance
from refdet.training.optim import build_optimizer
from refdet.training.pretrained import load_pretrained
from refdet.training.state import newest

TINY = recipe.load("demo").with_changes(["model.width=8", "model.fpn_channels=8", "model.fc_dim=16",
                                         "model.norm=batch", "input.min_sizes=[64]"])  # fmt: skip
META = checkpoint.CheckpointMetadata(TINY, ((1, "cat"), (5, "dog")), Provenance.imported("drawn", "0" * 64), 3)
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
RECORD = ImageRecord(id=1, file_name="a.jpg", height=64, width=80)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    checkpoint.save(folder, MaskRCNN(TINY, 2), META)
    return folder


def with_value(run: Path, out: Path, name: str, value: float) -> Path:
    shutil.copytree(run, out)
    tensors = load_file(out / checkpoint.MODEL)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, out / checkpoint.MODEL)
    return out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2 * MAX_WEIGHT])
@pytest.mark.parametrize("name", ["backbone.conv1.weight", "backbone.bn1.running_var", "rpn.score.bias",
                                  "head.fc7.weight", "head.mask.logits.weight"])  # fmt: skip
def test_weights_with_nan_inf_or_huge_values_are_refused(run: Path, tmp_path: Path, name: str, value: float) -> None:
    bad = with_value(run, tmp_path / "bad", name, value)
    with pytest.raises(InputError, match=rf"bad/model\.safetensors: {name} contains NaN, inf.* another checkpoint"):
        loading.load(bad)


def test_negative_variances_are_refused_and_large_ones_are_not(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.bn1\.running_var contains .* negative variance"):
        loading.load(with_value(run, tmp_path / "bad", "backbone.bn1.running_var", -1e-3))
    loading.load(with_value(run, tmp_path / "large", "backbone.bn1.running_var", 1e6))
    assert find_unusable({"a": torch.zeros(0), "b": torch.tensor([3]), "c": torch.tensor(1e8)}) == []


def test_weights_and_metadata_of_different_steps_are_rejected(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, out := tmp_path / "run")
    meta = replace(META, step=4)
    (out / checkpoint.META).write_text(json.dumps(meta.to_json()))  # as between the two writes of `save`
    said = r"run/model\.safetensors: has the weights of step 3, but model\.json is of step 4: .* try again"
    with pytest.raises(InputError, match=said):
        loading.load(out)
    with pytest.raises(InputError, match=said):
        load_pretrained(MaskRCNN(TINY, 2), META.categories, out)
    checkpoint.save(out, MaskRCNN(TINY, 2), meta)
    assert loading.load(out).meta.step == 4


def test_loaded_weights_equal_the_file_and_are_not_mapped_from_it(run: Path) -> None:
    loaded = loading.load(run)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert str(run / checkpoint.MODEL) not in mapped
    saved = load_file(run / checkpoint.MODEL)
    state = loaded.model.state_dict()
    assert state.keys() == saved.keys() and not any(value.is_meta for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


@pytest.mark.parametrize("name", ["rpn.score.weight", "rpn.delta.bias", "head.box.score.weight", "head.fc7.bias",
                                  "head.mask.logits.bias", "backbone.bn1.weight"])  # fmt: skip
def test_nan_in_the_outputs_is_an_error(run: Path, name: str) -> None:
    model = loading.load(run).model
    with torch.no_grad():
        model.get_parameter(name).fill_(math.nan)
    words = "outputs contain NaN or inf; check the checkpoint's weights"
    if "mask" not in name:
        with pytest.raises(RuntimeFailure, match=words):
            detect_batch(model, [IMAGE], [RECORD], [1, 5], DetectionOptions(score_threshold=0.0))
    box = np.array([[3, 4, 50, 60]], np.float32)
    if not name.startswith(("rpn", "head.box")):
        with pytest.raises(RuntimeFailure, match=words):
            describe_boxes(model, [IMAGE], [box], labels=[np.array([1])])


def test_no_store_is_written_if_the_outputs_overflow(
    run: Path, tmp_path: Path, shapes_root: Path, instances: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    tensors = load_file(run / checkpoint.MODEL)
    large = {name: value.new_full(value.shape, 9e8) if name.endswith("weight") else value
             for name, value in tensors.items()}  # fmt: skip
    save_file(large, tmp_path / "run" / checkpoint.MODEL)
    given = ("--images", shapes_root / "val2014", "--instances", instances, "--device", "cpu", "--checkpoint")
    done = call("extract-features", *given, tmp_path / "run", "--out", tmp_path / "x.h5")
    assert done.exit_code == 1 and "error: the network's outputs contain NaN or inf" in done.stderr
    assert not (tmp_path / "x.h5").exists()


def test_a_network_of_another_width_is_refused_before_it_is_allocated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")
    meta = json.loads((run / checkpoint.META).read_text())
    meta["recipe"]["model"]["width"] = 128
    (tmp_path / "run" / checkpoint.META).write_text(json.dumps(meta))
    made: list[bool] = []
    initialize = torch.nn.init.kaiming_normal_
    monkeypatch.setattr(
        torch.nn.init, "kaiming_normal_",
        lambda weight, *a, **k: (made.append(weight.is_meta), initialize(weight, *a, **k))[1],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"backbone\.conv1\.weight is \(8, 3, 7, 7\), the recipe expects \(128, 3"):
        loading.load(tmp_path / "run")
    assert made and all(made)


def test_a_network_beyond_the_size_limit_is_rejected() -> None:
    largest = {part: {} for part in ("model",)}
    for key in ("width", "fpn_channels", "fc_dim", "mask_channels", "rpn_channels"):
        largest["model"][key] = int(LIMITS[f"model.{key}"].high)
    for neck in ("c4", "fpn"):
        chosen = recipe.from_dict({"model": {**largest["model"], "depth": 152, "neck": neck}})
        with pytest.raises(InputError, match="billion parameters .* lower model.width"):
            build_on_meta(chosen, 50_000)
    assert sum(v.numel() for v in build_on_meta(recipe.load("fpn-res101"), 1203).state_dict().values()) < MAX_VALUES


def test_integer_weights_are_refused(run: Path) -> None:
    tensors = load_file(run / checkpoint.MODEL)
    tensors["rpn.score.bias"] = tensors["rpn.score.bias"].to(torch.int32)
    with pytest.raises(InputError, match=r"rpn\.score\.bias is torch\.int32, not floating point"):
        load_weights(MaskRCNN(TINY, 2), tensors, run)


def state_file(path: Path, meta: str, fresh: str = "null", momentum: float = 0.0) -> Path:
    model = MaskRCNN(TINY, 2)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors["momentum/rpn.score.bias"] = torch.full_like(model.get_parameter("rpn.score.bias"), momentum)
    checkpoint.write_tensors(path, tensors, {"meta": meta, "fresh": fresh})
    return path


GOOD = json.dumps(META.to_json())


@pytest.mark.parametrize(
    ("meta", "fresh", "message"),
    [("{", "null", "malformed JSON"), ("[" * 9999, "null", "nested too deeply"), ("[]", "null", "an object is needed"),
     (GOOD, "3", "fresh: a list of names"), (GOOD, "[1]", "fresh: a list of names"), (GOOD, "nul", "malformed JSON")],
)  # fmt: skip
def test_an_error_names_the_damaged_training_state(tmp_path: Path, meta: str, fresh: str, message: str) -> None:
    state_file(tmp_path / "state" / "step-00000003.safetensors", meta, fresh)
    with pytest.raises(InputError, match="step-00000003.safetensors: damaged .not the state of a run") as caught:
        newest(tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_momentum_with_nan_or_of_another_network_is_refused(tmp_path: Path) -> None:
    model = MaskRCNN(TINY, 2)
    path = state_file(tmp_path / "state" / "step-00000003.safetensors", GOOD, momentum=math.nan)
    state, sgd = newest(tmp_path), build_optimizer(model, TINY.train)
    assert state.meta == META and state.new_prefixes is None
    with pytest.raises(InputError, match=r"rpn\.score\.bias contains NaN or inf"):
        state.restore(model, sgd)
    state_file(path, GOOD, momentum=1e12)
    state = newest(tmp_path)
    state.restore(model, sgd)
    for wrong, message in (("rpn.score.bias", "recipe expects"), ("rpn.nothing", "not in this network")):
        others = {**state.tensors, f"momentum/{wrong}": torch.ones(())}
        with pytest.raises(InputError, match=message):
            replace(state, tensors=others).restore(model, sgd)


def test_imported_weights_with_nan_inf_or_huge_values_are_refused(tmp_path: Path) -> None:
    for value in (math.nan, 1e30):
        given: Tensors = of_one_number(resnet_shapes(18))
        given["layer4.1.bn2.running_mean"] = torch.full((512,), value)
        with pytest.raises(InputError, match=r"layer4\.1\.bn2\.running_mean contains NaN, inf"):
            identify_checkpoint(given)
    path = tmp_path / "resnet18.pth"
    torch.save({**of_one_number(resnet_shapes(18)), "bn1.weight": torch.full((64,), math.inf)}, path)
    refused(call("import-weights", "--from", path, "--out", tmp_path / "run"), str(path), "bn1.weight contains NaN")
    assert not (tmp_path / "run").exists()
