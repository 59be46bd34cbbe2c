"""What an export did, and the `provenance.json` it leaves beside its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refdet.files.atomic import write_json
from refdet.files.version import __version__
from refdet.store.export.source import Source

NAME = "provenance.json"


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        format: "mattnet", "npz" or "lmdb".
        images, regions: how many were written.
        files: what lies in the folder; of files that there is one of for each image, the pattern of their names.
        empty: image id -> why it has no regions.
        notes: what the given inputs could not make, and what a consumer will stumble over; for people.
    """

    format: str
    images: int
    regions: int
    files: list[str]
    empty: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def write_record(folder: Path, done: Exported, options: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Write `provenance.json`: what was exported from which files, and what their detectors were trained on."""
    described = {name: source.describe() for name, source in sources.items()}
    record = {"refdet": __version__, "export": done.to_json(), "options": dict(options), "sources": described}
    write_json(folder / NAME, record)
