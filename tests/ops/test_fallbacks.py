"""With REFDET_NO_EXT=1, the ops use their PyTorch fallbacks and return the same results."""

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
def results_without_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of `CASES` in a process that does not load the extension."""
    path: Path = tmp_path_factory.mktemp("fallbacks") / "results.pt"
    environment = {**os.environ, "REFDET_NO_EXT": "1"}
    subprocess.run([sys.executable, fallback_cases.__file__, path], check=True, env=environment)
    results: dict[str, Any] = torch.load(path)
    return results


@pytest.mark.parametrize("name", CASES)
def test_fallbacks_return_what_the_kernels_return(results_without_kernels: dict[str, Any], name: str) -> None:
    found = CASES[name]()
    if name == "pooled":
        torch.testing.assert_close(results_without_kernels[name], found, **CLOSE)
    else:
        assert results_without_kernels[name] == found
