"""Commands check their arguments before they import torch, which takes seconds."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = (
    "refdet.detector.checkpoint",
    "refdet.detector.feature_names",
    "refdet.config.recipe",
    "refdet.structures.provenance",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_modules_for_checking_arguments_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
