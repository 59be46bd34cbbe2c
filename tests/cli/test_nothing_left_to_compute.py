"""Of what is complete a line says so: of a part, and of a store before workers on a Ray cluster are started for it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from detector_folder import DetectorFolder

from refdet.errors import InputError
from refdet.extraction import extract_on_ray


def test_of_a_part_there_is_one_line(tmp_path: Path) -> None:
    folder, out = DetectorFolder(tmp_path, 3), tmp_path / "a.h5"
    for part, says in [
        ("2/2", "part 2/2 was complete: 0 images, 0 regions\n"),
        ("1/2", None),
        ("2/2", f"{out} is complete: 3 images, 3 regions\n"),
    ]:
        done = folder.extract(out, "--part", part, "--regions", "annotations")
        assert done.exit_code == 0, done.output
        assert done.stdout == says if says else "images/s" in done.stdout


def test_a_complete_store_needs_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = DetectorFolder(tmp_path, 3), tmp_path / "a.h5"
    image = folder.images / "1.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:60])
    assert folder.extract(out).exit_code == 0

    def starts(address: str, device: str | None) -> NoReturn:
        raise InputError("workers are started")

    monkeypatch.setattr(extract_on_ray, "connect", starts)
    done = folder.extract(out, "--ray", "local", "--resume")
    assert done.exit_code == 0 and f"{out} is complete\n" in done.stderr
    image.write_bytes(intact)
    done = folder.extract(out, "--ray", "local", "--resume")
    assert done.exit_code == 2 and "error: workers are started" in done.output
