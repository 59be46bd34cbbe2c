"""Benchmarks loading `REFER` on synthetic files of RefCOCO's size: 50000 refs, 142000 sentences, 197000 annotations.

    python benchmarks/refer_load.py [--json] [--repeat 3] [--protocol 0]

Each load runs in a process of its own; the constructor is timed. Without msgspec, Python's json module is used, which
takes four times as long for instances.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("man", "woman", "red", "blue", "left", "right", "shirt", "the", "in", "on", "with", "front", "dog", "standing")
LOAD = (
    "import sys, time; from refer import REFER; start, cpu = time.perf_counter(), time.process_time(); "
    "REFER(sys.argv[1]); print(time.perf_counter() - start, time.process_time() - cpu)"
)


def write(root: Path, protocol: int) -> None:
    """Write files as large as the real ones: 119 MB of instances, 25 MB of refs."""
    draw = random.Random(0)
    images = [
        {
            "id": i,
            "file_name": f"COCO_train2014_{i:012d}.jpg",
            "height": 480,
            "width": 640,
            "coco_url": "x" * 60,
            "flickr_url": "x" * 60,
        }
        for i in range(19994)
    ]
    annotations = [
        {
            "id": i,
            "image_id": i % len(images),
            "category_id": draw.randrange(1, 81),
            "iscrowd": 0,
            "area": round(draw.random() * 9e4, 5),
            "bbox": [round(draw.random() * 500, 2) for _ in range(4)],
            "segmentation": [
                [round(draw.random() * 600, 2) for _ in range(2 * max(4, int(draw.gammavariate(2, 12))))]
                for _ in range(draw.choice((1, 1, 1, 1, 2)))
            ],
        }
        for i in range(196771)
    ]
    categories = [{"id": i, "name": f"category {i}"} for i in range(1, 81)]
    refs, sent_id = [], 0
    for ref_id in range(50000):
        annotation, sentences = annotations[3 * ref_id], []
        for _ in range(3 if ref_id % 6 else 2):
            tokens = [draw.choice(WORDS) for _ in range(draw.choice((1, 2, 3, 3, 4, 4, 5, 7)))]
            sent = " ".join(tokens)
            sentences.append({"sent_id": sent_id, "sent": sent, "raw": sent.title(), "tokens": tokens})
            sent_id += 1
        refs.append(
            {
                "ref_id": ref_id,
                "ann_id": annotation["id"],
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "split": draw.choice(["train"] * 9 + ["val"]),
                "file_name": f"COCO_train2014_{annotation['image_id']:012d}_{ref_id}.jpg",
                "sent_ids": [one["sent_id"] for one in sentences],
                "sentences": sentences,
            }
        )
    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(json.loads(json.dumps(refs)), protocol))
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--protocol", type=int, default=0, help="pickle protocol of the refs; the real files have 0, Python 2's default"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write(Path(root), options.protocol)
        command = [sys.executable, "-c", LOAD, root]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(options.repeat)]
    seconds, cpu = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    msgspec = importlib.util.find_spec("msgspec") is not None
    result = {"protocol": options.protocol, "msgspec": msgspec, "seconds": min(seconds), "cpu_seconds": min(cpu)}
    print(json.dumps(result) if options.json else f"the best of {options.repeat}: {result}")


if __name__ == "__main__":
    main()
