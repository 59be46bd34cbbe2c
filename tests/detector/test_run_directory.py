"""Untrusted run directories: errors say what a path is instead of one, and every field of model.json is checked."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_weights import Tensors, of_one_number, resnet_shapes
from safetensors.torch import save_file

from refdet.config import recipe
from refdet.config.recipe_limits import LIMITS, Range
from refdet.detector.checkpoint import META, MODEL, CheckpointMetadata, load_meta, run_directory
from refdet.detector.weights.import_weights import read_foreign
from refdet.errors import InputError
from refdet.structures.provenance import Provenance

GOOD = CheckpointMetadata(
    recipe.load("demo"), ((1, "cat"), (5, "dog")), Provenance.imported("drawn", "0" * 64), 3
).to_json()
RECIPE_HEADER = {
    "backbone.conv1.weight": torch.ones(1),
    "rpn.conv.weight": torch.ones(1),
    "head.box.score.weight": torch.ones(1),
}
STATE = {f"model/{name}": value for name, value in RECIPE_HEADER.items()} | {"momentum/rpn.conv.weight": torch.ones(1)}


def run_at(folder: Path, tree: Any = GOOD) -> Path:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    (folder / META).write_text(tree if isinstance(tree, str) else json.dumps(tree))
    save_file(RECIPE_HEADER, folder / MODEL)
    save_file(STATE, folder / "state" / "step-00000003.safetensors")
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def refusal_message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        run_directory(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 600 and "unexpected" not in text
    return text


def test_an_error_names_the_run_directory_to_give(tmp_path: Path) -> None:
    run = run_at(tmp_path / "runs" / "a")
    assert run_directory(run) == run_directory(run / MODEL) == run_directory(run / META) == run
    for inside in ("state", "state/step-00000003.safetensors", "metrics.jsonl"):
        assert refusal_message(run / inside).endswith(f"not a run directory, but in one; give {run}")
    assert refusal_message(tmp_path / "runs").endswith(f"no model.json there; give {run}, which is a run directory")
    run_at(tmp_path / "runs" / "b")
    assert f"give {run} or another of its 2" in refusal_message(tmp_path / "runs")
    assert "no such file or folder" in refusal_message(tmp_path / "none" / "deep")
    for address in ("https://example.org/run", "http://example.org/resnet18.pth"):
        assert "a URL; download the run directory" in refusal_message(Path(address))
        with pytest.raises(InputError, match="a URL; download the file"):
            read_foreign(Path(address))
    (tmp_path / "empty").mkdir()
    assert "no model.json there; give a run directory that `refdet train` wrote" in refusal_message(tmp_path / "empty")


def test_a_run_directory_without_weights_or_metadata_is_refused(tmp_path: Path) -> None:
    only_meta, only_model = (run_at(tmp_path / name / "run") for name in ("m", "w"))
    (only_meta / MODEL).unlink()
    (only_model / META).unlink()
    for run in (only_meta, only_model):
        (run / "state" / "step-00000003.safetensors").unlink()
    assert "no model.safetensors there, only the other half" in refusal_message(only_meta)
    assert "no model.json there, only the other half" in refusal_message(only_model)
    assert "there is no model.json next to it" in refusal_message(only_model / MODEL)


@pytest.mark.parametrize("written", [[], [MODEL]])
def test_a_run_killed_while_first_saving_its_model_asks_for_resume(tmp_path: Path, written: list[str]) -> None:
    run = run_at(tmp_path / "run")
    for name in {META, MODEL} - set(written):
        (run / name).unlink()
    assert "saved a training state but no model yet; continue it with `refdet train --resume`" in refusal_message(run)


def hdf5(path: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


def instances(path: Path) -> None:
    path.write_text('{"info": {}, "images": [], "annotations": [], "categories": []}')


def tensors(given: Tensors) -> Callable[[Path], object]:
    return lambda path: save_file(given, path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "store.h5": (hdf5, "an HDF5 file, such as a feature store"),
    "instances.json": (instances, "a COCO instances file (pass it to `instances`)"),
    "other.json": (lambda path: path.write_text("[1]"), "a JSON file"),
    "state.safetensors": (tensors(STATE), "a training state (its run directory is the folder above state/)"),
    "copy.safetensors": (tensors(RECIPE_HEADER), "the weights of a run directory (give the folder with them"),
    "damaged.safetensors": (
        lambda path: path.write_bytes(b"\x20" + bytes(7) + b"{" * 40),
        "a damaged safetensors file",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_an_error_says_what_a_file_is(tmp_path: Path, name: str) -> None:
    make, message = FILES[name]
    path = tmp_path / name
    make(path)
    assert message in refusal_message(path) and "not a run directory" in refusal_message(path)
    with pytest.raises(InputError) as caught:
        read_foreign(path)
    if "damaged" not in name:
        assert message in str(caught.value)


def test_an_error_refers_weights_of_other_programs_to_import_weights(tmp_path: Path) -> None:
    torch.save(of_one_number(resnet_shapes(18)), tmp_path / "resnet18.pth")
    (tmp_path / "strange.bin").write_bytes(b"\x01\x02\x03")
    assert "a PyTorch checkpoint (convert it with refdet import-weights)" in refusal_message(tmp_path / "resnet18.pth")
    save_file({"backbone.body.conv1.weight": torch.ones(1), "roi_heads.box_predictor.cls_score.weight": torch.ones(1)},
              tmp_path / "tv.safetensors")  # fmt: skip
    assert "a torchvision Faster R-CNN (convert it with refdet import-weights" in refusal_message(
        tmp_path / "tv.safetensors"
    )
    assert "a file, not a run directory" in refusal_message(tmp_path / "strange.bin")
    with pytest.raises(InputError, match="a run directory already; give it to `weights` or `checkpoint`"):
        read_foreign(run_at(tmp_path / "run"))
    with pytest.raises(InputError, match="the weights of a run directory .*needs no import"):
        read_foreign(tmp_path / "run" / MODEL)


def meta_with(path: str, value: Any) -> dict[str, Any]:
    tree = json.loads(json.dumps(GOOD))
    *parents, leaf = path.split(".")
    place = tree
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[leaf] = value
    return tree


def meta_without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


DEEP = "[" * 100_000
WRONG: dict[str, tuple[Any, str]] = {
    "deep": (DEEP, "nested too deeply"),
    "deep object": ('{"a":' * 100_000, "nested too deeply"),
    "NaN": (json.dumps(meta_with("step", math.nan)), "NaN is not a JSON number"),
    "too large": (json.dumps(GOOD).replace('"step": 3', '"step": 1e999'), "number 1e999 is too large"),
    "many digits": (json.dumps(GOOD).replace('"step": 3', f'"step": {"9" * 9999}'), "is too large"),
    "twice": (json.dumps(GOOD)[:-1] + ', "step": 4}', "duplicate key 'step'"),
    "no UTF-8": ("\\", "malformed JSON"),
    "half a letter": (json.dumps(meta_with("categories.0.name", "\ud800")), "not UTF-8 text"),
    "list": ("[]", "an object is needed, not []"),
    "no step": (meta_without("step"), "'step' is missing"),
    "no categories": (meta_without("categories"), "'categories' is missing"),
    "step text": (meta_with("step", "3"), "step: a number of steps is needed, not '3'"),
    "step true": (meta_with("step", True), "step: a number of steps is needed, not True"),
    "step negative": (meta_with("step", -1), "step: a number of steps"),
    "step large": (meta_with("step", 2**63), "step: a number of steps"),
    "id twice": (meta_with("categories.1.id", 1), "duplicate category id 1"),
    "id text": (meta_with("categories.0.id", "1"), "an object with a 64-bit 'id' and a 'name'"),
    "id fraction": (meta_with("categories.0.id", 1.5), "an object with a 64-bit 'id' and a 'name'"),
    "id large": (meta_with("categories.0.id", 2**63), "an object with a 64-bit 'id' and a 'name'"),
    "name number": (meta_with("categories.0.name", 3), "an object with a 64-bit 'id' and a 'name'"),
    "none": (meta_with("categories", []), "a list of 1 to 50000 is needed"),
    "an object": (meta_with("categories", {"id": 1}), "a list of 1 to 50000 is needed"),
    "too many": (meta_with("categories", [{"id": i, "name": "x"} for i in range(50_001)]), "a list of 1 to 50000"),
    "untrained all": (meta_with("untrained", [""]), "untrained: a list of rpn., head.box., head.mask. is needed"),
    "untrained text": (meta_with("untrained", "rpn."), "untrained: a list"),
    "provenance": (meta_with("provenance", 3), "provenance must be an object"),
    "hash": (meta_with("provenance.image_ids_sha256", "<script>"), "provenance: a field has the wrong type"),
    "images": (meta_with("provenance.images", -1), "provenance: a field has the wrong type"),
    "excluded": (
        meta_with("provenance.excluded", {"refcoco/unc/val": {"images": "1"}}), "'excluded' has the wrong type",
    ),
    "unknown fields": (meta_with("provenance." + "x" * 100_000, 1), "fields unknown: "),
    "recipe": (meta_with("recipe", []), "must be a mapping of options"),
    "recipe key": (meta_with("recipe.model.widht", 8), "did you mean model.width?"),
    "recipe value": (meta_with("recipe.model.width", [1]), "model.width: must be int"),
    "recipe name": (meta_with("recipe.name", "x" * 201), "name: must have 1 to 200 characters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_names_the_problem_of_model_json(tmp_path: Path, kind: str) -> None:
    tree, message = WRONG[kind]
    run = run_at(tmp_path / "run", tree)
    with pytest.raises(InputError) as caught:
        load_meta(run)
    text = str(caught.value)
    assert text.startswith(f"{run / META}: not a checkpoint's model.json (") and message in text
    assert len(text) < 1000 and "\n" not in text


def test_model_json_must_be_small_and_utf8(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", json.dumps(GOOD) + " " * 2**23)
    with pytest.raises(InputError, match=r"model\.json: larger than 8388608 bytes"):
        load_meta(run)
    (run / META).write_bytes(json.dumps(GOOD).encode().replace(b"cat", b"c\xfft"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_meta(run)
    run_at(tmp_path / "fine", meta_with("categories.0.name", "\x1b[31m\n"))
    assert load_meta(tmp_path / "fine").categories[0] == (1, "\x1b[31m\n")


FLOATS = ("model.anchor_sizes",)  # floats whose default is written as integers


@pytest.mark.parametrize("key", LIMITS)
def test_numbers_outside_their_range_are_refused(key: str) -> None:
    part, option = key.split(".")
    limits, default = LIMITS[key], getattr(getattr(recipe.Recipe(), part), option)
    lists = isinstance(default, tuple)
    whole = all(type(item) is int for item in (default if lists else (default,))) and key not in FLOATS
    for value in (limits.high * 2 + 1, limits.low - 1, 10**400, *(() if whole else (math.nan, math.inf, -math.inf))):
        given = [value] * max(len(default), 1) if lists else value
        given = [int(v) if whole else v for v in given] if lists else int(given) if whole else given
        with pytest.raises(InputError, match=rf"{part}\.{option}: ") as caught:
            recipe.from_dict({part: {option: given}})
        assert len(str(caught.value)) < 300
    if lists:
        with pytest.raises(InputError, match=rf"{part}\.{option}: "):
            recipe.from_dict({part: {option: [default[0]] * (limits.max_items + 1)}})


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    parts = dataclasses.asdict(recipe.Recipe())
    numbers = {f"{part}.{name}" for part, options in parts.items() if isinstance(options, dict)
               for name, value in options.items() if is_number(value)}  # fmt: skip
    assert numbers == set(LIMITS)


def test_an_exclusive_range_excludes_its_minimum_only() -> None:
    limits = Range(0, 1, exclusive=True)
    assert limits.high == 1
    limits.check("key", 1)
    with pytest.raises(InputError, match="^key: must be greater than 0 and at most 1, not 0$"):
        limits.check("key", 0)


def is_number(value: Any) -> bool:
    return is_number(value[0]) if isinstance(value, (list, tuple)) else type(value) in (int, float)
