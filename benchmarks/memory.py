"""Benchmarks the peak memory of `extract-features` on 200 and on 2000 images, including torch and the detector.

    python benchmarks/memory.py [--images 200,2000] [--json]

A small C4 detector with random weights on synthetic images, 20 regions per image with masks, pool5, fc7 and the feature
map. Each extraction runs in a process of its own; the table shows its peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peak import peak_memory
from PIL import Image

HEIGHT, WIDTH, FILES = 120, 160, 20  # FILES: number of different images, which the instances files repeat
RECIPE_CHANGES = [  # of c4-res18
    "model.width=16",
    "model.rpn_channels=32",
    "model.mask_channels=16",
    "input.min_sizes=[120]",
    "input.max_size=200",
    "proposals.pre_nms_top_n_test=300",
    "proposals.post_nms_top_n_test=50",
    "model.norm=frozen",
]


def prepare(folder: Path, counts: list[int]) -> None:
    """Write a detector, some images, and for each count an instances file that repeats them."""
    from refdet.config import recipe as recipes
    from refdet.detector import checkpoint
    from refdet.detector.mask_rcnn import MaskRCNN
    from refdet.structures.provenance import Provenance

    recipe = recipes.load("c4-res18").with_changes(RECIPE_CHANGES)
    meta = checkpoint.CheckpointMetadata(
        recipe, ((1, "thing"), (2, "other")), Provenance.imported("drawn weights", "0" * 64), 0
    )
    checkpoint.save(folder / "run", MaskRCNN(recipe, 2), meta)
    random = np.random.default_rng(0)
    for number in range(FILES):
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{number}.jpg")
    for count in counts:
        images = [
            {"id": i, "file_name": f"{i % FILES}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, count + 1)
        ]
        tree = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
        (folder / f"{count}.json").write_text(json.dumps(tree))


def extract(folder: Path, count: int) -> None:
    """Run one extraction in this process and print its peak memory as JSON."""
    from refdet.extraction.extract import extract_features
    from refdet.extraction.image_list import ImageList
    from refdet.extraction.options import ExtractOptions

    options = ExtractOptions(score_threshold=0.0, max_regions=20, features=("pool5", "fc7", "head"))
    images = ImageList.of_instances(folder / f"{count}.json")
    done = extract_features(folder / "run", folder, folder / f"{count}.h5", images, options=options, device="cpu")
    print(
        json.dumps({"images": done.images, "regions": done.regions, "peak_bytes": peak_memory(), "bytes": done.bytes})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--images", default="200,2000", help="numbers of images, separated by commas")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # run one extraction: its folder and its images
    options = parser.parse_args()
    if options.alone:
        extract(Path(options.alone[0]), int(options.alone[1]))
        return
    counts = [int(count) for count in options.images.split(",")]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), counts)
        rows = []
        for count in counts:
            command = [sys.executable, __file__, "--alone", name, str(count)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    growth = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"] - 1
    if options.json:
        print(json.dumps({"runs": rows, "growth": growth}))
        return
    for row in rows:
        print(
            f"{row['images']:6} images  {row['regions']:7} regions  file {row['bytes'] / 2**20:7.1f} MiB  "
            f"peak {row['peak_bytes'] / 2**20:7.1f} MiB"
        )
    print(f"peak memory grows by {growth:+.1%}")


if __name__ == "__main__":
    main()
