"""Counts in messages: singular and plural, of nouns and verbs."""

import ast
import re
from pathlib import Path

import pytest

from refdet.files.short_text import agree, format_count, format_share

ROOT = Path(__file__).parents[2]
PLURALS = (
    "images|regions|boxes|masks|annotations|objects|categories|classes|refs|sentences|entries|files|rows|shards|steps|"
    "lines|tensors|workers|processes"
)


@pytest.mark.parametrize(
    ("noun", "one", "several"),
    [
        ("image", "1 image", "2 images"),
        ("held-out image", "1 held-out image", "2 held-out images"),
        ("box", "1 box", "2 boxes"),
        ("class", "1 class", "2 classes"),
        ("batch", "1 batch", "2 batches"),
        ("category", "1 category", "2 categories"),
        ("day", "1 day", "2 days"),
    ],
)
def test_nouns(noun: str, one: str, several: str) -> None:
    assert [format_count(n, noun) for n in (1, 2)] == [one, several]
    assert format_count(0, noun) == f"0{several[1:]}"


@pytest.mark.parametrize(("one", "several"), [("is", "are"), ("was", "were"), ("has", "have"), ("lies", "lie")])
def test_verbs(one: str, several: str) -> None:
    assert [agree(n, one) for n in (0, 1, 2)] == [several, one, several]
    assert [format_count(n, "box", one) for n in (1, 2)] == [f"1 box {one}", f"2 boxes {several}"]


def test_a_share_agrees_with_its_count_and_the_noun_with_the_total() -> None:
    assert format_share(1, 3, "image", "is") == "1 of 3 images is"
    assert format_share(1, 1, "image") == "1 of 1 image"
    assert format_share(2, 3, "entry", "has") == "2 of 3 entries have"


def test_large_numbers_may_have_separators() -> None:
    assert format_count(1234, "object", spec=",") == "1,234 objects"


def test_no_message_puts_a_plural_after_a_length() -> None:
    """f"{len(images)} images" says "1 images" of one: `format_count` does not. Limits, which are above one, may."""
    found = []
    for path in sorted(path for folder in ("cli", "refdet") for path in (ROOT / folder).rglob("*.py")):
        for text in ast.walk(ast.parse(path.read_text())):
            parts = text.values if isinstance(text, ast.JoinedStr) else []
            for part, after in zip(parts, parts[1:], strict=False):
                if (
                    isinstance(part, ast.FormattedValue)
                    and "len(" in ast.unparse(part.value)
                    and not re.match(r"(format_|agree)", ast.unparse(part.value))
                    and isinstance(after, ast.Constant)
                    and re.match(rf" ([a-z/-]+ )?({PLURALS})\b", str(after.value))
                    and "more than" not in str(after.value)
                ):
                    found.append(f"{path.relative_to(ROOT)}:{part.lineno}")
    assert found == []
