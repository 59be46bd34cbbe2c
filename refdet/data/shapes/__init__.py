"""A synthetic dataset of drawn scenes with referring expressions, in the formats of COCO 2014 and REFER.

The dataset is generated from a seed without downloads, and read by the same code as real data.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from refdet.data.shapes.coco_files import Picture, annotation_ids, file_name, write_instances
from refdet.data.shapes.paint import paint
from refdet.data.shapes.refer_files import write_refer
from refdet.data.shapes.scene import ScenePlan, draw_scene
from refdet.errors import InputError

TRAIN_IMAGES = 800
MIN_IMAGES, MAX_IMAGES = 20, 20_000
_MAX_IMAGE_ID = 581_929  # of COCO 2014
_FIRST_TRAIN_ANNOTATION, _FIRST_VAL_ANNOTATION = 1001, 1_000_001  # ids of MAX_IMAGES train images stay below a million

__all__ = ["MAX_IMAGES", "MIN_IMAGES", "TRAIN_IMAGES", "write"]


def write(out: Path, seed: int = 0, images: int | None = None) -> Path:
    """Write the dataset into the folder `out` and return it.

    Args:
        out: a folder that does not exist or is empty.
        seed: 0 or more; the same seed writes the same bytes.
        images: number of train2014 images, `TRAIN_IMAGES` if None; val2014 has a fifth as many, at least two.

    Raises:
        InputError: `out` is not empty, `seed` is negative, or `images` is less than `MIN_IMAGES`, too few for all
            splits of REFER, or more than `MAX_IMAGES`.
    """
    out = Path(out)
    train = TRAIN_IMAGES if images is None else images
    if train < MIN_IMAGES:
        raise InputError(f"`images={train}`: too few for all REFER splits; ask for {MIN_IMAGES} or more")
    if train > MAX_IMAGES:
        raise InputError(f"`images={train}`: too many for distinct ids; ask for {MAX_IMAGES} or fewer")
    if seed < 0:
        raise InputError(f"`seed={seed}`: negative; choose 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists; choose another `out` or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    # written to a temporary folder and renamed at the end, so that `out` is never incomplete
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_all(temporary, seed, train)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def _write_all(out: Path, seed: int, train: int) -> None:
    """Write the files of a dataset with that number of train images into an empty folder."""
    val = max(2, train // 5)
    # [seed, 0] for ids and expressions; [seed, 1] and [seed, 2], with the image's index, for train and val images
    rng = np.random.default_rng([seed, 0])
    ids = (1 + rng.choice(_MAX_IMAGE_ID, train + val, replace=False)).tolist()
    train_pictures = _draw_split(out, "train2014", ids[:train], [seed, 1], _FIRST_TRAIN_ANNOTATION)
    val_pictures = _draw_split(out, "val2014", ids[train:], [seed, 2], _FIRST_VAL_ANNOTATION)
    annotations = out / "annotations"
    write_instances(annotations / "instances_train2014.json", train_pictures)
    write_instances(annotations / "instances_val2014.json", val_pictures)
    minival = {p.id for p in val_pictures[::2]}
    write_instances(annotations / "instances_minival2014.json", val_pictures, minival)
    rest = {p.id for p in val_pictures} - minival
    write_instances(annotations / "instances_valminusminival2014.json", val_pictures, rest)
    write_refer(out / "refer", train_pictures, rng)


def _draw_split(out: Path, split: str, ids: list[int], seed: list[int], first_annotation: int) -> list[Picture]:
    """Draw and save the images of a COCO split, each with its own random generator."""
    folder = out / split
    folder.mkdir()
    pictures: list[Picture] = []
    next_annotation = first_annotation
    for index, image_id in enumerate(ids):
        rng = np.random.default_rng([*seed, index])
        scene = draw_scene(rng, ScenePlan.for_index(index))
        name = file_name(split, image_id)
        paint(scene, rng).save(folder / name, quality=92, subsampling=0)
        ids_of_things = annotation_ids(scene.things, image_id, next_annotation)
        next_annotation += len(scene.things) + int(rng.integers(1, 40))  # ids have gaps, as in COCO
        pictures.append(Picture(image_id, name, scene.height, scene.width, scene.things, ids_of_things))
    return pictures
