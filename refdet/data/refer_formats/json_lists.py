"""JSON and JSON-lines lists of boxes and expressions, of the kind that vision-language models are trained on.

Flat lists have an entry per expression: ``{"image": ..., "sent": ..., "bbox": [...]}``, under various names. LLaVA-like
lists have conversations, in which the question holds the box and the answer the expression, or the other way around.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refdet.data.refer_formats.records import Row, Source, SourceRef, SourceSentence
from refdet.errors import InputError
from refdet.files.short_text import agree, format_count

# Keys of the image, the expression and the box, in order of preference.
_IMAGES = ("image", "img_path", "image_path", "file_name", "image_file", "img_name")
_SENTENCES = ("sent", "expression", "normal_caption", "sentence", "phrase", "refexp", "caption", "text")
_BOXES = ("bbox", "box", "solution", "gt_bbox")
# Layouts (`layouts.LAYOUTS`) that boxes may have, by the range of their numbers (`_possible_layouts`).
_PIXELS = ("xyxy", "xywh")
_NORMALIZED = ("normalized-xyxy", "padded-xyxy")
_THOUSANDTHS = ("thousandths-xyxy", "xyxy")

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_REF_TAG = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)


def read_list(path: Path, entries: list[Any], split: str) -> Source:
    """Read a list in either format.

    Args:
        path: the file, for error messages.
        entries: its entries.
        split: name of the split.

    Returns:
        An entry for each expression, in file order.

    Raises:
        InputError: no entries, or an entry lacks a field or has a wrong value.
    """
    if not entries:
        raise InputError(f"{path}: no entries")
    first = Row(f"{path}: [0]", entries[0])
    if "conversations" in first.value:
        return _read_conversations(path, entries, split)
    image, sentence, box = (
        _first_key(first, keys, what)
        for keys, what in ((_IMAGES, "the image"), (_SENTENCES, "the expression"), (_BOXES, "the box"))
    )
    refs = []
    for number, entry in enumerate(entries):
        row = Row(f"{path}: [{number}]", entry)
        refs.append(
            SourceRef(
                where=row.where,
                split=split,
                sentences=[SourceSentence(row.text(sentence))],
                dataset=row.optional("dataset_name", row.text) or "",
                file_name=row.text(image),
                box=row.box(box),
            )
        )
    return Source("a JSON list", refs, one_sentence_each=True, layouts=_possible_layouts(refs))


def _first_key(row: Row, keys: Sequence[str], what: str) -> str:
    """The first of the keys that a row has; ``what`` is what they hold, for the error message."""
    for key in keys:
        if key in row.value:
            return key
    raise InputError(f"{row.where}: no field with {what}; it must be one of {', '.join(keys)}")


def _possible_layouts(refs: list[SourceRef]) -> tuple[str, ...]:
    """The layouts that the boxes may have, by the largest of their numbers."""
    numbers = [number for ref in refs if ref.box for number in ref.box]
    largest = max(numbers, default=0.0)
    if largest <= 1:
        return _NORMALIZED
    if largest <= 1000 and all(number.is_integer() for number in numbers):
        return (*_THOUSANDTHS, "xywh")
    return _PIXELS


def _read_conversations(path: Path, entries: list[Any], split: str) -> Source:
    refs: list[SourceRef] = []
    skipped = 0
    for number, entry in enumerate(entries):
        row = Row(f"{path}: [{number}]", entry)
        turn_rows = [Row(f"{row.where}: a turn", turn) for turn in row.items("conversations")]
        turns = [turn.text("value") for turn in turn_rows if turn.value.get("from") != "system"]
        skipped += len(turns) % 2  # the last question has no answer
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            parsed = _box_and_expression(question, answer)
            if parsed is None or "image" not in row.value:
                skipped += 1
                continue
            box, expression = parsed
            refs.append(SourceRef(row.where, split, [SourceSentence(expression)], file_name=row.text("image"), box=box))
    if not refs:
        raise InputError(f"{path}: no question with a box [x1, y1, x2, y2] in it or in its answer")
    notes = []
    if skipped:
        notes.append(
            f"{path}: {format_count(skipped, 'question')} without a box or an expression, with several boxes or "
            f"without an image {agree(skipped, 'was')} skipped"
        )
    return Source("LLaVA-like JSON", refs, one_sentence_each=True, layouts=_possible_layouts(refs), notes=notes)


def _box_and_expression(question: str, answer: str) -> tuple[list[float], str] | None:
    """The only box of a question and its answer, and the expression; None unless there is exactly one of each."""
    in_question, in_answer = _BOX.findall(question), _BOX.findall(answer)
    if len(in_question) + len(in_answer) != 1:
        return None
    box = [float(number) for number in (in_question or in_answer)[0]]
    if not all(map(math.isfinite, box)):
        return None
    if tagged := in_question and _REF_TAG.search(answer):
        text = tagged[1]
    elif in_question:
        text = answer
    elif tagged := _REF_TAG.search(question) or _REF_TAG.search(answer):
        text = tagged[1]
    else:  # <image> may precede or follow the question; the expression follows its last colon
        text = question.replace("<image>", "").strip().rpartition(":")[2].rpartition("\n")[2]
    return (box, text.strip()) if text.strip() else None
