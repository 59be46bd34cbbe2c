"""`ImageSource`: the images of a list, found in a folder or zip and read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import UnidentifiedImageError

from refdet.data.coco import ImageRecord
from refdet.data.image_decoder import SizeError, decode, most_bytes
from refdet.data.image_files import ImageFiles, open_files
from refdet.errors import InputError, RuntimeFailure, is_of_the_machine
from refer.image_lookup import FileNames, Key, Match

log = logging.getLogger(__name__)

_MOST_UNDECLARED_BYTES = 1 << 28  # of a file whose image has no declared size


class ImageError(InputError):
    """One image cannot be used; the message names the file and why."""


class ImageSource:
    """A folder of images, or a zip of them such as COCO's own. Safe to hand to worker processes and threads.

    `locate` (or `check`) is given the whole list first, since which file one image means can depend on the others; see
    `refer.image_lookup` for the rule.

    Attributes:
        path: the folder or zip.
        exif: see `refdet.data.image_decoder.EXIF`.
        oriented: files read so far, in this process, that have an EXIF orientation other than 1 -> which.
    """

    def __init__(self, files: ImageFiles, exif: str = "ignore") -> None:
        self.path, self.exif = files.path, exif
        self.oriented: dict[str, int] = {}
        self._files = files
        listing, root = files.listing, files.path.absolute()
        root = root.with_suffix("") if root.is_file() else root
        paths = [*listing.files, *listing.unusable]
        self._names = FileNames(paths, root.parts, listing.linked, files.same)
        self._located: dict[Key, Match] = {}

    @classmethod
    def open(cls, path: str | Path, exif: str = "ignore") -> ImageSource:
        """List a folder (with its folders, through links) or a zip.

        Raises:
            InputError: there is no such thing, or the zip is damaged.
            RuntimeFailure: the disk or network fails.
        """
        files = open_files(Path(path))
        unread, above = files.listing.unread, files.listing.above
        if unread:
            log.warning("note: --images %s: %d of its folders cannot be listed, the first is %s (%s)",
                        path, len(unread), unread[0][0], unread[0][1].strerror)  # fmt: skip
        if above:
            log.warning("note: --images %s: the link %s leads to a folder above and is not followed", path, above[0])
        source = cls(files, exif)
        log.info("--images %s: %d files", path, len(source._names))
        return source

    def locate(self, records: Sequence[ImageRecord], listed: Iterable[ImageRecord] = ()) -> list[str]:
        """Find the files of some images. Those that lie under another folder than their name gives are noted.

        Args:
            listed: all images of the list that ``records`` are of, where these are not all.

        Returns:
            For each image that has no file its name and why, in the order of ``records``.
        """
        both = (*records, *listed)
        found = self._names.locate(_sought(record) for record in both if record.file_name or record.by_id)
        self._located.update({key: self._usable(match) for key, match in found.items()})
        matches = [self._match(record) for record in records]
        moved = [(r, match) for r, match in zip(records, matches, strict=True) if match.elsewhere and match.path]
        if moved:
            log.warning(
                "note: --images %s: %d of %d images lie under another folder than their file_name gives, the first is "
                "%s, read from %s", self.path, len(moved), len(records), moved[0][0].file_name, moved[0][1].path,
            )  # fmt: skip
        return [
            f"{_named(record)} ({match.reason})"
            for record, match in zip(records, matches, strict=True)
            if match.path is None
        ]

    def find(self, record: ImageRecord) -> str | None:
        """The path, inside the folder or zip, of an image; None if it has none."""
        return self._match(record).path

    def why_missing(self, record: ImageRecord) -> str:
        """Why an image has no file; "" where it has one."""
        return self._match(record).reason

    def check(self, records: Sequence[ImageRecord], listed_in: Path, listed: Iterable[ImageRecord] = ()) -> None:
        """`locate`, and see that every image is there, before hours of work find out.

        Raises:
            InputError: how many are not, and the first.
        """
        if missing := self.locate(records, listed):
            self.refuse_missing(records, missing, listed_in)

    def refuse_missing(self, records: Sequence[ImageRecord], missing: Sequence[str], listed_in: Path) -> NoReturn:
        """InputError for what `locate` gave of a list."""
        unclear = [record for record in records if self._match(record).unclear]
        if unclear:
            what = f"{_named(unclear[0])}: {self.why_missing(unclear[0])}"
            raise InputError(
                f"--images {self.path}: {what} (so it is with {len(unclear)} of the {len(records)} images of "
                f"{listed_in.name}); give the folder that holds the images alone, or name the folder in each file_name"
            )
        raise InputError(
            f"--images {self.path}: {len(missing)} of the {len(records)} images of {listed_in.name} are not there, "
            f"the first is {missing[0]}, among its {len(self._names)} files; give the folder or zip that holds them all"
        )

    def read(self, record: ImageRecord) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB, of the height and width that the record gives.

        Greyscale, palette and CMYK images become RGB, of 16 bits the upper 8 are kept, transparency is left out, and of
        an animation the first picture is read. EXIF orientation is applied only if the source was opened so: COCO's
        boxes are drawn on the pixels as they are stored.

        Raises:
            ImageError: not found, not decodable, or of another size.
            RuntimeFailure: the machine could not read it, which says nothing of the image: a disk or network that
                fails, too many open files, no memory.
        """
        match = self._match(record)
        if match.path is None:
            raise ImageError(f"{self.path}: no file for image {record.id}, {_named(record)}: {match.reason}")
        name, height, width = match.path, record.height, record.width
        try:
            decoded = decode(self.data(name, height, width), height, width, self.exif)
        except RuntimeFailure:
            raise
        except SizeError as error:
            if error.orientation != 1:
                self.oriented[name] = error.orientation
            raise ImageError(f"{self.path}/{name}: {error}") from None
        except Exception as error:  # decoders of damaged and hostile files fail in ways that nobody lists
            self.refuse_unread(name, error)
            raise ImageError(
                f"{self.path}/{name}: not a readable image ({why_unreadable(error)}); "
                "replace it, or take it out of the instances file"
            ) from error
        if decoded.orientation != 1:
            self.oriented[name] = decoded.orientation
        return decoded.pixels

    def size(self, name: str) -> int:
        """The bytes of a file under a name that `find` gave, by its folder or zip; no more are read."""
        return self._files.size(name)

    def data(self, name: str, height: int = 0, width: int = 0) -> bytes:
        """The bytes of a file under a name that `find` gave, if they can be an image of a height and width, 0 for any.

        Raises:
            OSError, and what zipfile raises: it cannot be read, or is far too large for an image.
            RuntimeFailure: the zip as a whole is no longer there.
        """
        return self._files.read(name, most_bytes(height, width) if height and width else _MOST_UNDECLARED_BYTES)

    def refuse_unread(self, name: str, error: Exception) -> None:
        """RuntimeFailure where what kept a file from being read is not the file's fault."""
        gone = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError) and self._files.lost(name)
        if gone or is_of_the_machine(error):
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RuntimeFailure(
                f"{self.path}/{name}: cannot be read now ({what}): that is not the image's fault; see to the disk, "
                "the network or memory"
            ) from error

    def oriented_among(self, records: Sequence[ImageRecord]) -> dict[str, int]:
        """Those of ``oriented`` that are the files of some images."""
        names = (self.find(record) for record in records)
        return {name: self.oriented[name] for name in names if name in self.oriented}

    def _match(self, record: ImageRecord) -> Match:
        if not record.file_name and not record.by_id:
            return Match(None, "it has no file_name, and its entry says that its id is no COCO id")
        key: Key = record.file_name or record.id
        if key not in self._located:  # of a list that is this image alone
            found = self._names.locate([_sought(record)])
            self._located[key] = self._usable(found[key])
        return self._located[key]

    def _usable(self, match: Match) -> Match:
        why = None if match.path is None else self._files.listing.unusable.get(match.path)
        return match if why is None else Match(None, f"{match.path} is {why}")


def _sought(record: ImageRecord) -> tuple[int, str]:
    return record.id, record.file_name


def _named(record: ImageRecord) -> str:
    """What an image is sought by, for people."""
    return record.file_name or f"id {record.id} without a file_name"


def why_unreadable(error: Exception) -> str:
    """What kept a file from being decoded."""
    # Pillow's own text for this one is the address of a buffer
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
