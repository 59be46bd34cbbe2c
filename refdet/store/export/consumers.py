"""The programs that an export can be written for, by format; the first of each is the default."""

from __future__ import annotations

from refdet.errors import InputError

NPZ = ("bottom-up-attention", "openvqa", "openvqa-gqa", "mcan", "rosita")
LMDB = ("vilbert-multi-task", "vilbert-beta", "uniter")
BY_FORMAT = {"npz": NPZ, "lmdb": LMDB}

WIDTH = 2048  # of the features that all of these were trained with


def check_consumer(format_: str, consumer: str) -> None:
    """InputError for a program that does not read this format."""
    if consumer not in BY_FORMAT[format_]:
        raise InputError(f"--for {consumer}: does not read --format {format_}; choose {', '.join(BY_FORMAT[format_])}")


def width_note(feature: str, width: int, consumer: str) -> list[str]:
    """A note where a program takes features of another width, [] where it does not or takes any."""
    if width == WIDTH or consumer == "bottom-up-attention":
        return []
    return [f"{feature} has {width} numbers a region; {consumer} takes {WIDTH}"]
