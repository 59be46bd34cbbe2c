"""Loads the compiled kernels, refdet/_C, if they were built."""

from __future__ import annotations

import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


def load(folder: Path) -> frozenset[str]:
    """Load the kernels in ``folder`` as ``torch.ops.refdet`` and return the device types that they support.

    Empty if the extension was not built, if it cannot be loaded (with a warning; for example, it was built with
    another torch), or with ``REFDET_NO_EXT=1`` in the environment. `refdet.ops` then uses plain PyTorch.
    """
    path = folder / f"_C{EXTENSION_SUFFIXES[0]}"
    if os.environ.get("REFDET_NO_EXT") == "1" or not path.exists():
        return frozenset()
    try:
        torch.ops.load_library(path)
        cuda = torch.ops.refdet.has_cuda()
        # the latest change of a kernel: those built from older sources refuse it
        torch.ops.refdet.match_boxes(torch.zeros(1, 0, 4), torch.zeros(1, 0, 4))
    except (OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"{path.name} does not load with torch {torch.__version__} ({reason}); falling back to plain PyTorch, "
            "which is slower. Reinstall refdet to rebuild it.",
            stacklevel=2,
        )
        return frozenset()
    return frozenset(("cpu", "cuda") if cuda else ("cpu",))


DEVICES = load(Path(__file__).resolve().parents[1])
"""Device types with compiled kernels."""


def kernels_state() -> str:
    """The compiled kernels in use, for the first line of a run and ``refdet --version``."""
    if not DEVICES:
        return "kernels not compiled (plain PyTorch instead, slower; pip install --no-build-isolation . builds them)"
    return "kernels compiled for CPU and CUDA" if "cuda" in DEVICES else "kernels compiled for the CPU only"
