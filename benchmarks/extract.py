"""Benchmarks `refdet extract-features` against the same extraction with torchvision's detection modules.

    python benchmarks/extract.py [--device cpu] [--precision float32] [--images 8] [--batch-size 4] [--rounds 3]
                                 [--instances F.json --images-dir DIR] [--json]

Mask R-CNN, ResNet-101-C4, short side 600, 300 proposals, 100 regions per image with masks, pool5 and fc7, written to
HDF5. torchvision's side (`benchmarks/torchvision_c4.py`) processes one image at a time. Both have the same random
weights (`drawn_weights.py`) and images, which are synthetic unless given. Both compute in --precision,
torchvision in --peer-precision if given; its bfloat16 is by autocast. In each round the sides take turns; a turn is
timed from the first image to the finished file, without loading the weights. Peak memory is that of a process that runs
one side once, including weights and libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn_weights import make_weights
from peak import peak_memory
from PIL import Image, ImageFilter
from torchvision_c4 import Stages, TorchvisionC4
from torchvision_c4 import extract as torchvision_extract

from refdet import store
from refdet.config import recipe as recipes
from refdet.data.image_source import ImageSource
from refdet.data.transforms import input_size, network_input
from refdet.detector import loading
from refdet.device import exact_float32, float32_arithmetic, resolve_device, supported_precision
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.structures import boxes as box_ops
from refdet.structures.coco_categories import coco_categories
from refdet.structures.detection_options import PRECISIONS

REGIONS, NMS = 100, 0.3  # maximum number of regions per image, IoU threshold


@dataclass(frozen=True)
class Work:
    """What both sides extract: the detector's run directory, the images, and the minimum score of a region."""

    checkpoint: Path
    images_dir: Path
    image_list: ImageList
    threshold: float


