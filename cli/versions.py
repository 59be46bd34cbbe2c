"""What ``refdet --version`` says: the versions and the machine that a bug report needs."""

from __future__ import annotations

import platform

import refdet


def versions() -> list[str]:
    """Lines: refdet's version, PyTorch's, the device that is used by default, and the state of the kernels."""
    lines = [f"refdet, version {refdet.__version__}"]
    try:
        import torch

        from refdet.device import described
        from refdet.ops._library import kernels_state
    except (ImportError, OSError) as error:  # whoever asks may be looking for just that
        return [*lines, f"PyTorch cannot be imported: {error}"]
    return [
        *lines,
        f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        f"device: {described(None)}",
        kernels_state(),
    ]
