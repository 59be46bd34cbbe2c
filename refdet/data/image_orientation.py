"""How many images of a run have an EXIF orientation, said once."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from refdet.data.image_source import ImageSource

log = logging.getLogger(__name__)


class OrientationNote:
    """Around the work that reads images: a line of the log says how many had an orientation other than 1.

    It comes when the work ends, however it ends, or when all images have been read, if the work goes on longer.

    Args:
        source: what is read from; images that other processes read are reported to `add`.
        batches: after so many calls of `add` all images have been read; None where nobody knows.
    """

    def __init__(self, source: ImageSource, batches: int | None = None) -> None:
        self._source, self._left, self._said = source, batches, False

    def add(self, oriented: Mapping[str, int]) -> None:
        """Report the files of a batch that have an orientation other than 1."""
        self._source.oriented.update(oriented)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._say()

    def _say(self) -> None:
        names, exif = sorted(self._source.oriented), self._source.exif
        if self._said or not names:
            return
        self._said = True
        done = (
            "used as they are stored, as COCO's are: give --exif apply if they were annotated upright"
            if exif == "ignore"
            else "turned upright"
        )
        log.warning(
            "note: --images %s: images with an EXIF orientation other than 1 among those read: %d, such as %s; %s",
            self._source.path, len(names), names[0], done,
        )  # fmt: skip

    def __enter__(self) -> OrientationNote:
        return self

    def __exit__(self, *_: object) -> None:
        self._say()
