"""Programs that an export can be written for, by format; the first program of a format is its default."""

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
        InputError: the program does not read the format.
    """
    if consumer not in BY_FORMAT[format]:
        raise InputError(
            f"`consumer` {consumer}: cannot read `format='{format}'`; choose {', '.join(BY_FORMAT[format])}"
        )


def width_note(feature: str, width: int, consumer: str) -> list[str]:
    """A list of one note if a program expects features of another length, else []."""
    if width == WIDTH or consumer == "bottom-up-attention":  # which writes features for others, and expects no length
        return []
    return [f"{feature} has {width} values per region, but {consumer} expects {WIDTH}"]
