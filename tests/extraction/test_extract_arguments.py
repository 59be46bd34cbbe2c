"""Arguments of an extraction that are refused before anything is computed, and options that it does not use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from trained_models import trained_model
from training_examples import squares

from refdet.cli.main import main
from refdet.detector import checkpoint, loading
from refdet.errors import ArgumentError, InputError
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.structures.provenance import Provenance


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A detector of random weights, and images beside it."""
    squares(tmp_path)
    model, categories = trained_model(), ((3, "a"), (5, "b"), (7, "c"), (9, "d"))
    metadata = checkpoint.CheckpointMetadata(model.recipe, categories, Provenance.imported("x", "0" * 64), 0)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", model, metadata)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be a whole number of 1 or more, not 0"),
        ({"batch_size": -1}, "batch_size: .* not -1"),
        ({"batch_size": "4"}, "batch_size: .* not '4'"),
        ({"workers": 0}, "workers: .* not 0"),
    ],
)
def test_an_invalid_batch_size_or_number_of_workers_is_refused(
    tmp_path: Path, detector: Path, given: dict[str, Any], message: str
) -> None:
    images = ImageList.of_instances(tmp_path / "instances.json")
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        extract_features(detector, tmp_path / "images", tmp_path / "a.h5", images, device="cpu", **given)
    assert not list(tmp_path.glob("a.h5*"))


def test_an_image_list_with_duplicates_is_refused(tmp_path: Path, detector: Path) -> None:
    images = ImageList.of_instances(tmp_path / "instances.json")
    twice = replace(images, records=[*images.records, images.records[1]])
    with pytest.raises(ArgumentError, match=f"^image_list: has image {images.records[1].id} more than once$"):
        extract_features(detector, tmp_path / "images", tmp_path / "a.h5", twice, device="cpu")
    assert not list(tmp_path.glob("a.h5*"))


@pytest.mark.parametrize(
    ("options", "unused", "reason"),
    [
        (["--regions", "annotations", "--max-regions", "100"], "--max-regions", "--regions annotations"),
        (
            ["--boxes", "instances.json", "--at-least-one", "--score-threshold", "0.5", "--nms-threshold", "0.3"],
            "--score-threshold, --nms-threshold, --lower-threshold-if-empty",
            "--boxes",
        ),
        (["--regions", "annotations"], "", ""),
        (["--score-threshold", "0.5", "--lower-threshold-if-empty"], "", ""),
    ],
)
def test_unused_options_of_detections_are_reported(
    tmp_path: Path, detector: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], unused: str, reason: str
) -> None:
    squares(tmp_path, images=0)
    monkeypatch.chdir(tmp_path)
    paths = ["--checkpoint", "run", "--images", "images", "--out", "a.h5", "--instances", "instances.json"]
    done = CliRunner().invoke(main, ["extract-features", *paths, *options])
    assert done.exit_code == 2 and "instances.json: no images to extract" in done.stderr
    if unused:
        assert f"note: {unused}: for detections only, not used with {reason}\n" in done.stderr
    else:
        assert "for detections only" not in done.stderr


@pytest.mark.parametrize("replaced", ["weights", "categories"])
def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_refused(
    tmp_path: Path, detector: Path, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    load = loading.load

    def load_and_replace(path: Path, *args: Any, **kwargs: Any) -> loading.TrainedDetector:
        loaded = load(path, *args, **kwargs)
        meta = checkpoint.load_meta(path)
        if replaced == "categories":
            meta = replace(meta, categories=meta.categories[::-1])
        model = trained_model()
        if replaced == "weights":
            model.rpn.score.bias.data += 1
        checkpoint.save(path, model, meta)
        return loaded

    monkeypatch.setattr(loading, "load", load_and_replace)
    images = ImageList.of_instances(tmp_path / "instances.json")
    with pytest.raises(InputError, match="`checkpoint` .*run: was replaced while it was loaded"):
        extract_features(detector, tmp_path / "images", tmp_path / "a.h5", images, device="cpu")
    assert not list(tmp_path.glob("a.h5*"))
