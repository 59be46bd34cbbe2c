"""Meanings of referring expressions, and the things of a scene that they can refer to.

Every word has a clear and a borderline range ("small" at 32 px is arguable). An expression is interpreted strictly,
without the borderline range, and loosely, with it, and used only if both interpretations give the same single thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refdet.data.shapes.scene import Thing

# In pixels: longest side of the box at which small ends and large begins, and the borderline range on both sides of it.
SMALL, LARGE, SIZE_MARGIN = 31.0, 45.0, 3.0
# "biggest" and "smallest": ratio of the longest sides to that of any rival. Positions: pixels between box centers.
SIZE_RATIO, PLACE_MARGIN = 1.2, 8.0
# "next to": maximum gap between the boxes in pixels, and the borderline range on both sides of it.
NEAR, NEAR_MARGIN = 16.0, 8.0

SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left of", "right of", "above", "below")
NEXT_TO = "next to"


@dataclass(frozen=True)
class Meaning:
    """The content of an expression; None for parts it does not mention.

    `size` is small, large, smallest or biggest. `place` is one of SIDES or CORNERS, and `rank` counts from there
    ("second from the left"). `relation` is one of DIRECTIONS or NEXT_TO, and `other` is what it relates to.
    """

    category: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None
    rank: int = 1
    relation: str | None = None
    other: Meaning | None = None


def center(thing: Thing) -> tuple[float, float]:
    """Center of a thing's box, x y in pixels."""
    return (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2


def longest_side(thing: Thing) -> float:
    """Longest side of a thing's box in pixels."""
    return max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])


def find_referent(meaning: Meaning, things: Sequence[Thing]) -> int | None:
    """Return the index of the thing that an expression refers to, None if there is none or it is ambiguous."""
    strict = find_matches(meaning, things, loose=False)
    return strict[0] if len(strict) == 1 and strict == find_matches(meaning, things, loose=True) else None


def find_matches(meaning: Meaning, things: Sequence[Thing], loose: bool) -> list[int]:
    """Return the indices of the things that match clearly, or with `loose` at least arguably. Crowds never match."""
    fitting = _match_attributes(meaning, things, loose)
    if meaning.size in ("smallest", "biggest") or meaning.place is not None:
        # strictly the leftmost star is left of all that are arguably stars; loosely, of all that clearly are
        rivals = _match_attributes(meaning, things, not loose)
        fitting = [i for i in fitting if _is_extreme(meaning, things, i, [j for j in rivals if j != i], loose)]
    if meaning.relation is not None and meaning.other is not None:
        anchor = find_referent(meaning.other, things)
        if anchor is None:
            return []
        fitting = [i for i in fitting if i != anchor and is_related(meaning.relation, things[i], things[anchor], loose)]
    return fitting


def _match_attributes(meaning: Meaning, things: Sequence[Thing], loose: bool) -> list[int]:
    """Indices of the things with the category, color, and small or large size of a meaning, if it mentions them."""
    tolerance = SIZE_MARGIN if loose else -SIZE_MARGIN
    matching = []
    for i, thing in enumerate(things):
        if thing.crowd or meaning.category not in (None, thing.category.name):
            continue
        if meaning.color not in (None, thing.color):
            continue
        if meaning.size == "small" and longest_side(thing) > SMALL + tolerance:
            continue
        if meaning.size == "large" and longest_side(thing) < LARGE - tolerance:
            continue
        matching.append(i)
    return matching


def _is_extreme(meaning: Meaning, things: Sequence[Thing], i: int, rivals: list[int], loose: bool) -> bool:
    """Whether thing i is the smallest, the biggest, or at the place of `meaning` among its rivals.

    Strictly there must be rivals: "the left star" makes no sense for a single star.
    """
    if not rivals:
        return loose
    if meaning.size in ("smallest", "biggest"):
        ratio = 1 / SIZE_RATIO if loose else SIZE_RATIO
        smallest = meaning.size == "smallest"
        for j in rivals:
            low, high = (i, j) if smallest else (j, i)
            if longest_side(things[low]) * ratio > longest_side(things[high]):
                return False
        return True
    words = (meaning.place or "").split()
    if len(words) == 2:
        return all(_rank_fits(things, i, rivals, word, 1, loose) for word in words)
    return _rank_fits(things, i, rivals, words[0], meaning.rank, loose)


def _rank_fits(things: Sequence[Thing], i: int, rivals: list[int], place: str, rank: int, loose: bool) -> bool:
    """Whether thing i is at this rank among its rivals, counted from `place`, one of SIDES."""
    axis = 0 if place in ("left", "right") else 1
    sign = 1 if place in ("left", "top") else -1
    gaps = [sign * (center(things[j])[axis] - center(things[i])[axis]) for j in rivals]
    before = sum(gap < -PLACE_MARGIN for gap in gaps)
    after = sum(gap > PLACE_MARGIN for gap in gaps)
    if loose:
        return before <= rank - 1 <= len(rivals) - after
    # the last one is not called the second or third: that needs another one behind it
    return before == rank - 1 and before + after == len(rivals) and (rank == 1 or after > 0)


def is_related(relation: str, thing: Thing, anchor: Thing, loose: bool) -> bool:
    """Whether a thing is in a relation to an anchor, by the centers of their boxes, or their gap for "next to"."""
    if relation == NEXT_TO:
        a, b = thing.box, anchor.box
        gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3], 0.0)
        return gap <= NEAR + (NEAR_MARGIN if loose else -NEAR_MARGIN)
    (x, y), (ax, ay) = center(thing), center(anchor)
    dx, dy = x - ax, y - ay
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    # strictly 12 pixels or more, within 40 degrees of the direction; loosely more than 2 pixels, within 59 degrees
    if loose:
        return along > 2 and along >= 0.6 * abs(across)
    return along >= 12 and along >= 1.2 * abs(across)
