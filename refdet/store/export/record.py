"""Result of an export and its `provenance.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refdet.files.atomic import write_json
from refdet.files.version import __version__
from refdet.store.export.source import Source


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        format: "mattnet", "npz", "lmdb", "coco" or "fiftyone".
        images: number of images that were written.
        regions: number of regions that were written.
        files: names of the files in the folder, or a pattern for files per image.
        empty: image id -> why it has no regions.
        notes: human-readable notes about missing files and limitations of the program.
    """

    format: str
    images: int
    regions: int
    files: list[str]
    empty: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return asdict(self)


def write_record(folder: Path, result: ExportResult, options: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Write `provenance.json`: the export, its source files and the provenance of their detectors.

    Args:
        folder: the folder of the export.
        result: result of the export.
        options: options of the export.
        sources: the stores by their role, "features" or "annotations".
    """
    source_records = {name: source.describe() for name, source in sources.items()}
    record = {"refdet": __version__, "export": result.to_json(), "options": dict(options), "sources": source_records}
    write_json(folder / "provenance.json", record)
