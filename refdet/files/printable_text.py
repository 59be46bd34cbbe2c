"""Make text from untrusted files (names, categories, notes) safe to print."""

from __future__ import annotations


def escape_unprintable(text: str) -> str:
    r"""Escape every character that is not printable, such as ``\n``, ``\x1b`` and ``\u202e``.

    Escape sequences could otherwise move the cursor or overwrite the screen, new lines could pass for output of
    refdet, and bidirectional controls could reorder letters. Letters of all scripts are kept.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
