"""Small instances files, refs, run directories and images for tests of splits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from refdet.structures.provenance import Provenance

Refs = dict[tuple[str, str], list[tuple[int, str]]]


def write_refs(root: Path, refs: Refs) -> Path:
    """Write refs files of (image id, split) pairs below a root, by dataset and split-by."""
    for (dataset, split_by), pairs in refs.items():
        (root / dataset).mkdir(parents=True, exist_ok=True)
        records = [
            {"ref_id": n, "ann_id": n, "category_id": 1, "image_id": image, "split": split, "sentences": []}
            for n, (image, split) in enumerate(pairs)
        ]
        (root / dataset / f"refs({split_by}).p").write_bytes(pickle.dumps(records, protocol=2))
    return root


def coco(ids: list[int], owners: list[int], names: dict[int, str] | None = None) -> dict[str, Any]:
    """An instances file with unknown keys, which must be kept.

    Args:
        ids: ids of the images.
        owners: image id of each annotation.
        names: file names of images, by id; the others are named as in COCO.
    """
    named = {i: f"COCO_train2014_{i:012d}.jpg" for i in ids} | (names or {})
    return {
        "info": {"description": "d\u00e9j\u00e0 vu"},
        "licenses": [{"id": 4}],
        "extra": {"kept": [1.5, None]},
        "images": [{"id": i, "height": 9, "width": 9, "file_name": named[i], "x": i} for i in ids],
        "annotations": [
            {"id": n, "image_id": owner, "category_id": 1, "bbox": [0, 0, 0.1 + n, 5], "y": [n]}
            for n, owner in enumerate(owners)
        ],
        "categories": [{"id": 1, "name": "dog", "z": 1}],
    }


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))
    return path


def write_run_directory(folder: Path, provenance: Provenance | dict[str, Any] | None) -> Path:
    """Write a run directory of step 5 with a single tensor, which is all that an audit needs."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    recorded = provenance.to_json() if isinstance(provenance, Provenance) else provenance
    model = {"recipe": {}, "categories": [], "step": 5, "provenance": recorded}
    (folder / "model.json").write_text(json.dumps(model))
    return folder


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A synthetic image of colored patches, different for every seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
