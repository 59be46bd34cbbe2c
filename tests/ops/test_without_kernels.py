"""The whole pipeline with REFDET_NO_EXT=1: training and extraction give the same results as with the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from refdet import store
from refdet.cli.main import main
from refdet.ops._library import DEVICES

pytestmark = pytest.mark.slow

# With other seeds, rounding swaps two proposals, or two detections, of nearly equal scores.
RECIPE = ["model.width=8", "model.rpn_channels=16", "model.mask_channels=8", "input.min_sizes=[96]",
          "input.max_size=160", "model.fpn_channels=16", "model.fc_dim=32", "train.steps=4", "train.log_every=1",
          "train.batch_size=4", "proposals.post_nms_top_n_test=40", "train.seed=3"]  # fmt: skip


COMMANDS = """
import json, sys
from click.testing import CliRunner
from refdet.cli.main import main
for words in json.load(sys.stdin):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
"""


def run_with_kernels(commands: list[list[str]]) -> None:
    """Run command lines in this process, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for words in commands:
            done = CliRunner().invoke(main, words)
            assert done.exit_code == 0, done.output
    finally:
        torch.set_num_threads(before)


def run_without_kernels(commands: list[list[str]]) -> None:
    """Run command lines in another process, without the kernels."""
    environment = {**os.environ, "REFDET_NO_EXT": "1", "OMP_NUM_THREADS": "1"}
    given = json.dumps(commands)
    subprocess.run([sys.executable, "-c", COMMANDS], input=given, text=True, check=True, env=environment)


@pytest.fixture(scope="module")
def outputs(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with a run and a store, by whether they were made with the kernels."""
    found = {}
    for kernels, run in ((True, run_with_kernels), (False, run_without_kernels)):
        out = found[kernels] = tmp_path_factory.mktemp("kernels" if kernels else "plain")
        instances = shapes_root / "annotations" / "instances_val2014.json"
        given = ("--instances", instances, "--images", shapes_root / "val2014")
        changes = [part for change in RECIPE for part in ("--set", change)]
        # both extract with the detector trained with the kernels, so that only the extraction differs
        checkpoint = found[True] / "run"
        commands = (
            ["train", "--recipe", "demo", *given, "--out", out / "run", *changes],
            ["extract-features", "--checkpoint", checkpoint, *given, "--out", out / "a.h5",
             "--score-threshold", "0.01", "--max-regions", "20"],
        )  # fmt: skip
        run([list(map(str, words)) for words in commands])
    return found


@pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
def test_training_losses_are_the_same(outputs: dict[bool, Path]) -> None:
    losses = []
    for out in outputs.values():
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
def test_extracted_regions_are_the_same(outputs: dict[bool, Path]) -> None:
    with store.open(outputs[True] / "a.h5") as ours, store.open(outputs[False] / "a.h5") as plain:
        assert ours.regions > len(ours) and list(ours) == list(plain)
        for image_id in ours:
            a, b = ours[image_id], plain[image_id]
            np.testing.assert_array_equal(a.category_ids, b.category_ids)
            np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
            for name in ("pool5", "fc7"):
                np.testing.assert_allclose(a.features[name], b.features[name], rtol=1e-3, atol=1e-5)
            assert a.masks is not None and b.masks is not None
            same = [x == y for x, y in zip(a.masks, b.masks, strict=True)]
            assert not same or np.mean(same) > 0.9
