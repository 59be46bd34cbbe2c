"""The processes that compute an unfinished extraction: its parts, or the workers of a Ray engine. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.extraction.part import read_progress_of_parts
from refdet.files.atomic import write_json
from refdet.files.json_files import read_small_json

WORKERS = "workers.json"  # written by the driver of a Ray engine
_FIELDS: dict[str, tuple[type, ...]] = {
    "worker": (str,),
    "host": (str,),
    "pid": (int,),
    "state": (str,),
    "shards": (list,),
    "finished": (int,),
    "images": (int,),
    "images_per_second": (int, float),
}


def read_workers(folder: Path) -> list[dict[str, Any]]:
    """Read the progress of the processes that compute the shards in a folder.

    Args:
        folder: folder of the shards.

    Returns:
        A JSON object for each process; a value is None if it is unknown or the file is damaged.

        - "worker": name of the part or worker; "host" and "pid": host name and process id
        - "state": "computing", "finished" or "stopped"
        - "shards": numbers of the shards assigned to a Ray worker
        - "finished": number of finished images; "images": number of all images of a part
        - "images_per_second": speed of the process
        - "seconds_ago": seconds since the process last finished a shard, or since it started
    """
    return [_checked_fields(worker) for worker in [*read_progress_of_parts(folder), *_read_engine_workers(folder)]]


def write_workers(folder: Path, token: str, workers: Sequence[Mapping[str, Any]]) -> None:
    """Write the progress of the workers of a Ray engine, if the folder exists.

    Args:
        folder: folder of the shards.
        token: random text by which a worker recognizes that it sees this folder.
        workers: progress of each worker, as `read_workers` returns it but with "updated", a time in seconds since the
            epoch, instead of "seconds_ago".
    """
    with suppress(FileNotFoundError):
        write_json(folder / WORKERS, {"token": token, "workers": list(workers)})


def read_token(folder: Path) -> str | None:
    """Read the token of the driver in a folder, None if there is none."""
    token = _read_file(folder).get("token")
    return token if isinstance(token, str) else None


def _read_engine_workers(folder: Path) -> list[Any]:
    """Read what `write_workers` wrote about the workers, unchecked; [] if there are none."""
    workers = _read_file(folder).get("workers")
    return workers if isinstance(workers, list) else []


def _read_file(folder: Path) -> dict[str, Any]:
    try:
        content = read_small_json(folder / WORKERS, finite=False)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def _checked_fields(worker: Any) -> dict[str, Any]:
    """The fields of a worker as `read_workers` returns them, None for each that is missing or has a wrong type."""
    worker = worker if isinstance(worker, dict) else {}
    checked = {
        name: value if type(value := worker.get(name)) in types and _is_finite(value) else None
        for name, types in _FIELDS.items()
    }
    updated = worker.get("updated")
    is_time = type(updated) in (int, float) and _is_finite(updated)
    return {**checked, "seconds_ago": round(max(0.0, time.time() - updated), 1) if is_time else None}


def _is_finite(value: Any) -> bool:
    """Whether a value is text, a list of integers, or a number that is finite also as a float."""
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False
