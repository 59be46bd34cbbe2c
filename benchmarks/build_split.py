"""Benchmarks `refdet build-split` and `audit` on a file as large as COCO's instances_train2014.json: time and memory.

    python benchmarks/build_split.py [--json] [--repeat 3] [--images 82783] [--annotations 604907] [--folder DIR]

The file is synthetic, with the keys of the real one in the same order, polygons of similar lengths with two decimals,
and one crowd in a hundred annotations; it has about the size of the real one, 330 MB. Refs of RefCOCO, RefCOCO+ and
RefCOCOg cover the published numbers of images per split. Each command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# (dataset, split_by) -> number of images in each split
SPLITS = {
    ("refcoco", "unc"): {"train": 16994, "val": 1500, "testA": 750, "testB": 750},
    ("refcoco+", "unc"): {"train": 16992, "val": 1500, "testA": 750, "testB": 750},
    ("refcocog", "umd"): {"train": 21899, "val": 1300, "test": 2600},
}


def draw(path: Path, images: int, annotations: int, seed: int = 0) -> np.ndarray:
    """Write the instances file to ``path``; returns its image ids (images,)."""
    random = np.random.default_rng(seed)
    ids = random.choice(581_929, images, replace=False) + 1
    owners = np.sort(random.integers(0, images, annotations))
    corners = np.clip(random.gamma(1.6, 15.0, annotations).astype(int), 4, 400)
    with path.open("w", encoding="utf-8") as file:
        info = {"description": "drawn for a benchmark", "url": "http://mscoco.org", "version": "1.0", "year": 2014}
        licenses = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}]
        file.write(f'{{"info": {json.dumps(info)}, "images": [')
        file.write(", ".join(json.dumps(_image(int(image_id))) for image_id in ids))
        file.write(f'], "licenses": {json.dumps(licenses)}, "annotations": [')
        for number in range(annotations):
            owner, count = int(ids[owners[number]]), int(corners[number])
            separator = ", " if number else ""
            file.write(separator + json.dumps(_annotation(random, number + 1, owner, count)))
        categories = [{"supercategory": "thing", "id": n, "name": f"thing {n}"} for n in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return ids


def _image(image_id: int) -> dict[str, Any]:
    name = f"COCO_train2014_{image_id:012d}.jpg"
    return {
        "license": 4,
        "file_name": name,
        "coco_url": f"http://mscoco.org/images/{image_id}",
        "height": 480,
        "width": 640,
        "date_captured": "2013-11-14 16:28:13",
        "id": image_id,
        "flickr_url": f"http://farm7.staticflickr.com/6116/{image_id * 977}_02b97a_z.jpg",
    }


def _annotation(random: np.random.Generator, number: int, owner: int, corners: int) -> dict[str, Any]:
    x, y, width, height = (random.random(4) * (400, 300, 200, 150) + 5).round(2).tolist()
    segmentation: Any
    if number % 100 == 0:
        counts = random.multinomial(480 * 640, np.full(corners * 4, 0.25 / corners))
        segmentation = {"counts": counts.tolist(), "size": [480, 640]}
    else:
        turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radius = 0.35 + 0.15 * random.random(corners)
        points = np.stack((x + width * (0.5 + radius * np.cos(turn)), y + height * (0.5 + radius * np.sin(turn))), 1)
        segmentation = [points.round(2).ravel().tolist()]
    return {
        "segmentation": segmentation,
        "area": width * height * 0.6,
        "iscrowd": int(number % 100 == 0),
        "image_id": owner,
        "bbox": [x, y, width, height],
        "category_id": number % 80 + 1,
        "id": number,
    }


def draw_refs(root: Path, ids: np.ndarray) -> None:
    """Write refs for the published numbers of images per split: 2.5 refs per image, 3 sentences per ref."""
    share = len(ids) / 82_783  # of COCO's train2014 images
    for (dataset, split_by), splits in SPLITS.items():
        refs: list[dict[str, Any]] = []
        first = 0
        for split, count in splits.items():
            for image_id in ids[first : first + int(count * share)].tolist():
                refs += [_ref(len(refs) + extra, image_id, split) for extra in range(2 + image_id % 2)]
            first += int(count * share)
        (root / dataset).mkdir(parents=True, exist_ok=True)
        (root / dataset / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _ref(number: int, image_id: int, split: str) -> dict[str, Any]:
    words = ["the", "red", "thing", "number", str(number)]
    sentence = {"tokens": words, "raw": " ".join(words), "sent": " ".join(words)}
    return {
        "ref_id": number,
        "ann_id": number,
        "category_id": 1,
        "image_id": image_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
        "sent_ids": [number * 3 + n for n in range(3)],
        "sentences": [{**sentence, "sent_id": number * 3 + n} for n in range(3)],
    }


def prepare(folder: Path, images: int, annotations: int) -> tuple[Path, Path]:
    """Draw the files of both commands into a folder, unless an earlier run has drawn the same there.

    Returns:
        The instances file and the folder of the refs.
    """
    source, root, drawn = folder / "instances_train2014.json", folder / "refer", folder / "drawn.json"
    wanted = {"images": images, "annotations": annotations}
    if not drawn.exists() or json.loads(drawn.read_text()) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        drawn.unlink(missing_ok=True)
        draw_refs(root, draw(source, images, annotations))
        drawn.write_text(json.dumps(wanted))  # last, so that an interrupted run is repeated
    return source, root


def run(command: list[str], expected_status: int) -> tuple[float, float, float]:
    """Run a command; returns its wall time and CPU time in seconds, and its peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected_status:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}, {expected_status} expected")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=3, help="runs per command, of which the median is printed")
    parser.add_argument("--images", type=int, default=82_783, help="number of images in the file")
    parser.add_argument("--annotations", type=int, default=604_907, help="number of annotations in it")
    parser.add_argument(
        "--folder", type=Path, help="folder for the synthetic files, reused by later runs of the same size"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, root = prepare(folder, options.images, options.annotations)
        out = Path(temporary) / "out.json"
        refdet = [sys.executable, "-m", "refdet"]
        common = ["--instances", str(source), "--refer-root", str(root)]
        commands = {  # with their exit codes; audit finds leaks, since no image is removed from the file
            "build-split": ([*refdet, "build-split", *common, "--out", str(out)], 0),
            "audit": ([*refdet, "audit", *common], 1),
        }
        rows = {}
        for name, (command, status) in commands.items():
            results = []
            for _ in range(options.repeat):
                for previous in Path(temporary).glob("out*.json"):
                    previous.unlink()  # build-split does not replace its output
                results.append(run(command, status))
            rows[name] = {
                "seconds": statistics.median(seconds for seconds, _, _ in results),
                "cpu_seconds": statistics.median(seconds for _, seconds, _ in results),
                "peak_gb": max(peak for _, _, peak in results),
            }
        size = source.stat().st_size / 1e6
    if options.json:
        print(json.dumps({"file_mb": size, **rows}, indent=2))
        return
    print(f"file of {size:.0f} MB, {options.images} images, {options.annotations} annotations")
    for name, row in rows.items():
        cpu = f"CPU time {row['cpu_seconds']:.1f} s"
        print(f"{name:12} {row['seconds']:6.1f} s   {cpu}   peak {row['peak_gb']:.2f} GB")


if __name__ == "__main__":
    main()
