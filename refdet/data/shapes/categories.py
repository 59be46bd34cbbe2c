"""Categories with their ids, and named colors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A category of an instances file. Ids have gaps, as in COCO."""

    id: int
    name: str
    supercategory: str


CATEGORIES: tuple[Category, ...] = (
    Category(1, "person", "person"),
    Category(3, "circle", "round"),
    Category(7, "ring", "round"),
    Category(13, "moon", "round"),
    Category(18, "square", "polygon"),
    Category(27, "triangle", "polygon"),
    Category(44, "star", "symbol"),
    Category(52, "cross", "symbol"),
    Category(67, "heart", "symbol"),
    Category(90, "arrow", "symbol"),
)

PERSON = CATEGORIES[0]

# RGB, distinct from each other and from the muted backgrounds even after JPEG compression.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (246, 138, 22),
    "yellow": (246, 226, 48),
    "green": (34, 156, 56),
    "blue": (38, 76, 214),
    "purple": (128, 36, 160),
    "pink": (250, 134, 192),
    "white": (246, 246, 242),
}

# Gray levels of shapes in a grayscale picture; expressions do not name them.
GRAYS: tuple[int, ...] = (18, 56, 204, 244)
