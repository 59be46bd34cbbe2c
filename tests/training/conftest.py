"""Fixtures of trainings in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_examples import noise_images, trained
from process_groups import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts trainings in several processes."""
    with Launcher() as started:
        yield started


@pytest.fixture(scope="session")
def noise(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, instances, and a detector "weights" to start from."""
    root = tmp_path_factory.mktemp("noise")
    noise_images(root)
    trained(launcher, root, "weights", 1, "train.steps=3", "model.norm=batch")
    return root
