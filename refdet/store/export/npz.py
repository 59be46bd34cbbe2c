"""Export to one ``.npz`` per image, in the format of bottom-up-attention or of one of its readers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from refdet.files.progress import progress
from refdet.files.short_text import format_count
from refdet.store.export import consumers, portable_pickle
from refdet.store.export.file_names import file_names, unusable_names
from refdet.store.export.folder import new_folder, require_space
from refdet.store.export.npz_layouts import LAYOUTS, check_names
from refdet.store.export.record import ExportResult, write_record
from refdet.store.export.source import Source


def export_npz(
    store: Path, out: Path, feature: str = "fc7", names: str | None = None, consumer: str = consumers.NPZ[0]
) -> ExportResult:
    """Write ``NAME.npz`` for each image of a store, in the layouts of `refdet.store.export.npz_layouts`.

    An image without regions gets a file with 0 regions, which models that pad to a fixed number accept.

    Args:
        store: the store.
        out: the folder.
        feature: the feature to write as ``x``.
        names: what NAME is: "stem" (the image's file name without suffix), "file" (with suffix) or "id" (the decimal
            image id); None for what the program expects.
        consumer: the program to write for, one of `consumers.NPZ`.

    Returns:
        What was written, with notes.

    Raises:
        InputError: ``out`` is not empty, the store lacks the feature, or its images have no usable names.
        RuntimeFailure: the disk is full.
    """
    consumers.check_consumer("npz", consumer)
    layout = LAYOUTS[consumer]
    names = names or layout.names
    with Source(store) as source, new_folder(out) as folder:
        width = source.width(feature)
        require_space(out, source.store.regions * 4 * (width + 4))  # float32 features and box of each region
        category_index = {category: i for i, category in enumerate(source.names)}
        name_of = file_names(source.store, names, ".npz")
        notes = [*layout.notes, *consumers.width_note(feature, width, consumer)]
        notes += check_names(store, layout, name_of)
        files = folder / layout.folder
        files.mkdir(exist_ok=True)  # exists if the layout has no folder of its own
        for image_id, name in progress(name_of.items(), "export", "image", total=len(name_of)):
            regions = source.read(image_id, (feature,))
            try:
                write_npz(files / f"{name}.npz", layout.arrays(regions, feature, name, category_index))
            except FileExistsError:  # on a file system that ignores case or normalizes accents
                raise unusable_names(
                    store, f"the file system mistakes {name!r} of image {image_id} for another name"
                ) from None
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        if empty:
            notes.append(f"{format_count(len(empty), 'image', 'has')} no regions; {layout.empty}")
        if names != layout.names and consumer == "rosita":
            notes.append("ROSITA expects files named after the image file with its suffix (`names='file'`)")
        pattern = "/".join(filter(None, (layout.folder, "*.npz")))
        result = ExportResult("npz", len(name_of), source.store.regions, [pattern], empty, notes)
        write_record(folder, result, {"for": consumer, "feature": feature, "names": names}, {"features": source})
    return result


def write_npz(path: Path, values: dict[str, Any]) -> None:
    """Write arrays, and dicts as pickled object arrays, readable by any version of numpy.

    Args:
        path: the file.
        values: arrays, numbers, strings and dicts by name.

    Raises:
        FileExistsError: the file exists.
    """
    with zipfile.ZipFile(path, "x") as archive:
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                array = np.asanyarray(value)
                if array.dtype != object:
                    np.lib.format.write_array(member, array, allow_pickle=False)
                    continue
                header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(portable_pickle.dumps(array, 2))  # protocol 2, readable by any Python
