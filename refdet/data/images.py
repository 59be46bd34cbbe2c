"""Image files: where they are, how they are read, and how they become the network's input."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.recipe import InputOptions


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
            data = self._bytes(name)
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.array(image.convert("RGB"))  # a copy: torch wants it writable
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise ImageError(f"{self.path / name}: not a readable image ({error})") from error
        if pixels.shape[:2] != (record.height, record.width):
            raise ImageError(
                f"{self.path / name}: is {pixels.shape[1]}x{pixels.shape[0]}, but the instances file says "
                f"{record.width}x{record.height}"
            )
        return pixels

    def _bytes(self, name: str) -> bytes:
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


@dataclass(frozen=True)
class InputSize:
    """Size in pixels of an image as the network sees it, and what it was scaled by."""

    height: int
    width: int
    scale_x: float
    scale_y: float

    @property
    def scale(self) -> tuple[float, float]:
        """(sx, sy): pixels of the network's input for one of the original image."""
        return self.scale_x, self.scale_y


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """The size that an image is brought to: short side as the recipe says, unless the long one would be too long."""
    short = short_side if short_side is not None else options.short_sides[-1]
    scale = min(short / min(height, width), options.long_side / max(height, width))
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height)


def network_input(pixels: np.ndarray, size: InputSize, options: InputOptions) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, size.height, size.width) float32, resized (bilinear) and normalised."""
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()
    if image.shape[1:] != (size.height, size.width):
        image = F.interpolate(
            image[None], size=(size.height, size.width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    mean, std = torch.tensor(options.mean), torch.tensor(options.std)
    return (image - mean[:, None, None]) / std[:, None, None]
