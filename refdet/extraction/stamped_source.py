"""`StampedSource`: images that are recognized as replaced when an extraction resumes. No torch.

A stamp is the CRC-32 of the file from which an image's regions were computed, followed by its `ImageFiles.state`, which
changes whenever the file is replaced and can be compared without reading it. Shards hold the stamps of their images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import RuntimeFailure
from refdet.extraction.in_threads import map_in_threads
from refdet.extraction.steps import Stamp
from refdet.store.crc import crc32


class StampedSource(ImageSource):
    """A folder or zip of images that remembers the stamp of each file that it reads.

    Attributes:
        unchanged: image id -> stamp, of the files that `replaced` read and found to have the same contents.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stamps: dict[str, Stamp] = {}  # by the name of the file
        self._records: dict[int, ImageRecord] = {}
        self.unchanged: dict[int, Stamp] = {}

    def locate(self, records: Sequence[ImageRecord], all_records: Iterable[ImageRecord] = ()) -> list[str]:
        """As `ImageSource.locate`; `stamp_of` then knows the images by their ids."""
        self._records.update((record.id, record) for record in records)
        return super().locate(records, all_records)

    def data(self, name: str, height: int = 0, width: int = 0) -> bytes:
        """As `ImageSource.data`, remembering the stamp."""
        state = self._files.state(name)  # before the file is read: if it is replaced meanwhile, its state will differ
        contents = super().data(name, height, width)
        self._stamps[name] = (crc32(contents), *state)
        return contents

    def stamp_of(self, image_id: int) -> Stamp:
        """Stamp of the file that was read last for an image; () if none was."""
        record = self._records.get(image_id)
        name = None if record is None else self.find(record)
        return () if name is None else self._stamps.get(name, ())

    def replaced(self, stamps: Mapping[int, Stamp], known: Mapping[int, Stamp] | None = None) -> dict[int, str]:
        """Find the images whose files were replaced by others.

        A file is read only if its state differs, for example as it was copied. An image whose file is gone or cannot be
        read is not replaced.

        Args:
            stamps: earlier stamps by image id; unknown ones are not compared.
            known: `unchanged` of earlier searches, for other files with the same contents.

        Returns:
            Image id -> file, of the replaced ones in the order of ``stamps``.

        Raises:
            RuntimeFailure: the whole folder or zip is gone, or the disk, the network or a lack of memory is to blame.
        """
        files: dict[int, str] = {}
        for image_id, stamp in stamps.items():
            record = self._records.get(image_id)
            name = None if record is None or not stamp else self.find(record)
            if name is not None:
                files[image_id] = name

        def is_replaced(image_id: int) -> bool:
            name, stamp, record = files[image_id], stamps[image_id], self._records[image_id]
            other = (known or {}).get(image_id, ())
            try:
                state = self._files.state(name)  # before the file is read, as in `data`
                if state == stamp[1:] or (stamp[0], *state) == other:
                    return False
                contents = ImageSource.data(self, name, record.height, record.width)  # remembers no stamp
                if crc32(contents) != stamp[0]:
                    return True
                self.unchanged[image_id] = (stamp[0], *state)
                return False
            except RuntimeFailure:
                raise
            except Exception as error:  # zipfile can raise anything on a damaged zip
                self.raise_if_system_error(name, error)
                return False

        with closing(map_in_threads(is_replaced, list(files), "look for replaced images")) as found:
            return {image_id: name for (image_id, name), replaced in zip(files.items(), found, strict=True) if replaced}
