"""The folder of an export: wholly there or not at all, and the files in it that are written piece by piece."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refdet.atomic import flush
from refdet.errors import InputError, WorkError, is_disk_full


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to write to, which becomes ``path`` when the block ends without an error.

    A process that is killed leaves the temporary folder, whose name begins with a dot, and nothing under ``path``.

    Raises:
        InputError: ``path`` is a file or a folder that is not empty.
        WorkError: the disk is full.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {path}: is there and not an empty folder; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        os.sync()  # once for all: an fsync for each of 28,000 files would take minutes
        temporary.replace(path)
        flush(path.parent)  # the rename itself
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise WorkError(f"{path}: no space left on the disk; free some and export again") from error
        raise


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list whose items are given one after the other, so that memory holds one of them."""
    with path.open("w", encoding="utf-8") as file:
        between = "[\n"

        def add(item: Any) -> None:
            nonlocal between
            file.write(between + json.dumps(item))
            between = ",\n"

        yield add
        file.write("[]\n" if between == "[\n" else "\n]\n")
