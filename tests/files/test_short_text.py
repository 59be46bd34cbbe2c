"""Counts and sizes in messages: singular and plural of nouns and verbs, and units."""

import ast
import re
from pathlib import Path

import pytest

from refdet.files.short_text import agree, format_bytes, format_count, format_share

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
def test_nouns_agree_with_their_count(noun: str, one: str, several: str) -> None:
    assert [format_count(n, noun) for n in (1, 2)] == [one, several]
    assert format_count(0, noun) == f"0{several[1:]}"


@pytest.mark.parametrize(("one", "several"), [("is", "are"), ("was", "were"), ("has", "have"), ("lies", "lie")])
def test_verbs_agree_with_their_count(one: str, several: str) -> None:
    assert [agree(n, one) for n in (0, 1, 2)] == [several, one, several]
    assert [format_count(n, "box", one) for n in (1, 2)] == [f"1 box {one}", f"2 boxes {several}"]


def test_a_share_agrees_with_its_count_and_the_noun_with_the_total() -> None:
    assert format_share(1, 3, "image", "is") == "1 of 3 images is"
    assert format_share(1, 1, "image") == "1 of 1 image"
    assert format_share(2, 3, "entry", "has") == "2 of 3 entries have"


def test_large_numbers_may_have_separators() -> None:
    assert format_count(1234, "object", spec=",") == "1,234 objects"


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 bytes"), (1000, "1.0 kB"), (45_613_210, "45.6 MB"), (13_510_573_713, "13.5 GB")]
)
def test_bytes_are_printed_in_decimal_units(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_no_message_puts_a_plural_after_a_length() -> None:
    """f"{len(images)} images" prints "1 images" for one; `format_count` does not. "more than N" has only large N."""
    paths = [*(ROOT / "cli").rglob("*.py"), *(ROOT / "refdet").rglob("*.py")]
    assert len(paths) > 100
    found = []
    for path in sorted(paths):
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
