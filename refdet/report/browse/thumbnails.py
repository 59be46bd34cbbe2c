"""Images and thumbnails as JPEG; thumbnails are kept in memory up to a limit."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from PIL import Image

from refdet.data.coco import ImageRecord
from refdet.data.image_decoder import SizeError, rgb_thumbnail
from refdet.data.image_source import ImageError, ImageSource, why_unreadable

SIDE = 240
"""Longest side of a thumbnail in pixels."""

MAX_BYTES = 64 << 20  # of thumbnails in memory; those of REFER's 28,000 images would take about 200 MB
_QUALITY, _THUMBNAIL_QUALITY = 92, 80  # of JPEG, for whole images and thumbnails


class ByteCache:
    """The values of the most recently used keys, up to a total size; safe for use by several threads.

    Args:
        max_bytes: maximum total size in bytes.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self._values: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int, compute: Callable[[], bytes]) -> bytes:
        """The value of a key, computed unless it is cached; two threads that ask at the same time both compute it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()
        with self._lock:
            self.size += len(value) - len(self._values.pop(key, b""))  # another thread may have added it meanwhile
            self._values[key] = value
            while self.size > self.max_bytes and self._values:
                self.size -= len(self._values.popitem(last=False)[1])
        return value


def thumbnail(source: ImageSource, record: ImageRecord) -> bytes:
    """A JPEG of at most `SIDE` pixels a side.

    Raises:
        ImageError: the image is missing, cannot be decoded or has another size than the store says.
        RuntimeFailure: the image could not be read because of a failure of the machine, such as a full memory.
    """
    name = source.find(record)
    if name is None:
        raise ImageError(f"no file for image {record.id}: {source.why_missing(record)}")
    if source.exif == "apply":  # the size can only be checked after rotating the whole image
        return _encode(source.read(record), side=SIDE)
    try:
        data = source.data(name, record.height, record.width)
        return _jpeg(rgb_thumbnail(data, SIDE, record.height, record.width), _THUMBNAIL_QUALITY)
    except SizeError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders can raise anything on damaged or hostile files
        source.raise_if_system_error(name, error)
        raise ImageError(f"{name}: not a readable image ({why_unreadable(error)})") from None


def full_image(source: ImageSource, record: ImageRecord) -> bytes:
    """A JPEG of the whole image, as the detector saw it: never the bytes of the file.

    Raises:
        ImageError: the image is missing, cannot be decoded or has another size than the store says.
        RuntimeFailure: a failure of the machine.
    """
    return _encode(source.read(record))


def _encode(pixels: np.ndarray, side: int | None = None) -> bytes:
    """A JPEG of (H, W, 3) pixels, reduced to at most `side` pixels a side unless that is None."""
    image = Image.fromarray(pixels)
    if side is not None:
        image.thumbnail((side, side))
    return _jpeg(image, _QUALITY if side is None else _THUMBNAIL_QUALITY)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
