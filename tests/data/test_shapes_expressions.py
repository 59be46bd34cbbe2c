"""Every sentence of the synthetic dataset describes exactly one object of its image: its referent.

The tests parse the sentences themselves instead of using the generator; categories and boxes come from the JSON,
colors from the pixels of the JPEG.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

PALETTE = {
    "red": (214, 32, 36), "orange": (246, 138, 22), "yellow": (246, 226, 48), "green": (34, 156, 56),
    "blue": (38, 76, 214), "purple": (128, 36, 160), "pink": (250, 134, 192), "white": (246, 246, 242),
}  # fmt: skip
LOCATION_WORDS = {
    "left", "right", "top", "bottom", "upper", "lower", "above", "below", "under", "over", "highest",
    "lowest", "far", "middle", "leftmost", "rightmost", "topmost", "second", "third", "higher", "up", "down",
}  # fmt: skip
SIDES = {"left": "left", "leftmost": "left", "far left": "left", "right": "right", "rightmost": "right",
         "far right": "right", "top": "top", "topmost": "top", "highest": "top", "bottom": "bottom",
         "lowest": "bottom"}  # fmt: skip
RELATIONS = {
    "left": r"(?:to the |on the )?left of", "right": r"(?:to the |on the )?right of",
    "top": r"above|over|higher up than", "bottom": r"below|under|lower down than",
    "near": r"next to|right beside|beside|by|close to",
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    ann_id: int
    category: str
    color: str | None
    box: tuple[float, float, float, float]  # x1 y1 x2 y2

    @property
    def side(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])

    def position(self, direction: str) -> float:
        """Coordinate of the center along a direction; smaller means further in that direction."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return {"left": x, "right": -x, "top": y, "bottom": -y}[direction]


def objects_described_by(text: str, objects: list[Object]) -> list[Object]:
    """The objects described by "[size] [color] category", including those of borderline sizes."""
    words = text.split()
    found = objects
    if words[-1] != "shape":
        found = [o for o in found if o.category == words[-1]]
    for word in reversed(words[:-1]):
        if word in PALETTE:
            found = [o for o in found if o.color == word]
        elif word == "small":
            found = [o for o in found if o.side <= 33]
        elif word == "large":
            found = [o for o in found if o.side >= 43]
        elif word in ("smallest", "biggest"):
            best = min(found, key=lambda o: o.side if word == "smallest" else -o.side)
            found = [o for o in found if 1 / 1.15 < o.side / best.side < 1.15]
        else:
            raise AssertionError(f"unknown word {word!r} in {text!r}")
    return found


def is_in_relation(direction: str, one: Object, other: Object) -> bool:
    """Whether ``one`` lies to the left of ``other``, for example, clearly enough to say so."""
    if direction == "near":
        a, b = one.box, other.box
        return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) <= 20
    across = "top" if direction in ("left", "right") else "left"
    lead = other.position(direction) - one.position(direction)
    return lead > 5 and lead > 0.8 * abs(other.position(across) - one.position(across))


def objects_at_rank(direction: str, rank: int, found: list[Object]) -> list[Object]:
    """The object at a rank from a side, with those that lie within 5 px of it in that direction."""
    ordered = sorted(found, key=lambda o: o.position(direction))
    assert len(ordered) >= rank
    return [o for o in ordered if abs(o.position(direction) - ordered[rank - 1].position(direction)) < 5]


def referents(sentence: str, objects: list[Object]) -> list[Object]:
    """The objects that a sentence describes."""
    text = re.sub(r" in (the|this) (picture|image)$", "", sentence)
    text = re.sub(r"^(the only|the|a) ", "", text)
    for direction, words in RELATIONS.items():
        match = re.fullmatch(rf"(.+?) (?:that is )?(?:{words}) (?:the )?(.+)", text)
        if match:
            anchors = objects_described_by(match[2], objects)
            assert len(anchors) == 1, f"{sentence!r}: {match[2]!r} is not one object"
            return [
                o
                for o in objects_described_by(match[1], objects)
                if o != anchors[0] and is_in_relation(direction, o, anchors[0])
            ]
    match = re.fullmatch(r"(second|third) (.+) from the (\w+)", text)
    if match:
        return objects_at_rank(match[3], {"second": 2, "third": 3}[match[1]], objects_described_by(match[2], objects))
    match = re.fullmatch(r"(top|upper|bottom|lower) (left|right) (.+)", text)
    if match:
        found = objects_described_by(match[3], objects)
        row = objects_at_rank("top" if match[1] in ("top", "upper") else "bottom", 1, found)
        column = objects_at_rank(match[2], 1, found)
        assert row == column, sentence
        return row
    for words in sorted(SIDES, key=len, reverse=True):
        if text.startswith(words + " "):
            return objects_at_rank(SIDES[words], 1, objects_described_by(text[len(words) + 1 :], objects))
    return objects_described_by(text, objects)


