"""What an instances file says of itself: the provenance of a detector that is trained on it."""

from __future__ import annotations

from refdet.data.coco import CocoIndex
from refdet.data.image_evidence import id_matches_file_name
from refdet.errors import InputError
from refdet.structures.provenance import UNKNOWN, Provenance, file_sha256, image_ids_sha256

EDITED = "its images are not those refdet build-split wrote: nothing is known to be excluded"
RENAMED = "its file names are not those of its image ids, so what refdet build-split left out is not believed"


def provenance_of_instances(index: CocoIndex) -> Provenance:
    """Its ``info.refdet``, if refdet build-split wrote the file and it is still as it was written.

    That is, its images are the same, and their ids tell the files that are read for them (`id_matches_file_name`),
    since the record is of ids alone. Otherwise nothing is known to be excluded, and ``note`` says so.

    Raises:
        InputError: ``info.refdet`` is damaged.
    """
    note = UNKNOWN
    ids_sha256 = image_ids_sha256(index.images)
    if "refdet" in index.info:
        try:
            written = Provenance.from_json(index.info["refdet"])
        except InputError as error:
            raise InputError(f"{index.path}: info.refdet: {error}") from None
        if written.image_ids_sha256 != ids_sha256:
            note = EDITED
        elif not all(id_matches_file_name(entry, entry["id"]) for entry in index.raw["images"]):
            note = RENAMED
        else:
            return written
    return Provenance(
        source=index.path.name,
        source_sha256=file_sha256(index.path),
        images=len(index.images),
        annotations=len(index.raw["annotations"]),
        image_ids_sha256=ids_sha256,
        note=note,
    )
