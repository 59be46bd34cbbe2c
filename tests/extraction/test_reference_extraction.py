"""Features of real images by a checkpoint of the reference: extraction, a kill, exports.

What refdet writes is read without it, by h5py, pycocotools, numpy and json.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pycocotools import mask as coco_mask

from refdet.cli.main import main

pytestmark = [pytest.mark.golden, pytest.mark.slow]

IMAGES = 34  # two shards
MAX_REGIONS = 3  # per image
# the reference's network with smaller inputs and fewer proposals, to be faster
QUICK = {
    "input": {"min_sizes": [96], "max_size": 150},
    "proposals": {"pre_nms_top_n_test": 200, "post_nms_top_n_test": 4},
}
FEATURES = ("pool5", "fc7", "head")


def run(*arguments: object) -> str:
    """Run a command in this process; returns its stdout."""
    done = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an imported ResNet-50 of the reference, and an instances file of the first images of coco_mini."""
    folder = tmp_path_factory.mktemp("seed")
    sys.path.insert(0, str(shared / "seed"))
    try:
        from make_checkpoint import make_state_dict  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    torch.save(make_state_dict(50), folder / "seed.pth")
    run("import-weights", "--from", folder / "seed.pth", "--out", folder / "run")
    meta = json.loads((folder / "run" / "model.json").read_text())
    for part, changes in QUICK.items():
        meta["recipe"][part] |= changes
    (folder / "run" / "model.json").write_text(json.dumps(meta))
    instances = json.loads((shared / "data/coco_mini/annotations/instances_train2017.json").read_text())
    instances["images"] = instances["images"][:IMAGES]
    kept = {image["id"] for image in instances["images"]}
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] in kept]
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder


def extract_command(folder: Path, shared: Path, out: Path) -> list[object]:
    return [
        "extract-features", "--checkpoint", folder / "run", "--images", shared / "data/coco_mini/train2017",
        "--instances", folder / "instances.json", "--out", out, "--score-threshold", 0.3, "--lower-threshold-if-empty",
        "--max-regions", MAX_REGIONS, "--features", ",".join(FEATURES),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder: Path, shared: Path) -> Path:
    """The store of an undisturbed extraction."""
    run(*extract_command(folder, shared, folder / "whole.h5"))
    return folder / "whole.h5"


def contents(path: Path) -> dict[str, np.ndarray]:
    """All datasets of a file."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def kill_when_a_shard_is_finished(command: list[object], parts: Path) -> bool:
    """Kill an extraction once its first shard is finished; returns whether it was still running."""
    words = [sys.executable, "-m", "refdet", *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(parts.glob("[0-9]*.shard")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    return process.returncode == -signal.SIGKILL and parts.exists()


def test_a_killed_and_resumed_extraction_gives_the_same_store(folder: Path, shared: Path, whole: Path) -> None:
    out = folder / "killed.h5"
    for _ in range(4):  # it may finish before it is killed
        if kill_when_a_shard_is_finished(extract_command(folder, shared, out), folder / "killed.h5.parts"):
            break
        out.unlink()
    assert list((folder / "killed.h5.parts").glob("[0-9]*.shard")) and not out.exists()
    run(*extract_command(folder, shared, out), "--resume")
    expected, actual = contents(whole), contents(out)
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(values, actual[name], err_msg=name)
    assert "OK" in run("inspect", out, "--verify")


def test_h5py_and_pycocotools_read_the_store(whole: Path, folder: Path) -> None:
    sizes = {i["id"]: (i["height"], i["width"]) for i in json.loads((folder / "instances.json").read_text())["images"]}
    masks = 0
    with h5py.File(whole) as file:
        ids, starts = file["images/id"][:], file["images/region_start"][:]
        assert ids.tolist() == list(sizes) and (np.diff(starts) >= 1).all() and (np.diff(starts) <= MAX_REGIONS).all()
        assert "seed.pth" in json.dumps(json.loads(file.attrs["provenance"]))  # where its weights are from
        for place, image_id in enumerate(ids.tolist()):
            a, b = starts[place : place + 2]
            height, width = sizes[image_id]
            boxes, mask_starts = file["regions/box"][a:b], file["regions/mask_start"][a : b + 1]
            counts = [file["regions/mask_counts"][s:e].tobytes() for s, e in itertools.pairwise(mask_starts)]
            mask_boxes = coco_mask.toBbox([{"size": [height, width], "counts": c} for c in counts])  # xywh
            # each mask lies in its box, up to a pixel, unless it is empty
            is_empty = mask_boxes[:, 2] == 0
            mask_boxes, boxes = mask_boxes[~is_empty], boxes[~is_empty]
            assert (mask_boxes[:, :2] >= np.floor(boxes[:, :2]) - 1).all()
            assert (mask_boxes[:, :2] + mask_boxes[:, 2:] <= np.ceil(boxes[:, 2:]) + 1).all()
            masks += len(mask_boxes)
            assert file["features/pool5"][a:b].shape == (b - a, 1024) and file["features/fc7"][a:b].shape[1] == 2048
            first, last = file["maps/head_start"][place : place + 2]
            head = file["maps/head"][first:last].reshape(file["maps/head_shape"][place])
            net_height, net_width, scale = file["maps/im_info"][place]
            assert abs(net_height - height * scale) <= 1 and abs(net_width - width * scale) <= 1
            assert head.shape == (1024, -(-int(net_height) // 16), -(-int(net_width) // 16))
    assert masks > 0


def test_numpy_json_and_lmdb_read_the_exports(whole: Path, folder: Path, shared: Path) -> None:
    data = contents(whole)
    starts = data["images/region_start"]
    run("export", "--features", whole, "--format", "npz", "--out", folder / "npz")
    for place, name in enumerate(data["images/file_name"]):
        with np.load(folder / "npz" / f"{Path(name.decode()).stem}.npz", allow_pickle=True) as file:
            a, b = starts[place : place + 2]
            np.testing.assert_array_equal(file["x"], data["features/fc7"][a:b])
            assert int(file["num_bbox"]) == b - a == len(file["bbox"])
    refer = ("--refer-root", shared / "data/coco_mini/refer", "--dataset", "refcoco", "--split-by", "unc")
    run("export", "--features", whole, "--format", "mattnet", "--out", folder / "mattnet", *refer)
    dets = json.loads((folder / "mattnet/dets.json").read_text())
    with h5py.File(folder / "mattnet/det_feats.h5") as file:
        for det in dets:
            row = det["region"]
            np.testing.assert_array_equal(file["fc7"][det["h5_id"]], data["features/fc7"][row])
            x, y, w, h = det["box"]
            np.testing.assert_allclose([x, y, x + w, y + h], data["regions/box"][row], atol=0.01)
    heads = {det["image_id"] for det in dets}
    assert heads and heads == {int(path.stem) for path in (folder / "mattnet/head").iterdir()}
    lmdb = pytest.importorskip("lmdb")
    run("export", "--features", whole, "--format", "lmdb", "--out", folder / "lmdb")
    path = next(p for p in (folder / "lmdb").iterdir() if p.name != "provenance.json")
    with lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir()) as environment:
        assert environment.stat()["entries"] == IMAGES + 1  # the images and the list of keys
