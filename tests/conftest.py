"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real COCO images and refs beside the repository, where there is one."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data" / "coco_mini").is_dir():
        pytest.skip("no real data beside the repository")
    return path


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded dataset: COCO and REFER layouts with 60 train images."""
    from refdet.data import shapes

    return shapes.write(tmp_path_factory.mktemp("shapes") / "data", seed=0, images=60)


@pytest.fixture(scope="session")
def instances(shapes_root: Path) -> Path:
    """The val instances of the embedded dataset."""
    return shapes_root / "annotations" / "instances_val2014.json"
