"""`examples/listener.py` learns a signal in synthetic features, and little without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from evaluate_examples import regions, write_refer, write_store
from store_examples import write_regions

from refdet import store
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "listener.py"
COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def listener() -> ModuleType:
    spec = importlib.util.spec_from_file_location("listener_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_scenes(folder: Path, with_signal: bool, images: int = 90) -> tuple[Path, Path, Path]:
    """Write a training and a test store and a REFER folder of images with three regions each.

    In every second image, two regions have the same color. A sentence gives the color of its region and, if another
    region has that color, its side.

    Args:
        folder: where to write.
        with_signal: whether the features of a region depend on its color; otherwise they are noise.
        images: number of images, of which a third are in the test store.
    """
    rng = np.random.default_rng(0)
    objects, regions_of = [], {"train": [], "val": []}
    directions = rng.normal(size=(len(COLORS), 8))
    for image_id in range(1, images + 1):
        split = "train" if image_id <= images * 2 // 3 else "val"
        lefts = rng.permutation([5, 45, 85])
        colors = rng.choice(4, 3, replace=False)
        if twins := image_id % 2:
            colors[1] = colors[0]
        boxes = [[float(x), 20.0, float(x) + 20, 60.0] for x in lefts]
        for i in range(3):
            side = ""
            if twins and i < 2:
                side = "left " if lefts[i] == min(lefts[:2]) else "right "
            sentence = f"the {side}{COLORS[colors[i]]} one"
            x1, y1, x2, y2 = boxes[i]
            objects.append({"image_id": image_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1,
                            "split": split, "sents": (sentence,)})  # fmt: skip
        means = directions[colors] if with_signal else np.zeros((3, 8))
        features = {name: (means + 0.3 * rng.normal(size=(3, 8))).astype(np.float32) for name in ("pool5", "fc7")}
        regions_of[split].append(replace(regions(image_id, boxes), features=features))
    for split, images_of_split in regions_of.items():
        write_store_with_features(folder / f"{split}.h5", images_of_split)
    return folder / "train.h5", folder / "val.h5", write_refer(folder / "refer", objects)


def write_store_with_features(path: Path, images: list[Regions]) -> None:
    write_store(path.with_suffix(".bare"), images, masks=False)  # its header is copied
    with store.open(path.with_suffix(".bare")) as bare:
        header = store.Header(bare.classes, bare.recipe, bare.provenance, bare.options)
    write_regions(path, images, header, store.Columns(features={"pool5": (8,), "fc7": (8,)}))


def train_and_evaluate(folder: Path, with_signal: bool, listener: ModuleType, monkeypatch: pytest.MonkeyPatch) -> float:
    """Train the listener, and return its accuracy on the test store."""
    train, test, root = write_scenes(folder, with_signal)
    monkeypatch.setattr(sys, "argv", ["listener.py", "--train", str(train), "--test", str(test), "--refer-root",
                                      str(root), "--refs", "toy/me", "--epochs", "12",
                                      "--out", str(folder / "a.json")])  # fmt: skip
    listener.main()
    metrics = evaluate_on_refer(test, root, "toy", "me", predictions=folder / "a.json")
    comprehension = metrics["splits"]["val"]["comprehension"]
    assert comprehension["missing"] == 0 and comprehension["random_baseline@0.5"] == pytest.approx(1 / 3)
    return comprehension["accuracy@0.5"]


def test_it_learns_colors_and_sides_from_features(
    listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_and_evaluate(tmp_path, True, listener, monkeypatch) >= 0.85


def test_it_learns_little_from_features_without_signal(
    listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_and_evaluate(tmp_path, False, listener, monkeypatch) <= 0.7


def test_the_same_seed_gives_the_same_answers(
    listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_and_evaluate(tmp_path / name, True, listener, monkeypatch)
        answers.append(json.loads((tmp_path / name / "a.json").read_text()))
    assert answers[0] and answers[0] == answers[1]


def test_padding_does_not_change_scores(listener: ModuleType) -> None:
    torch.manual_seed(0)
    model = listener.Listener(words=9, features=4).eval()
    tokens, features, places = torch.tensor([[3, 4]]), torch.randn(1, 3, 4), torch.rand(1, 3, 5)
    is_region = torch.ones(1, 3, dtype=torch.bool)
    scores, _ = model(tokens, features, places, is_region)
    wide = [torch.nn.functional.pad(t, (0, 0, 0, 2), value=7.0) for t in (features, places)]
    padded, _ = model(tokens, *wide, torch.nn.functional.pad(is_region, (0, 2)))
    torch.testing.assert_close(padded[:, :3], scores)
    assert (padded[:, 3:] < -1e8).all()


def test_training_and_test_stores_that_share_images_are_an_error(tmp_path: Path) -> None:
    train, test, root = write_scenes(tmp_path, True, images=6)
    command = [sys.executable, str(SCRIPT), "--refer-root", str(root), "--refs", "toy/me", "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--train", train, "--test", train], capture_output=True, text=True)
    assert done.returncode == 2 and "share 4 images" in done.stderr and not (tmp_path / "o").exists()
