"""One ``.npz`` an image, with the keys of bottom-up-attention."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet.errors import InputError
from refdet.export.folder import new_folder
from refdet.export.record import Exported, write_record
from refdet.export.source import Source
from refdet.regions import Regions


def export_npz(features: Path, out: Path, feature: str = "fc7", names: str = "stem") -> Exported:
    """Write ``NAME.npz`` for each image of a store.

    Keys as MILVLG/bottom-up-attention.pytorch writes them, see `arrays`. An image without regions gets a file with 0
    of them, which models that pad to a fixed number take.

    Arguments:
        features: the store; out: the folder.
        feature: which feature becomes ``x``.
        names: what NAME is: "stem", the image's file name up to its suffix, or "id", the image id in decimal.

    Raises:
        InputError: ``out`` is not empty, the store lacks the feature, or two images have the same name.
    """
    with Source(features) as source, new_folder(out) as folder:
        source.width(feature)
        places = {category: i for i, category in enumerate(source.names, start=1)}
        seen: dict[str, int] = {}
        for image_id in tqdm(source.store, desc="export", unit="image", disable=None):
            regions = source.store.read(image_id, (feature,))
            name = str(image_id) if names == "id" else PurePosixPath(regions.file_name).stem
            other = seen.setdefault(name, image_id)
            if not name or other != image_id:
                why = f"images {other} and {image_id} are both {name!r}" if name else f"image {image_id} has none"
                raise InputError(f"{features}: no files named by image file: {why}; export with --names id")
            write_npz(folder / f"{name}.npz", arrays(regions, feature, name, places))
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        notes = [f"{len(empty)} images have no regions; their files hold 0 boxes"] if empty else []
        done = Exported("npz", len(seen), source.store.regions, ["*.npz"], empty, notes)
        write_record(folder, done, {"feature": feature, "names": names}, {"features": source})
    return done


def arrays(regions: Regions, feature: str, name: str, places: dict[int, int]) -> dict[str, Any]:
    """What one file holds.

    Returns:
        ``x`` (n, width) float32; ``bbox`` (n, 4) float32, half-open xyxy in pixels; ``num_bbox``, ``image_h``,
        ``image_w``; ``info``, a dict that numpy pickles, with ``image_id`` (the name), ``image_h``, ``image_w``,
        ``num_boxes``,
        ``objects_id`` (n,) int64, places in the detector's classes from 1 on, 0 being the background as in the
        original, ``objects_conf`` (n,) float32, and, ours, ``category_id`` (n,) int64, COCO's.
    """
    n = len(regions)
    objects = np.array([places[category] for category in regions.category_ids.tolist()], np.int64)
    info = {
        "image_id": name, "image_h": regions.height, "image_w": regions.width, "num_boxes": n,
        "objects_id": objects, "objects_conf": regions.scores, "category_id": regions.category_ids,
    }  # fmt: skip
    return {
        "x": regions.features[feature].astype(np.float32), "bbox": regions.boxes, "num_bbox": n,
        "image_h": regions.height, "image_w": regions.width, "info": info,
    }  # fmt: skip


def write_npz(path: Path, values: dict[str, Any]) -> None:
    """Write arrays, and dicts as numpy pickles them, so that numpy of any age reads them.

    `numpy.savez` of numpy 2 pickles by the module name ``numpy._core``, which numpy before 1.26 lacks; all know
    ``numpy.core``.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                array = np.asanyarray(value)
                if array.dtype != object:
                    np.lib.format.write_array(member, array, allow_pickle=False)
                    continue
                header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                # protocol 2 writes names as lines of text, without lengths that another name would belie
                member.write(pickle.dumps(array, 2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
