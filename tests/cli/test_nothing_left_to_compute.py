"""Extracting a complete part or store again says so and computes nothing; no Ray workers are started."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from detector_folder import DetectorFolder

from refdet.errors import InputError
from refdet.extraction import extract_on_ray


def test_the_last_part_completes_the_store_and_complete_parts_say_so(tmp_path: Path) -> None:
    folder, out = DetectorFolder(tmp_path, 3), tmp_path / "a.h5"

    def extract_part(part: str) -> str:
        done = folder.extract(out, "--part", part, "--regions", "annotations")
        assert done.exit_code == 0, done.output
        return done.stdout

    # the three images are one shard, which belongs to part 1
    assert extract_part("2/2") == "part 2/2 was complete: 0 images, 0 regions\n"
    assert "images/s" in extract_part("1/2")
    assert extract_part("2/2") == f"{out} is complete: 3 images, 3 regions\n"


def test_resuming_on_ray_starts_workers_only_if_images_can_be_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = DetectorFolder(tmp_path, 3), tmp_path / "a.h5"
    image = folder.images / "1.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:60])
    assert folder.extract(out).exit_code == 0

    def fail_to_connect(address: str, device: str | None) -> NoReturn:
        raise InputError("workers are started")

    monkeypatch.setattr(extract_on_ray, "connect", fail_to_connect)
    done = folder.extract(out, "--ray", "local", "--resume")
    assert done.exit_code == 0 and f"{out} is complete\n" in done.stderr  # its broken image is still broken
    image.write_bytes(intact)
    done = folder.extract(out, "--ray", "local", "--resume")
    assert done.exit_code == 2 and "error: workers are started" in done.output
