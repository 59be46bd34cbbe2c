"""`OrientationNote`: log how many images have an EXIF orientation, and how it was handled."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from refdet.data.image_source import ImageSource
from refdet.files.short_text import agree

log = logging.getLogger(__name__)


class OrientationNote:
    """Context manager that logs once how many images had an EXIF orientation other than 1.

    The note is logged as soon as all images have been read, or else when the block ends, also by an exception.

    Args:
        source: source of the images. It has the orientations of the images that this process reads; those of images
            that other processes read must be passed to `add`.
        batches: number of calls of `add` after which all images have been read, None if unknown.
    """

    def __init__(self, source: ImageSource, batches: int | None = None) -> None:
        self._source, self._remaining_batches, self._logged = source, batches, False

    def add(self, orientations: Mapping[str, int]) -> None:
        """Add a batch: file name -> orientation, of its files with an orientation other than 1."""
        self._source.orientations.update(orientations)
        if self._remaining_batches is not None:
            self._remaining_batches -= 1
            if self._remaining_batches == 0:
                self._log()

    def _log(self) -> None:
        """Log the note, unless it has been logged or no image has an orientation."""
        names, exif = sorted(self._source.orientations), self._source.exif
        if self._logged or not names:
            return
        self._logged = True
        handling = (
            "used as stored, as COCO's are; add `exif='apply'` if annotated upright"
            if exif == "ignore"
            else "rotated upright"
        )
        log.warning(
            "note: `%s` %s: %d of the images read %s an EXIF orientation other than 1, such as %s: %s",
            self._source.argument,
            self._source.path,
            len(names),
            agree(len(names), "has"),
            names[0],
            handling,
        )

    def __enter__(self) -> OrientationNote:
        return self

    def __exit__(self, *_: object) -> None:
        self._log()
