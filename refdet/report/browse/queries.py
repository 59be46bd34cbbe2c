"""The parameters of the page's requests, which select and sort a list, and the SQL queries of the list."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refdet.errors import ArgumentError
from refdet.report.browse.catalog import SIZES, Catalog

MIN_IOU = 0.5
"""Minimum IoU of a region that covers a referent."""

SHOW_CHOICES = ("refs", "images")
ONLY_CHOICES = ("", "uncovered", "wrong", "failed")
PAGE_SIZE = 60
_MAX_PAGE_SIZE = 1000
_MAX_COUNT = 1 << 40  # more than any list has, and still an SQLite integer
_MAX_SEARCH_LENGTH = 500  # characters

# SQL expressions by which a list can be sorted; "gap" is the IoU in the first store minus that in the second.
_ORDERS = {
    "refs": {
        "order": "r.key",
        "iou": "r.iou0",
        "gap": "r.iou0 - r.iou1",
        "score": "r.score",
        "regions": "i.regions",
    },
    "images": {
        "order": "i.position",
        "iou": "(SELECT min(r.iou0) FROM referent r WHERE r.position = i.position)",
        "gap": "(SELECT min(r.iou0 - r.iou1) FROM referent r WHERE r.position = i.position)",
        "score": "i.score",
        "regions": "i.regions",
    },
}
ORDERS = tuple(_ORDERS["refs"])
_TABLES = {"refs": "referent r JOIN image i ON i.position = r.position", "images": "image i"}


@dataclass(frozen=True)
class Filter:
    """A filtered, sorted list of referents or images.

    Attributes:
        show: "refs" or "images".
        search: words that one sentence of a referent must have; the last of them may be the start of a word.
        split: name of a split, "" for all.
        category: category id of the referents, or of a region of the images; None for all.
        size: one of `SIZES`, of the referents, or of a region of the images; "" for all.
        only: "uncovered" for referents that no region covers, "wrong" for referents with a wrong answer, "failed" for
            images that the extraction could not use, "" for all.
        sort: one of `ORDERS`.
        descending: whether the highest values come first; entries without a value are always last.
    """

    show: str = "images"
    search: str = ""
    split: str = ""
    category: int | None = None
    size: str = ""
    only: str = ""
    sort: str = "order"
    descending: bool = False

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> Filter:
        """Read the parameters of an address.

        Raises:
            ArgumentError: a parameter has an invalid value.
        """
        category = params.get("category", "")
        return cls(
            _parse_choice("show", params.get("show", "images"), SHOW_CHOICES),
            params.get("q", "")[:_MAX_SEARCH_LENGTH],
            params.get("split", ""),
            parse_id("category", category) if category else None,
            _parse_choice("size", params.get("size", ""), ("", *SIZES)),
            _parse_choice("only", params.get("only", ""), ONLY_CHOICES),
            _parse_choice("sort", params.get("sort", "order"), ORDERS),
            params.get("desc", "") == "1",
        )

    def count(self, catalog: Catalog) -> int:
        """Length of the list."""
        where, values = self._where()
        return int(catalog.rows(f"SELECT count(*) FROM {_TABLES[self.show]} WHERE {where}", values)[0][0])

    def keys(self, catalog: Catalog, offset: int = 0, limit: int = PAGE_SIZE) -> list[int]:
        """The keys of the referents, or the positions of the images, on a page of the list.

        Args:
            catalog: the catalog.
            offset: number of entries before the page.
            limit: maximum number of entries, -1 for all.
        """
        where, values = self._where()
        key = "r.key" if self.show == "refs" else "i.position"
        order = _ORDERS[self.show][self.sort]
        query = (
            f"SELECT {key}, {order} AS rank FROM {_TABLES[self.show]} WHERE {where} "
            f"ORDER BY rank IS NULL, rank {'DESC' if self.descending else 'ASC'}, {key} LIMIT ? OFFSET ?"
        )
        return [row[0] for row in catalog.rows(query, (*values, limit, offset))]

    def _where(self) -> tuple[str, list[Any]]:
        """The SQL condition of the list, and the values of its placeholders."""
        conditions, values = self._referent_conditions()
        if self.show == "images" and conditions:
            referent_conditions = " AND ".join(conditions)
            conditions = [f"i.position IN (SELECT r.position FROM referent r WHERE {referent_conditions})"]
        if self.show == "images" and (self.category is not None or self.size):
            kind_conditions, kind_values = self._category_conditions("category", "size")
            kinds = " AND ".join(kind_conditions)
            conditions.append(f"i.position IN (SELECT position FROM region_kind WHERE {kinds})")
            values += kind_values
        if self.only == "failed":
            conditions.append("i.error != ''")
        return " AND ".join(conditions) or "1", values  # 1: true, for every row

    def _referent_conditions(self) -> tuple[list[str], list[Any]]:
        """SQL conditions on referents, and the values of their placeholders."""
        conditions, values = [], []
        if words := re.findall(r"\w+", self.search):
            conditions.append(
                "r.key IN (SELECT s.referent FROM words JOIN sentence s ON s.key = words.rowid WHERE words MATCH ?)"
            )
            values.append(" ".join(f'"{word}"' for word in words) + "*")
        elif self.search.strip():  # only punctuation, which is not indexed
            conditions.append("0")  # false: no row
        if self.split:
            conditions.append("r.split = ?")
            values.append(self.split)
        if self.only == "uncovered":
            conditions.append(f"r.iou0 < {MIN_IOU}")
        if self.only == "wrong":
            conditions.append("r.key IN (SELECT referent FROM sentence WHERE wrong = 1)")
        if self.show == "refs":
            more, more_values = self._category_conditions("r.category", "r.size")
            conditions, values = conditions + more, values + more_values
        return conditions, values

    def _category_conditions(self, category: str, size: str) -> tuple[list[str], list[Any]]:
        """SQL conditions on the columns named `category` and `size`, and the values of their placeholders."""
        conditions, values = [], []
        if self.category is not None:
            conditions.append(f"{category} = ?")
            values.append(self.category)
        if self.size:
            conditions.append(f"{size} = ?")
            values.append(SIZES.index(self.size))
        return conditions, values


@dataclass(frozen=True)
class ListPage:
    """A page of a list, and which regions of each image to show on it.

    Attributes:
        offset: number of entries before the page.
        limit: maximum number of entries on the page.
        top: maximum number of regions to show of an image, those with the highest scores.
        score: minimum score of these regions, None for all.
    """

    offset: int = 0
    limit: int = PAGE_SIZE
    top: int = _MAX_COUNT
    score: float | None = None

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> ListPage:
        """Read the parameters of an address.

        Raises:
            ArgumentError: a parameter is not a number, or is out of range.
        """
        return cls(
            offset=_parse_count("offset", params, 0, _MAX_COUNT),
            limit=_parse_count("limit", params, PAGE_SIZE, _MAX_PAGE_SIZE),
            top=_parse_count("top", params, _MAX_COUNT, _MAX_COUNT),
            score=_parse_score(params.get("score", "")),
        )


def parse_id(name: str, text: str) -> int:
    """Parse an id in an address; ids may be negative or beyond 2^53, where numbers in JavaScript are not exact.

    Raises:
        ArgumentError: the text is not an integer of 64 bits.
    """
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(1 << 63) <= int(text) < 1 << 63:
        raise ArgumentError(name, f"{text!r:.40} is not an id")
    return int(text)


def _parse_score(text: str) -> float | None:
    """A finite number; None for ""."""
    if not text:
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ArgumentError("score", f"{text!r:.40} is not a score")
    return score


def _parse_count(name: str, params: Mapping[str, str], default: int, maximum: int) -> int:
    """The parameter `name`, an integer from 0 to `maximum`; the default if it is missing or empty."""
    text = params.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) > maximum:
        raise ArgumentError(name, f"{text!r:.40} is not a number from 0 to {maximum}")
    return int(text)


def _parse_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ArgumentError(name, f"{value!r:.40} is not one of {', '.join(c for c in choices if c)}")
    return value
