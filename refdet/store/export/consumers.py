"""Programs that an export can be written for, by format; the first one is the default."""

from __future__ import annotations

from refdet.errors import InputError

NPZ = ("bottom-up-attention", "openvqa", "openvqa-gqa", "mcan", "rosita")
LMDB = ("vilbert-multi-task", "vilbert-beta", "uniter")
BY_FORMAT = {"npz": NPZ, "lmdb": LMDB}

WIDTH = 2048  # length of the feature vectors that these programs were trained with


def check_consumer(format: str, consumer: str) -> None:
    """Check that a program reads a format.

    Args:
        format: the format, a key of `BY_FORMAT`.
        consumer: the program.

    Raises:
        InputError: it does not.
    """
    if consumer not in BY_FORMAT[format]:
        raise InputError(
            f"`consumer` {consumer}: cannot read `format='{format}'`; choose {', '.join(BY_FORMAT[format])}"
        )


def width_note(feature: str, width: int, consumer: str) -> list[str]:
    """A note if a program expects features of another length, else []."""
    if width == WIDTH or consumer == "bottom-up-attention":
        return []
    return [f"{feature} has {width} values per region, but {consumer} expects {WIDTH}"]
