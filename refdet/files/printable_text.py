"""Text of files that others made (names, categories, remarks), made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text on one line, every character that is not shown as itself written out: ``\n``, ``\x1b``, ``\u202e``.

    Escape sequences would otherwise move the cursor or repaint what stands there, a new line could pass for one of
    refdet's own, and bidirectional controls would show letters in another order. Letters of all scripts stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
