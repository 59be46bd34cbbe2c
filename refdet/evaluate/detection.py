"""Detection quality of a checkpoint on an instances file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from refdet import trained
from refdet.data.batches import exact_batches
from refdet.data.coco import CocoIndex
from refdet.data.image_orientation import OrientationNote
from refdet.data.images import ImageSource
from refdet.detector.inference import DetectOptions, detect_batch
from refdet.device import usable_device
from refdet.errors import InputError
from refdet.evaluate.average_precision import coco_ap, coco_results


def evaluate(
    run: Path,
    instances: Path,
    images: Path,
    batch_size: int = 4,
    device: str | None = None,
    exif: str = "ignore",
) -> dict[str, dict[str, float] | None]:
    """Box and mask AP of a detector on all images of an instances file.

    Returns:
        {"bbox": `coco_ap`, "segm": `coco_ap` or None without a mask branch}.
    Raises:
        InputError: the detector's categories are not those of the file, or an image cannot be read.
    """
    loaded = trained.load(run, usable_device(device))
    index, source = CocoIndex.load(instances), ImageSource.open(images, exif)
    records = list(index.images.values())
    if not records:
        raise InputError(f"{instances}: no image in it to evaluate on")
    source.check(records, instances)
    ours, theirs = dict(loaded.meta.categories), index.categories
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        raise InputError(
            f"--checkpoint {run} has {len(ours)} classes, {instances} has {len(theirs)}, and they are not the "
            f"same ({', '.join(f'{i} {name}' for i, name in odd[:3])} ...); evaluate on the dataset it was trained for"
        )
    options = DetectOptions(features=())
    results: list[dict[str, Any]] = []
    with (
        OrientationNote(source),
        tqdm(total=len(records), desc="evaluate", unit="image", dynamic_ncols=True) as bar,
    ):
        for batch in exact_batches(records, loaded.meta.recipe.input, batch_size):
            pixels = [source.read(record) for record in batch]
            results += coco_results(detect_batch(loaded.model, pixels, batch, loaded.meta.category_ids, options))
            bar.update(len(batch))
    ids = list(index.images)
    masks = coco_ap(index, ids, results, "segm") if loaded.meta.recipe.model.masks else None
    return {"bbox": coco_ap(index, ids, results, "bbox"), "segm": masks}
