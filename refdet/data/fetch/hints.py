"""Name the command that downloads a missing file."""

from __future__ import annotations

from pathlib import Path

from refdet.data.fetch.catalog import ITEMS
from refdet.errors import InputError


def how_to_fetch(path: Path) -> str:
    """Return the end of a message about a missing file: the command that downloads it, "" if there is none.

    Args:
        path: the missing file or folder, recognized by its name: an instances file, or images in a folder or zip.
    """
    for item in ITEMS:
        # not REFER's files, whose names are the same in each dataset, nor Parquet files, which need a conversion
        names = {Path(name).name for name in item.outputs if not (item.dataset or item.magic)}
        if path.name in names or (item.target_path is None and f"{path.name}.zip" in names):
            return f"; refdet fetch-data --only {item.name} downloads it"
    return ""


def check_fetched(path: Path) -> None:
    """Check that a file exists if `refdet fetch-data` can download it; other files are not checked.

    Raises:
        InputError: it does not exist; the message has the command that downloads it.
    """
    hint = how_to_fetch(path)
    if hint and not path.exists():
        raise InputError(f"{path}: no such file{hint}")
