"""`ImageSource`: find and read the images of a list in a folder or zip."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from PIL import UnidentifiedImageError

from refdet.data.coco import ImageRecord
from refdet.data.image_decoder import SizeError, check_exif_mode, decode, max_file_size
from refdet.data.image_files import ImageFiles, open_files
from refdet.errors import InputError, RuntimeFailure, is_system_error
from refdet.files.short_text import agree, format_count, format_share
from refer.image_lookup import FileNames, Key, Match

log = logging.getLogger(__name__)

S = TypeVar("S", bound="ImageSource")

MAX_UNDECLARED_BYTES = 1 << 28
"""Maximum file size in bytes of an image whose height and width are unknown."""


class ImageError(InputError):
    """An unusable image; the message has the file and the reason."""


class ImageSource:
    """A folder or zip of images. Safe to pass to worker processes and threads.

    Call `locate` or `check` with all images of the list first, as the file of an image can depend on the other images
    (`refer.image_lookup`).

    Args:
        files: the folder or zip.
        exif: "ignore" to keep pixels as stored, or "apply" to rotate them upright by their EXIF orientation.
        argument: name of the argument that gave the path, for messages.

    Raises:
        ArgumentError: ``exif`` is neither "ignore" nor "apply".

    Attributes:
        path: path of the folder or zip.
        exif: how EXIF orientation is handled.
        argument: name of the argument that gave the path.
        orientations: file -> EXIF orientation, of files with an orientation other than 1 that this process has read or
            that were added from other processes.
    """

    def __init__(self, files: ImageFiles, exif: str = "ignore", argument: str = "images") -> None:
        check_exif_mode(exif)
        self.path, self.exif, self.argument = files.path, exif, argument
        self.orientations: dict[str, int] = {}
        self._files = files
        listing, root = files.listing, files.path.absolute()
        root = root.with_suffix("") if root.is_file() else root  # a zip is looked up in like a folder of its name
        paths = [*listing.files, *listing.unusable]
        self._names = FileNames(paths, root.parts, listing.link_targets, files.are_same_file)
        self._located: dict[Key, Match] = {}

    @classmethod
    def open(cls: type[S], path: str | Path, exif: str = "ignore", argument: str = "images") -> S:
        """List a folder (recursively, following links) or a zip.

        Args:
            path: the folder or zip.
            exif: "ignore" to keep pixels as stored, or "apply" to rotate them upright by their EXIF orientation.
            argument: name of the argument that gave the path, for messages.

        Returns:
            The source.

        Raises:
            InputError: the path does not exist, or the zip is damaged.
            RuntimeFailure: a disk or network error.
        """
        files = open_files(Path(path), argument)
        unlisted, parent_links = files.listing.unlisted, files.listing.parent_links
        if unlisted:
            log.warning(
                "note: `%s` %s: %s cannot be listed, first: %s (%s)",
                argument,
                path,
                format_count(len(unlisted), "subfolder"),
                unlisted[0][0],
                unlisted[0][1].strerror,
            )
        if parent_links:
            log.warning("note: `%s` %s: link %s to a parent folder is not followed", argument, path, parent_links[0])
        source = cls(files, exif, argument)
        log.info("`%s` %s: %s", argument, path, format_count(len(source._names), "file"))
        return source

    def locate(self, records: Sequence[ImageRecord], all_records: Iterable[ImageRecord] = ()) -> list[str]:
        """Find the files of images, with a note about files found in another folder than their name says.

        Args:
            records: the images.
            all_records: all images of the list, if ``records`` are only a part of it.

        Returns:
            "NAME (REASON)" for each image without a file, in the order of ``records``.
        """
        to_locate = [record for record in (*records, *all_records) if record.file_name or record.by_id]
        located = self._names.locate(map(_lookup_key, to_locate))
        self._located.update({key: self._reject_unusable(match) for key, match in located.items()})
        matches = [self._match(record) for record in records]
        moved = [
            (record.file_name, match.path)
            for record, match in zip(records, matches, strict=True)
            if match.in_other_folder and match.path is not None
        ]
        if moved:
            log.warning(
                "note: `%s` %s: %s in another folder than the file_name says, first: %s, read from %s",
                self.argument,
                self.path,
                format_share(len(moved), len(records), "image", "is"),
                *moved[0],
            )
        return [
            f"{_display_name(record)} ({match.reason})"
            for record, match in zip(records, matches, strict=True)
            if match.path is None
        ]

    def find(self, record: ImageRecord) -> str | None:
        """Path of an image's file within the folder or zip, None if it has no file."""
        return self._match(record).path

    def why_missing(self, record: ImageRecord) -> str:
        """Return why an image has no file, "" if it has one."""
        return self._match(record).reason

    def check(self, records: Sequence[ImageRecord], listed_in: Path, all_records: Iterable[ImageRecord] = ()) -> None:
        """Find the files of images and check that none is missing.

        Args:
            records: the images.
            listed_in: the file that lists them, for error messages.
            all_records: all images of the list, if ``records`` are only a part of it.

        Raises:
            InputError: images are missing; the message has their number and the first one.
        """
        if missing := self.locate(records, all_records):
            self.raise_missing(records, missing, listed_in)

    def raise_missing(self, records: Sequence[ImageRecord], missing: Sequence[str], listed_in: Path) -> NoReturn:
        """Raise an InputError for missing images.

        Args:
            records: the images.
            missing: the result of `locate` for them.
            listed_in: the file that lists them.

        Raises:
            InputError: always.
        """
        ambiguous = [record for record in records if self._match(record).ambiguous]
        if ambiguous:
            first = f"{_display_name(ambiguous[0])}: {self.why_missing(ambiguous[0])}"
            raise InputError(
                f"`{self.argument}` {self.path}: {first} (the same for "
                f"{format_share(len(ambiguous), len(records), 'image')} in {listed_in.name}); "
                "give the folder that holds only the images, or add the folder to each file_name"
            )
        raise InputError(
            f"`{self.argument}` {self.path}: {format_share(len(missing), len(records), 'image')} in {listed_in.name} "
            f"{agree(len(missing), 'is')} missing among its {format_count(len(self._names), 'file')}, first: "
            f"{missing[0]}; give the folder or zip that holds them all"
        )

    def read(self, record: ImageRecord) -> np.ndarray:
        """Read an image.

        Grayscale, palette and CMYK images are converted to RGB, 16-bit channels are reduced to their upper 8 bits,
        transparency is dropped, and only the first frame of an animation is read. EXIF orientation is applied only if
        ``exif`` is "apply", as COCO's boxes refer to the pixels as stored.

        Args:
            record: the image.

        Returns:
            (H, W, 3) uint8 RGB of the record's height and width.

        Raises:
            ImageError: the image is missing, cannot be decoded or has another size.
            RuntimeFailure: a failure of the machine, not of the image: disk or network errors, too many open files or
                no memory.
        """
        match = self._match(record)
        if match.path is None:
            raise ImageError(f"{self.path}: no file for image {record.id}, {_display_name(record)}: {match.reason}")
        name, height, width = match.path, record.height, record.width
        try:
            decoded = decode(self.data(name, height, width), height, width, self.exif)
        except RuntimeFailure:
            raise
        except SizeError as error:
            if error.orientation != 1:
                self.orientations[name] = error.orientation
            raise ImageError(f"{self.path}/{name}: {error}") from None
        except Exception as error:  # decoders can raise anything on damaged or hostile files
            self.raise_if_system_error(name, error)
            raise ImageError(
                f"{self.path}/{name}: not a readable image ({why_unreadable(error)}); "
                "replace it or remove it from the instances file"
            ) from error
        if decoded.orientation != 1:
            self.orientations[name] = decoded.orientation
        return decoded.pixels

    def size(self, name: str) -> int:
        """Size in bytes of a file that `find` returned, without reading it."""
        return self._files.size(name)

    def data(self, name: str, height: int = 0, width: int = 0) -> bytes:
        """Read a file that `find` returned.

        Args:
            name: the file.
            height: declared height of the image in pixels, 0 if unknown.
            width: declared width of the image in pixels, 0 if unknown.

        Returns:
            Its contents.

        Raises:
            OSError: the file cannot be read, or is larger than `max_file_size` or, for an unknown size,
                `MAX_UNDECLARED_BYTES`; zipfile raises other exceptions too.
            RuntimeFailure: the zip can no longer be opened.
        """
        return self._files.read(name, max_file_size(height, width) if height and width else MAX_UNDECLARED_BYTES)

    def raise_if_system_error(self, name: str, error: Exception) -> None:
        """Raise a RuntimeFailure if the machine and not the file caused an error.

        Args:
            name: the file.
            error: the exception from reading the file.

        Raises:
            RuntimeFailure: the whole folder or zip is gone, or the disk, the network or a lack of memory is to blame.
        """
        gone = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError) and self._files.is_gone(name)
        if gone or is_system_error(error):
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RuntimeFailure(
                f"{self.path}/{name}: cannot be read now ({what}), though the image may be intact; check the disk, "
                "the network and memory"
            ) from error

    def orientations_of(self, records: Sequence[ImageRecord]) -> dict[str, int]:
        """Entries of ``orientations`` for the files of the given images."""
        names = (self.find(record) for record in records)
        return {name: self.orientations[name] for name in names if name in self.orientations}

    def _match(self, record: ImageRecord) -> Match:
        """The file of an image; on its own, without conflicts with others, if `locate` was not called with it."""
        if not record.file_name and not record.by_id:
            return Match(None, "no file_name, and its entry says that its id is not a COCO id")
        key: Key = record.file_name or record.id
        if key not in self._located:
            matches = self._names.locate([_lookup_key(record)])
            self._located[key] = self._reject_unusable(matches[key])
        return self._located[key]

    def _reject_unusable(self, match: Match) -> Match:
        """Replace the match of a file that cannot be read by one without a file."""
        why = None if match.path is None else self._files.listing.unusable.get(match.path)
        return match if why is None else Match(None, f"{match.path} is {why}")


def _lookup_key(record: ImageRecord) -> tuple[int, str]:
    """Id and file name, as `FileNames.locate` takes them."""
    return record.id, record.file_name


def _display_name(record: ImageRecord) -> str:
    """Human-readable name by which an image is looked up."""
    return record.file_name or f"id {record.id} without a file_name"


def why_unreadable(error: Exception) -> str:
    """Return the human-readable reason why a file could not be decoded."""
    # Pillow's own message for an unknown format has only the address of a buffer.
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