def draw_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth noise in COCO's most frequent sizes, and their instances file."""
    random, records = np.random.default_rng(0), []
    for number in range(1, count + 1):
        width, height = ((640, 480), (640, 427), (480, 640), (640, 480))[number % 4]
        noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.DETAIL).save(folder / f"{number:012d}.jpg", quality=90)
        records.append({"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width})
    tree = {"images": records, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(tree))


@torch.inference_mode()
def check_same_work(work: Work, peer: TorchvisionC4, pixels: np.ndarray) -> dict[str, float]:
    """Largest relative difference between the features of 50 boxes that both networks compute from the same input."""
    ours = loading.load(work.checkpoint).model
    size = input_size(*pixels.shape[:2], ours.recipe.input)
    inputs = network_input(pixels, size, ours.recipe.input)[None]
    corners = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([size.image_width, size.image_height] * 2)
    (found,) = ours.extract_features(inputs.contiguous(memory_format=torch.channels_last), [size], [boxes])
    wanted = peer.of_boxes(inputs, ours.convention.scale(boxes, size.scale))
    differences = {}
    for name, values in wanted.items():
        mine = found.features[name]
        differences[name] = float(((mine - values).norm(dim=1) / values.norm(dim=1)).max())
        if differences[name] > 1e-4:
            raise SystemExit(
                f"the two networks disagree: {name} differs by {differences[name]:.1e}, relative; at most 1e-4 expected"
            )
    return differences


def matched_share(theirs: Path, ours: Path) -> float:
    """Share of torchvision's regions that refdet also found: same class, IoU above 0.9."""
    import h5py

    same = total = 0
    with h5py.File(theirs) as peer, store.open(ours) as mine:
        category_ids = np.array([category for category, _ in coco_categories()])
        for number, image_id in enumerate(mine):
            group, regions = peer[str(number)], mine[image_id]
            overlap = box_ops.iou(torch.from_numpy(group["boxes"][:]), torch.from_numpy(regions.boxes)) > 0.9
            same_class = category_ids[group["labels"][:] - 1][:, None] == regions.category_ids[None]
            same += int((overlap.numpy() & same_class).any(1).sum())
            total += len(overlap)
    return same / max(total, 1)


@contextmanager
def computing_as(precision: str, device: torch.device) -> Iterator[None]:
    """Compute torchvision's side in a precision; bfloat16 by autocast."""
    with float32_arithmetic(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def run(work: Work, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both sides in turns; returns their speed, regions, stages and memory."""
    sides = options.sides.split(",")
    extraction = ExtractOptions(
        score_threshold=work.threshold, nms_threshold=NMS, max_regions=REGIONS, precision=options.precision
    )
    source = ImageSource.open(work.images_dir)
    paths = [work.images_dir / str(source.find(record)) for record in work.image_list.records]
    result: dict[str, Any] = {}
    if "torchvision" in sides:
        peer = TorchvisionC4(loading.load(work.checkpoint).model, work.threshold, NMS, REGIONS)
        if len(sides) == 2:
            with exact_float32():
                result["difference"] = check_same_work(work, peer, source.read(work.image_list.records[0]))
        peer, stages = peer.to(device), Stages(device)
        with computing_as(options.peer_precision, device):
            torchvision_extract(peer, paths[:1], folder / "warm-up.h5", Stages(device))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    regions: dict[str, float] = {}
    for turn in range(options.rounds):
        theirs, ours = folder / f"a{turn}.h5", folder / f"b{turn}.h5"
        if "torchvision" in sides:
            start = time.perf_counter()
            with computing_as(options.peer_precision, device):
                counts = torchvision_extract(peer, paths, theirs, stages)
            seconds["torchvision"].append(time.perf_counter() - start)
            regions["torchvision"] = statistics.mean(counts)
        if "refdet" in sides:
            done = extract_features(
                work.checkpoint,
                work.images_dir,
                ours,
                work.image_list,
                options=extraction,
                batch_size=options.batch_size,
                workers=options.workers,
                device=str(device),
            )
            seconds["refdet"].append(done.seconds + done.stages["merge"])  # `seconds` does not include the merge
            regions["refdet"] = done.regions / done.images
    result["regions"] = regions
    result |= {f"{side}_images_per_second": len(paths) / statistics.median(times) for side, times in seconds.items()}
    if "refdet" in sides:
        result["refdet_stages"] = shares(done.stages)
    if "torchvision" in sides:
        result["torchvision_stages"] = shares(stages.seconds)
    if len(sides) == 2:
        result["ratio"] = statistics.median(seconds["torchvision"]) / statistics.median(seconds["refdet"])
        result["matched"] = matched_share(theirs, ours)
    elif device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        result["peak_bytes"] = peak_memory()
    return result


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each stage's share of the sum of all stages; refdet's stages overlap, so their sum exceeds the elapsed time."""
    total = sum(seconds.values()) or 1.0
    return {name: value / total for name, value in seconds.items()}


def peak_of(side: str, prepared: Path) -> int:
    """Peak memory in bytes of a process that runs one side: resident memory on a CPU, allocated memory on a GPU."""
    arguments = [sys.executable, __file__, *sys.argv[1:], "--json", "--rounds", "1", "--sides", side]
    arguments += ["--prepared", str(prepared)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["peak_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of both sides")
    parser.add_argument("--peer-precision", choices=PRECISIONS, help="of torchvision; default: --precision")
    parser.add_argument("--images", type=int, default=8, help="number of images")
    parser.add_argument("--instances", type=Path, help="instances file of real images, with --images-dir")
    parser.add_argument("--images-dir", type=Path)
    parser.add_argument("--batch-size", type=int, default=4, help="of refdet")
    parser.add_argument("--workers", type=int, default=2, help="of refdet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="torchvision,refdet", help="with a single side, its peak memory is measured")
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)  # folder prepared by the parent process
    options = parser.parse_args()
    if (options.instances is None) != (options.images_dir is None):
        parser.error("--instances and --images-dir go together")
    device = resolve_device(options.device)
    options.precision = supported_precision(options.precision, device)
    options.peer_precision = supported_precision(options.peer_precision or options.precision, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = options.prepared or folder
        if options.instances is None:
            options.images_dir, instances = prepared / "images", prepared / "images" / "instances.json"
            if options.prepared is None:
                options.images_dir.mkdir()
                draw_images(options.images_dir, options.images)
        else:
            instances = options.instances
        images = ImageList.of_instances(instances)
        images = ImageList(images.records[: options.images], images.index, images.name)
        if options.prepared is None:
            source = ImageSource.open(options.images_dir)
            recipe = recipes.load("c4-res101").with_changes(["model.norm=frozen"])
            threshold = make_weights(folder / "run", recipe, [source.read(record) for record in images.records[:2]])
            (folder / "threshold").write_text(repr(threshold))
        threshold = float((prepared / "threshold").read_text())
        result = run(Work(prepared / "run", options.images_dir, images, threshold), device, options, folder)
        if "," in options.sides:
            result["peak_bytes"] = {side: peak_of(side, prepared) for side in options.sides.split(",")}
    about = {
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "images": len(images.records),
        "precision": options.precision,
        "peer_precision": options.peer_precision,
        "batch_size": options.batch_size,
    }
    if options.json:
        print(json.dumps({**about, **result}))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for side in options.sides.split(","):
        peak = result["peak_bytes"][side] if "," in options.sides else result["peak_bytes"]
        speed, regions = result[f"{side}_images_per_second"], result["regions"][side]
        print(f"{side:12} {speed:8.3f} images/s  {regions:6.1f} regions/image  peak {peak / 2**30:.2f} GiB")
    for side in options.sides.split(","):
        stages = ", ".join(f"{name} {share:.1%}" for name, share in result[f"{side}_stages"].items())
        print(f"stages of {side}: {stages}")
    if "ratio" in result:
        print(f"refdet is {result['ratio']:.2f} times as fast; {result['matched']:.1%} of torchvision's regions match")


if __name__ == "__main__":
    main()
