"""The example listener learns what is planted in made-up features, and only if it is there."""

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


def scenes(folder: Path, planted: bool, images: int = 90) -> tuple[Path, Path, Path]:
    """Three regions an image, of three colors or two alike; sentences name a color, or one of two by its side."""
    rng = np.random.default_rng(0)
    objects, stores = [], {"train": [], "val": []}
    directions = rng.normal(size=(len(COLORS), 8))
    for image_id in range(1, images + 1):
        split = "train" if image_id <= images * 2 // 3 else "val"
        places = rng.permutation([5, 45, 85])
        colors = rng.choice(4, 3, replace=False)
        if twins := image_id % 2:
            colors[1] = colors[0]
        boxes = [[float(x), 20.0, float(x) + 20, 60.0] for x in places]
        for i in range(3):
            side = ""
            if twins and i < 2:
                side = "left " if places[i] == min(places[:2]) else "right "
            said = f"the {side}{COLORS[colors[i]]} one"
            x1, y1, x2, y2 = boxes[i]
            objects.append({"image_id": image_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1,
                            "split": split, "sents": (said,)})  # fmt: skip
        shown = directions[colors] if planted else np.zeros((3, 8))
        features = {name: (shown + 0.3 * rng.normal(size=(3, 8))).astype(np.float32) for name in ("pool5", "fc7")}
        stores[split].append(replace(regions(image_id, boxes), features=features))
    for split, made in stores.items():
        write_featured(folder / f"{split}.h5", made)
    return folder / "train.h5", folder / "val.h5", write_refer(folder / "refer", objects)


def write_featured(path: Path, images: list[Regions]) -> None:
    write_store(path.with_suffix(".bare"), images, masks=False)  # for its header
    with store.open(path.with_suffix(".bare")) as bare:
        header = store.Header(bare.classes, bare.recipe, bare.provenance, bare.options)
    rows = [store.ImageRow(r.image_id, r.file_name, r.height, r.width, "", len(r), 0) for r in images]
    with store.create(path, header, store.Columns(features={"pool5": (8,), "fc7": (8,)}), rows) as writer:
        for image in images:
            writer.put(image)


def accuracy(folder: Path, planted: bool, listener: ModuleType, monkeypatch: pytest.MonkeyPatch) -> float:
    train, test, root = scenes(folder, planted)
    monkeypatch.setattr(sys, "argv", ["listener.py", "--train", str(train), "--test", str(test), "--refer-root",
                                      str(root), "--refs", "toy/me", "--epochs", "12",
                                      "--out", str(folder / "a.json")])  # fmt: skip
    listener.main()
    boxes = evaluate_on_refer(test, root, "toy", "me", predictions=folder / "a.json")["splits"]["val"]["comprehension"]
    assert boxes["missing"] == 0 and boxes["random_baseline@0.5"] == pytest.approx(1 / 3)
    return boxes["accuracy@0.5"]


def test_it_learns_what_the_features_tell(
    listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accuracy(tmp_path, True, listener, monkeypatch) >= 0.85


def test_features_without_signal_teach_it_little(
    listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accuracy(tmp_path, False, listener, monkeypatch) <= 0.7


def test_same_seed_same_answers(listener: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        accuracy(tmp_path / name, True, listener, monkeypatch)
        answers.append(json.loads((tmp_path / name / "a.json").read_text()))
    assert answers[0] == answers[1]


def test_padding_changes_no_score(listener: ModuleType) -> None:
    torch.manual_seed(0)
    model = listener.Listener(words=9, features=4).eval()
    tokens, features, places = torch.tensor([[3, 4]]), torch.randn(1, 3, 4), torch.rand(1, 3, 5)
    there = torch.ones(1, 3, dtype=torch.bool)
    scores, _ = model(tokens, features, places, there)
    wide = [torch.nn.functional.pad(t, (0, 0, 0, 2), value=7.0) for t in (features, places)]
    padded, _ = model(tokens, *wide, torch.nn.functional.pad(there, (0, 2)))
    torch.testing.assert_close(padded[:, :3], scores)
    assert (padded[:, 3:] < -1e8).all()


def test_bad_input_is_told(tmp_path: Path) -> None:
    train, test, root = scenes(tmp_path, True, images=6)
    command = [sys.executable, str(SCRIPT), "--refer-root", str(root), "--refs", "toy/me", "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--train", train, "--test", train], capture_output=True, text=True)
    assert done.returncode == 2 and "share 4 images" in done.stderr and not (tmp_path / "o").exists()