def objects_of(root: Path) -> dict[int, list[Object]]:
    """Image id to its objects without the crowds; the color is the palette's closest to their median pixel."""
    data = json.loads((root / "annotations" / "instances_train2014.json").read_text())
    names = {c["id"]: c["name"] for c in data["categories"]}
    images = {i["id"]: i for i in data["images"]}
    found: dict[int, list[Object]] = {i: [] for i in images}
    pixels: dict[int, np.ndarray | None] = {}
    for i, image in images.items():
        picture = Image.open(root / "train2014" / image["file_name"])
        pixels[i] = None if picture.mode == "L" else np.asarray(picture)
    for a in data["annotations"]:
        if a["iscrowd"]:
            continue
        image = images[a["image_id"]]
        parts = coco_mask.frPyObjects(a["segmentation"], image["height"], image["width"])
        mask = coco_mask.decode(coco_mask.merge(parts) if isinstance(parts, list) else parts).astype(bool)
        color = None
        picked = pixels[image["id"]]
        if picked is not None:
            median = np.median(picked[mask], axis=0)
            color = min(PALETTE, key=lambda name: float(np.abs(median - PALETTE[name]).sum()))
        x, y, w, h = a["bbox"]
        found[image["id"]].append(Object(a["id"], names[a["category_id"]], color, (x, y, x + w, y + h)))
    return found


@pytest.fixture(scope="module")
def objects(shapes_root: Path) -> dict[int, list[Object]]:
    return objects_of(shapes_root)


def refs_of(root: Path, dataset: str, split_by: str) -> list[dict]:
    return pickle.loads((root / "refer" / dataset / f"refs({split_by}).p").read_bytes())


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_each_sentence_describes_its_referent_only(
    shapes_root: Path, objects: dict[int, list[Object]], dataset: str, split_by: str
) -> None:
    seen = 0
    for ref in refs_of(shapes_root, dataset, split_by):
        for sentence in ref["sentences"]:
            answer = [o.ann_id for o in referents(sentence["sent"], objects[ref["image_id"]])]
            assert answer == [ref["ann_id"]], (ref["image_id"], sentence["sent"])
            seen += 1
    assert seen > 15


def test_refcoco_plus_has_no_location_words(shapes_root: Path) -> None:
    for ref in refs_of(shapes_root, "refcoco+", "unc"):
        for sentence in ref["sentences"]:
            assert not LOCATION_WORDS & set(sentence["tokens"]), sentence["sent"]


def test_refcocog_is_wordier_and_refcoco_uses_colors_sides_and_sizes(shapes_root: Path) -> None:
    def mean_length(dataset: str, split_by: str) -> float:
        sentences = [s for r in refs_of(shapes_root, dataset, split_by) for s in r["sentences"]]
        return float(np.mean([len(s["tokens"]) for s in sentences]))

    assert mean_length("refcocog", "umd") > 1.3 * mean_length("refcoco", "unc")
    words = {w for r in refs_of(shapes_root, "refcoco", "unc") for s in r["sentences"] for w in s["tokens"]}
    assert words & set(PALETTE) and words & {"left", "right"} and words & {"small", "large"}


def test_the_sentence_parser_of_these_tests() -> None:
    scene = [
        Object(1, "star", "red", (0, 0, 20, 20)),
        Object(2, "star", "red", (100, 0, 160, 60)),
        Object(3, "ring", "blue", (30, 0, 50, 20)),
    ]

    def read(sentence: str) -> list[int]:
        return [o.ann_id for o in referents(sentence, scene)]

    assert read("red star") == [1, 2]
    assert read("the small star") == read("left star") == read("star next to the blue ring") == [1]
    assert read("the star that is to the right of the ring") == read("biggest star") == [2]
    assert read("second shape from the left") == [3]
    assert read("star left of the ring") == [1] and read("star above ring") == []
