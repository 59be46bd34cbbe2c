"""REFDET_NO_EXT=1: the ops have no kernels, and give the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fallback_cases
import pytest
import torch
from fallback_cases import CASES
from pooling_examples import CLOSE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of a process without the extension."""
    path: Path = tmp_path_factory.mktemp("fallbacks") / "answers.pt"
    environment = {**os.environ, "REFDET_NO_EXT": "1"}
    subprocess.run([sys.executable, fallback_cases.__file__, path], check=True, env=environment)
    answers: dict[str, Any] = torch.load(path)
    return answers


@pytest.mark.parametrize("name", CASES)
def test_without_the_extension_the_answer_is_the_same(without: dict[str, Any], name: str) -> None:
    found = CASES[name]()
    if name == "pooled":
        torch.testing.assert_close(without[name], found, **CLOSE)
    else:
        assert without[name] == found
