"""``refdet --version``: the versions and the device, for bug reports."""

from __future__ import annotations

import platform

import refdet


def versions() -> list[str]:
    """Lines with the versions of refdet and PyTorch, the default device and the state of the kernels."""
    lines = [f"refdet, version {refdet.__version__}"]
    try:
        import torch

        from refdet.device import describe_device
        from refdet.ops._library import describe_kernels
    except (ImportError, OSError) as error:  # possibly what the user is trying to find out
        return [*lines, f"PyTorch cannot be imported: {error}"]
    return [
        *lines,
        f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        f"device: {describe_device(None)}",
        describe_kernels(),
    ]
