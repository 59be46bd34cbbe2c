"""Image files: where they are, and how they are read."""

from __future__ import annotations

import io
import os
import stat
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, WorkError, is_of_the_machine

# What photographs come in. Pillow knows many more, some of which run other programs on the file.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MAX_BYTES = 1 << 30

# Pillow warns of odd metadata, and of many pixels; here the instances file says how many there must be.
warnings.filterwarnings("ignore", module=r"PIL\.")


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

        Greyscale, palette and CMYK images become RGB, of 16 bits the upper 8 are kept, transparency is left out, and of
        an animation the first picture is read. EXIF orientation is not applied: COCO's boxes are drawn on the pixels
        as they are stored.

        Raises:
            ImageError: not found, not decodable, or of another size.
            WorkError: the machine could not read it, which says nothing of the image: a disk or network that fails, too
                many open files, no memory.
        """
        name = self.find(record)
        if name is None:
            raise ImageError(f"{self.path}: no file for image {record.id} (tried {', '.join(candidate_names(record))})")
        try:
            with Image.open(io.BytesIO(self.data(name)), formats=_FORMATS) as image:
                width, height = image.size  # before anything is decoded: a small file may claim many pixels
                if (height, width) == (record.height, record.width):
                    return _rgb(image)
        except WorkError:
            raise
        except Exception as error:  # decoders of damaged and hostile files fail in ways that nobody lists
            if is_of_the_machine(error) or self._lost(name, error):
                what = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise WorkError(
                    f"{self.path / name}: cannot be read now ({what}): that is not the image's fault; see to the disk, "
                    "the network or memory"
                ) from error
            # Pillow's own text for this one is the address of a buffer
            why = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise ImageError(
                f"{self.path / name}: not a readable image ({why or type(error).__name__}); "
                "replace it, or take it out of the instances file"
            ) from error
        raise ImageError(
            f"{self.path / name}: is {width}x{height}, but the instances file says {record.width}x{record.height}"
        )

    def data(self, name: str) -> bytes:
        """The bytes of a file under a name that `find` gave; threads may call it together.

        Raises:
            OSError, and what zipfile raises: it cannot be read, or is far too large for an image.
            WorkError: the folder or zip as a whole is no longer there.
        """
        if self.path.is_dir():
            path = self.path / name
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would keep us waiting for ever
                raise OSError("not a file")
            _refuse_huge(found.st_size)
            return path.read_bytes()
        # an open zip must not be shared with a forked worker: both would move one file position
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except (OSError, zipfile.BadZipFile) as error:
                raise WorkError(f"{self.path}: can no longer be read ({error}); is it still there?") from error
        archive = self._zip[1]
        _refuse_huge(archive.getinfo(name).file_size)
        return archive.read(name)

    def _lost(self, name: str, error: Exception) -> bool:
        """Whether a file is missing or forbidden because its whole folder is: unmounted, or a ticket ran out."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            return False
        try:
            with os.scandir((self.path / name).parent) as found:
                return next(found, None) is None
        except OSError:
            return True

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}


def candidate_names(record: ImageRecord) -> list[str]:
    """The file names under which an image is sought, in order, without repetition."""
    by_id = (f"{record.id:012d}.jpg", f"COCO_train2014_{record.id:012d}.jpg", f"COCO_val2014_{record.id:012d}.jpg")
    given = [record.file_name, os.path.basename(record.file_name)] if record.file_name else []
    return list(dict.fromkeys([*given, *by_id]))


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image as a new, writable (H, W, 3) uint8 array."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would cut off what is brighter than 255 of 65535. Of 16-bit colour it keeps the upper byte itself.
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers without a known range, Pillow's mode {image.mode}")
    return np.array(image.convert("RGB"))


def _refuse_huge(size: int) -> None:
    if size > _MAX_BYTES:
        raise OSError(f"of {size / 2**30:.1f} GiB, too large for an image")


def _by_name(paths: object) -> dict[str, str]:
    names: dict[str, str] = {}
    for path in sorted(paths):  # type: ignore[call-overload]
        names[path] = path
        names.setdefault(os.path.basename(path), path)
    return names
