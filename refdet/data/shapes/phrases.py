"""Referring expressions for a thing: meanings that single it out, and sentences in the style of each dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from refdet.data.shapes.meaning import CORNERS, DIRECTIONS, NEXT_TO, SIDES, Meaning, find_referent, is_related
from refdet.data.shapes.scene import Thing

ORDINALS = {2: "second", 3: "third"}


@dataclass(frozen=True)
class Style:
    """Style of the expressions of a dataset.

    Attributes:
        full: whether the expressions are full phrases, "the small red star in the picture", or short, "small red star".
        locations: whether they may use location words.
        weights: probabilities of the three types of expressions: plain attributes, place in the picture, relation to
            another thing.
    """

    full: bool
    locations: bool
    weights: tuple[float, float, float]


REFCOCO = Style(full=False, locations=True, weights=(0.35, 0.45, 0.2))
# RefCOCO+ annotators could not use location words.
REFCOCO_PLUS = Style(full=False, locations=False, weights=(0.7, 0.0, 0.3))
REFCOCOG = Style(full=True, locations=True, weights=(0.3, 0.2, 0.5))


def meanings(target: int, things: Sequence[Thing], style: Style) -> tuple[list[Meaning], ...]:
    """List all meanings that refer to things[target] alone, by type: (plain, place, relation)."""
    thing = things[target]
    name, color = thing.category.name, thing.color
    bases = [Meaning(name)] + ([Meaning(name, color)] if color is not None else [])
    sized = [replace(base, size=size) for base in bases for size in ("small", "large", "smallest", "biggest")]
    if style.full:
        # long expressions always mention a color
        bases, sized = bases[-1:], [m for m in sized if m.color == color]
    plain = bases + sized
    place: list[Meaning] = []
    if style.locations:
        spots = [(p, 1) for p in SIDES + CORNERS] + [(p, rank) for p in SIDES for rank in ORDINALS]
        place = [replace(base, place=p, rank=rank) for base in bases for p, rank in spots]
        if not any(t.crowd for t in things):  # "the left shape" could be one of a crowd's
            place += [Meaning(place=p) for p in SIDES]
    relation: list[Meaning] = []
    for j, anchor in enumerate(things):
        if j == target or anchor.crowd:
            continue
        anchor_meaning = _find_short(j, things)
        if anchor_meaning is None:
            continue
        for word in (*DIRECTIONS, NEXT_TO) if style.locations else (NEXT_TO,):
            if is_related(word, thing, anchor, loose=False):
                unranked = [m for m in plain if m.size not in ("smallest", "biggest")]
                relation += [replace(m, relation=word, other=anchor_meaning) for m in unranked]

    def unambiguous(candidates: list[Meaning]) -> list[Meaning]:
        return [m for m in candidates if find_referent(m, things) == target]

    return unambiguous(plain), unambiguous(place), unambiguous(relation)


def is_referable(target: int, things: Sequence[Thing], style: Style) -> bool:
    """Whether there are any `meanings` for things[target]; tries the short ones first, which is faster."""
    return _find_short(target, things) is not None or any(meanings(target, things, style))


def _find_short(target: int, things: Sequence[Thing]) -> Meaning | None:
    """A short meaning that refers to things[target] alone, None if there is none."""
    name, color = things[target].category.name, things[target].color
    candidates = [Meaning(name, color), Meaning(name), Meaning(name, size="small"), Meaning(name, size="large")]
    return next((m for m in candidates if find_referent(m, things) == target), None)


def sample_meanings(
    rng: np.random.Generator, candidates: tuple[list[Meaning], ...], style: Style, count: int
) -> list[Meaning]:
    """Sample up to `count` different `meanings`, their types by the weights of the style."""
    remaining = [list(group) for group in candidates]
    chosen: list[Meaning] = []
    while len(chosen) < count:
        weights = np.array([w if group else 0.0 for w, group in zip(style.weights, remaining, strict=True)])
        if weights.sum() == 0:
            break
        group = remaining[int(rng.choice(len(remaining), p=weights / weights.sum()))]
        chosen.append(group.pop(int(rng.integers(len(group)))))
    return chosen


def noun_phrase(meaning: Meaning) -> str:
    """Phrase size, color and category: "small red star", or "small red shape" without a category."""
    return " ".join(w for w in (meaning.size, meaning.color, meaning.category or "shape") if w)


def sentence(rng: np.random.Generator, meaning: Meaning, style: Style) -> str:
    """Phrase a meaning at random, in lower case and with single spaces."""
    noun = noun_phrase(meaning)
    if meaning.relation is not None and meaning.other is not None:
        other = noun_phrase(meaning.other)
        if style.full:
            return f"the {noun} that is {_pick(rng, _LONG[meaning.relation])} the {other}"
        return f"{noun} {_pick(rng, _SHORT[meaning.relation])} {_pick(rng, ('the ', ''))}{other}"
    if meaning.place is not None:
        place, end = meaning.place, _pick(rng, (" in the picture", " in the image")) if style.full else ""
        article = "the " if style.full else _pick(rng, ("", "", "the "))
        if meaning.rank > 1:
            return f"{article}{ORDINALS[meaning.rank]} {noun} from the {place}{end}"
        if " " in place:
            upper = place.replace("top", "upper").replace("bottom", "lower")
            return f"{article}{_pick(rng, (place, upper))} {noun}{end}"
        return f"{article}{_pick(rng, _SIDE_WORDS[place])} {noun}{end}"
    if style.full:
        return _pick(rng, (f"the {noun} in the picture", f"the only {noun}", f"a {noun} in this image"))
    return _pick(rng, (noun, noun, f"the {noun}"))


_SIDE_WORDS = {
    "left": ("left", "leftmost", "far left"),
    "right": ("right", "rightmost", "far right"),
    "top": ("top", "topmost", "highest"),
    "bottom": ("bottom", "lowest"),
}
_SHORT = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    NEXT_TO: ("next to", "beside", "by"),
}
_LONG = {
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    NEXT_TO: ("next to", "right beside", "close to"),
}


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
