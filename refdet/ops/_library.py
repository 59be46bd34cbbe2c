"""Load the compiled kernels, the extension module ``refdet/_C``, if they were built."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parents[1]  # refdet/
_FILE_NAME = f"_C{EXTENSION_SUFFIXES[0]}"
_BUILD_HINT = "pip install --no-build-isolation . builds them"


def _is_disabled() -> bool:
    return os.environ.get("REFDET_NO_EXT") == "1"


def _is_built() -> bool:
    """Whether there is an extension module, even if it cannot be loaded."""
    return (_FOLDER / _FILE_NAME).exists()


def load(folder: Path) -> frozenset[str]:
    """Load the kernels in ``folder`` as ``torch.ops.refdet`` and return the device types they support.

    The set is empty, and `refdet.ops` uses plain PyTorch, if the extension was not built, if it cannot be loaded (with
    a warning; for example, it was built with another torch), or with ``REFDET_NO_EXT=1`` in the environment.
    """
    path = folder / _FILE_NAME
    if _is_disabled() or not path.exists():
        return frozenset()
    try:
        torch.ops.load_library(path)
        cuda = torch.ops.refdet.has_cuda()
        # an extension built from older sources lacks a newer operator, or rejects a newer way to call one
        _ = torch.ops.refdet.nms_padded
        torch.ops.refdet.match_boxes(torch.zeros(1, 0, 4), torch.zeros(1, 0, 4))
        if not torch._C._dispatch_has_kernel_for_dispatch_key("refdet::roi_pool", "Autograd"):
            raise RuntimeError("built from older sources: its RoI pooling has no gradient")
    except (OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"{path.name} does not load with torch {torch.__version__} ({reason}); falling back to plain PyTorch, "
            "which is slower. Reinstall refdet to rebuild it.",
            stacklevel=2,
        )
        return frozenset()
    return frozenset(("cpu", "cuda") if cuda else ("cpu",))


DEVICES = load(_FOLDER)
"""Device types with compiled kernels that were loaded."""


def describe_kernels() -> str:
    """Which compiled kernels are in use, for the first line of a run and ``refdet --version``."""
    if _is_disabled():
        return "kernels switched off by REFDET_NO_EXT=1 (plain PyTorch instead, slower)"
    if not DEVICES:
        state = "compiled, but they do not load" if _is_built() else "not compiled"
        return f"kernels {state} (plain PyTorch instead, slower; {_BUILD_HINT})"
    if "cuda" in DEVICES:
        return "kernels compiled for CPU and CUDA"
    if not torch.cuda.is_available():
        return "kernels compiled for the CPU only"
    return f"kernels compiled for the CPU only (plain PyTorch on the GPU, slower; REFDET_BUILD_CUDA=1 {_BUILD_HINT})"


@functools.cache
def warn_without_cuda_kernels(device: torch.device) -> None:
    """Log a warning, once per GPU, if there are no compiled kernels for it and ``REFDET_NO_EXT`` is not set.

    The fallbacks give the same results, but their NMS synchronizes with the GPU at every block of boxes.
    """
    if device.type == "cuda" and "cuda" not in DEVICES and not _is_disabled():
        if DEVICES:
            reason = "no GPU or no nvcc was found when it was built"
        else:
            reason = "its compiled kernels do not load" if _is_built() else "it was installed without compiling them"
        log.warning(
            "note: refdet has no compiled kernels for %s, because %s: computing with plain PyTorch, which gives the "
            "same results but is slower; REFDET_BUILD_CUDA=1 %s",
            device,
            reason,
            _BUILD_HINT,
        )
