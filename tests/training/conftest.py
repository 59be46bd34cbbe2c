"""Fixtures for training in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_examples import noise_images, trained
from process_groups import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """A launcher of training runs in several processes, shared as it takes seconds to start."""
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def noise(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images``, ``instances.json``, and a run directory ``weights`` to start from."""
    root = tmp_path_factory.mktemp("noise")
    noise_images(root)
    trained(launcher, root, "weights", 1, "train.steps=3", "model.norm=batch")
    return root
