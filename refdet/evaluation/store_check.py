"""Check that the regions of a store can be compared with the objects of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.files.short_text import format_share, short_repr
from refdet.store import Store
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)


def check_images(
    store: Store, ids: Sequence[int], images: Mapping[int, ImageRecord], listed_in: str, subset: str, fix: str
) -> None:
    """Check that a store has all these images, in the same size as the dataset.

    Args:
        store: the store.
        ids: ids of the images.
        images: image id -> the image in the dataset.
        listed_in: the file of the dataset, for error messages.
        subset: name of these images, such as "split val", for error messages.
        fix: how to get a store that has them.

    Raises:
        InputError: an image is missing or has another size; the message counts them.
    """
    if missing := [image_id for image_id in ids if image_id not in store]:
        first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        lacks = format_share(len(missing), len(ids), "image")
        raise InputError(f"{store.path}: lacks {lacks} of {subset} ({first}); {fix}")
    store_sizes = zip(store.heights.tolist(), store.widths.tolist(), strict=True)
    sizes = dict(zip(store.image_ids.tolist(), store_sizes, strict=True))
    if resized := [i for i in ids if sizes[i] != (images[i].height, images[i].width)]:
        image, (height, width) = images[resized[0]], sizes[resized[0]]
        raise InputError(
            f"{store.path}: of {subset}, {format_share(len(resized), len(ids), 'image', 'has')} another size than in "
            f"{listed_in}, so boxes cannot be compared (first: image {image.id} is {width}x{height}, not "
            f"{image.width}x{image.height}); {fix}"
        )


def warn_about_categories(store: Store, names: Mapping[int, str], listed_in: str) -> None:
    """Warn if category ids of a store have other names in a dataset, since categories are compared by id.

    Args:
        store: the store.
        names: category id -> name in the dataset.
        listed_in: the file of the dataset.
    """
    renamed = [category for category, name in store.names.items() if names.get(category, name) != name]
    if renamed:
        log.warning(
            "note: %s: %s another name in %s (first: %d is %s, not %s); AP and recall with category compare ids, so "
            "they mean nothing for categories that differ",
            store.path,
            format_share(len(renamed), len(store.names), "category", "has"),
            listed_in,
            renamed[0],
            short_repr(store.names[renamed[0]]),
            short_repr(names[renamed[0]]),
        )


def read_regions(store: Store, image_id: int) -> Regions:
    """Read the regions of an image, without features.

    Raises:
        InputError: the file is damaged, or a box or score is not finite.
    """
    regions = store.read(image_id, features=())
    if not (np.isfinite(regions.boxes).all() and np.isfinite(regions.scores).all()):
        raise InputError(f"{store.path}: image {image_id}: a box or score is not finite; extract it again")
    return regions
