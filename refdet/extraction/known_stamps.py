"""Stamps of files that were found to have the contents from which their regions were computed. No torch.

Their times or sizes differ from those in the shards, for example as they were copied. ``stamps.json`` beside the shards
keeps them, so that not every session reads these files again. It may be lost or damaged without harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from refdet.errors import InputError
from refdet.extraction.steps import Stamp
from refdet.files.atomic import write_json
from refdet.files.json_files import read_small_json

_FILE_NAME = "stamps.json"


def read_known_stamps(folder: Path) -> dict[int, Stamp]:
    """Read the stamps beside the shards in a folder: image id -> stamp; {} if there are none or they are damaged."""
    with suppress(InputError, ValueError, TypeError, AttributeError):
        stamps = {int(id_): tuple(stamp) for id_, stamp in read_small_json(folder / _FILE_NAME).items()}
        if all(type(value) is int for stamp in stamps.values() for value in stamp):
            return stamps
    return {}


def add_known_stamps(folder: Path, stamps: Mapping[int, Stamp]) -> None:
    """Add stamps, image id -> stamp, to those beside the shards in a folder, unless another process has removed it."""
    if stamps and folder.is_dir():
        with suppress(OSError):  # without the file, the images are only read again
            write_json(folder / _FILE_NAME, {**read_known_stamps(folder), **stamps})
