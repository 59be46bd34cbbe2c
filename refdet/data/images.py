"""Image files: where they are, and how they are read."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from refdet.data.coco import ImageRecord
from refdet.errors import InputError

# what Pillow and zipfile raise for damaged, encrypted and hostile files
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(InputError):
    """One image cannot be used; the message names the file and why."""


class ImageSource:
    """A folder of images, or a zip of them such as COCO's own. Safe to hand to worker processes and threads."""

    def __init__(self, path: Path, names: dict[str, str]) -> None:
        self.path = path
        self._names = names  # file name -> path inside the folder or the zip
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    @classmethod
    def open(cls, path: str | Path) -> ImageSource:
        """List a folder (with its folders) or a zip.

        Raises:
            InputError: there is no such thing, or the zip is damaged.
        """
        path = Path(path)
        if path.is_dir():
            found = (
                os.path.relpath(os.path.join(folder, name), path)
                for folder, _, names in os.walk(path, followlinks=True)
                for name in names
            )
            return cls(path, _by_name(found))
        if not path.is_file():
            raise InputError(f"--images {path}: no such folder or zip")
        try:
            with zipfile.ZipFile(path) as archive:
                return cls(path, _by_name(i.filename for i in archive.infolist() if not i.is_dir()))
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"--images {path}: neither a folder nor a readable zip ({error})") from error

    def find(self, record: ImageRecord) -> str | None:
        """The path, inside the folder or zip, of an image; None if it is not there.

        It is sought by its file name, then by its id under the names of COCO 2017 and 2014, since REFER
        names the files of 2014 and many keep those of 2017.
        """
        for name in candidate_names(record):
            if name in self._names:
                return self._names[name]
        return None

    def check(self, records: Sequence[ImageRecord], listed_in: Path) -> None:
        """See that every image is there, before hours of work find out.

        Raises:
            InputError: how many are not, and the first.
        """
        missing = [record for record in records if self.find(record) is None]
        if missing:
            raise InputError(
                f"--images {self.path}: {len(missing)} of the {len(records)} images of {listed_in.name} are not there, "
                f"the first is {missing[0].file_name or missing[0].id}; give the folder or zip that holds them all"
            )

    def read(self, record: ImageRecord) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB, of the height and width that the record gives.

        Greyscale and palette images become RGB. EXIF orientation is not applied: COCO's boxes are drawn on the
        pixels as they are stored.

        Raises:
            ImageError: not found, not decodable, or of another size.
        """
        name = self.find(record)
        if name is None:
            raise ImageError(f"{self.path}: no file for image {record.id} (tried {', '.join(candidate_names(record))})")
        try:
            data = self.data(name)
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.array(image.convert("RGB"))  # a copy: torch wants it writable
        except _UNREADABLE as error:
            # Pillow's own text for this one is the address of a buffer
            why = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise ImageError(
                f"{self.path / name}: not a readable image ({why}); replace it, or take it out of the instances file"
            ) from error
        if pixels.shape[:2] != (record.height, record.width):
            raise ImageError(
                f"{self.path / name}: is {pixels.shape[1]}x{pixels.shape[0]}, but the instances file says "
                f"{record.width}x{record.height}"
            )
        return pixels

    def data(self, name: str) -> bytes:
        """The bytes of a file under a name that `find` gave; threads may call it together."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        # an open zip must not be shared with a forked worker: both would move one file position
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1].read(name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}


def candidate_names(record: ImageRecord) -> list[str]:
    """The file names under which an image is sought, in order, without repetition."""
    by_id = (f"{record.id:012d}.jpg", f"COCO_train2014_{record.id:012d}.jpg", f"COCO_val2014_{record.id:012d}.jpg")
    given = [record.file_name, os.path.basename(record.file_name)] if record.file_name else []
    return list(dict.fromkeys([*given, *by_id]))


def _by_name(paths: object) -> dict[str, str]:
    names: dict[str, str] = {}
    for path in sorted(paths):  # type: ignore[call-overload]
        names[path] = path
        names.setdefault(os.path.basename(path), path)
    return names
