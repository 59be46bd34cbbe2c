"""Provenance of an instances file, which becomes that of a detector trained on it."""

from __future__ import annotations

from dataclasses import replace

from refdet.data.coco import CocoIndex
from refdet.data.image_evidence import id_matches_file_name
from refdet.errors import InputError
from refdet.structures.provenance import NAMES_DIFFER, UNKNOWN, Provenance, file_sha256, image_ids_sha256

EDITED = "its images are not those written by refdet build-split, so nothing is known to be excluded"
RENAMED = f"{NAMES_DIFFER}, so the exclusions of refdet build-split are not trusted"


def provenance_of_instances(index: CocoIndex) -> Provenance:
    """Return ``info.refdet`` of a file written by refdet build-split, if it is unchanged.

    "Unchanged" means that its image ids are those that build-split wrote, and that each matches its file name
    (`id_matches_file_name`), as the provenance covers only ids. Otherwise the result has the file's own name, hash and
    counts, nothing is known to be excluded, and ``note`` says so.

    Args:
        index: the instances file.

    Returns:
        The provenance.

    Raises:
        InputError: ``info.refdet`` is damaged.
    """
    names_differ = not all(id_matches_file_name(entry, entry["id"]) for entry in index.raw["images"])
    note = f"{UNKNOWN}; {NAMES_DIFFER}" if names_differ else UNKNOWN
    ids_sha256 = image_ids_sha256(index.images)
    if "refdet" in index.info:
        try:
            written = Provenance.from_json(index.info["refdet"])
        except InputError as error:
            raise InputError(f"{index.path}: info.refdet: {error}") from None
        if written.image_ids_sha256 != ids_sha256:
            note = f"{EDITED}; {NAMES_DIFFER}" if names_differ else EDITED
        elif names_differ:
            note = RENAMED
        else:
            return replace(written, selection=None)  # `selection` is about the weights of a training run, not a split
    return Provenance(
        source=index.path.name,
        source_sha256=file_sha256(index.path),
        images=len(index.images),
        annotations=len(index.raw["annotations"]),
        image_ids_sha256=ids_sha256,
        note=note,
    )
