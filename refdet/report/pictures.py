"""The pictures of a report, which share a limit on their total size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.report.figures import Picture, draw_picture
from refdet.report.refer_parts import OpenPart
from refdet.report.samples import (
    Answer,
    Scene,
    covered_scenes,
    hardest_scenes,
    images_of,
    read_answers,
    sample_evenly,
    sample_scenes,
    scenes_of_splits,
)
from refdet.report.templates import Markup, render
from refdet.store import Store

log = logging.getLogger(__name__)

MAX_BYTES = 3_300_000  # of all JPEGs together; base64 adds a third, and the page should stay under 5 MB


class Pictures:
    """Draws pictures of images, read on demand, as long as all JPEGs together stay within `MAX_BYTES`.

    Args:
        images: folder or zip of the images.
        scenes: all images that may be drawn.

    Raises:
        InputError: ``images`` has none of the images.
    """

    def __init__(self, images: Path, scenes: Sequence[Scene]) -> None:
        records = list({scene.image.id: scene.image for scene in scenes}.values())
        self._sources = {exif: ImageSource.open(images, exif) for exif in sorted({scene.exif for scene in scenes})}
        missing: list[str] = []
        for source in self._sources.values():  # sources of the same files, which lack the same images
            missing = source.locate(records)
        if records and len(missing) == len(records):
            raise InputError(f"`images` {images}: lacks all {format_count(len(records), 'image')}, first: {missing[0]}")
        self._bytes_left = MAX_BYTES
        self._n_left_out = 0  # pictures
        self._n_missing = len(missing)  # images without a file
        self._unreadable = set[int]()  # ids of images whose file cannot be read
        self._first_problem = missing[0] if missing else ""

    @property
    def notes(self) -> list[str]:
        """The images and pictures that were left out so far, and why."""
        notes = []
        n_unreadable = self._n_missing + len(self._unreadable)
        if n_unreadable:
            notes.append(f"{format_count(n_unreadable, 'image')} could not be read, first: {self._first_problem}")
        if self._n_left_out:
            notes.append(f"{format_count(self._n_left_out, 'picture')} left out, to keep the page under 5 MB")
        return notes

    def draw(self, scenes: Sequence[Scene]) -> list[Picture]:
        """Pictures of images. Those that cannot be read or exceed the limit are left out, and counted in `notes`."""
        pictures = (self._draw(scene) for scene in scenes)
        return [picture for picture in pictures if picture is not None]

    def draw_answers(self, answers: Sequence[Answer]) -> list[Picture]:
        """Pictures of wrong answers and the regions that would have been best; left out as in `draw`."""
        pictures = (self._draw(answer.scene, answer) for answer in answers)
        return [picture for picture in pictures if picture is not None]

    def _draw(self, scene: Scene, answer: Answer | None = None) -> Picture | None:
        source, record = self._sources[scene.exif], scene.image
        if source.find(record) is None:
            return None  # counted in __init__
        try:
            picture = draw_picture(scene, source.read(record), answer)
        except ImageError as error:
            self._first_problem = self._first_problem or str(error)
            self._unreadable.add(record.id)  # counted once, though several scenes may show it
            return None
        if len(picture.jpeg) > self._bytes_left:
            self._n_left_out += 1
            return None
        self._bytes_left -= len(picture.jpeg)
        return picture


def all_scenes(parts: Sequence[OpenPart], count: int) -> list[Scene]:
    """The images of all stores that are in REFER's splits; of a store without refs, ``count`` evenly spaced images."""
    result: list[Scene] = []
    for part in parts:
        if part.store is None:
            continue
        if part.has_scenes and part.refer is not None and part.splits:
            result += scenes_of_splits(part.store, part.refer, part.dataset, part.splits)
        else:
            result += _scenes_without_refs(part.store, count)
    return result


def _scenes_without_refs(store: Store, count: int) -> list[Scene]:
    """At most ``count`` evenly spaced usable images of a store, without referents."""
    ids = [image_id for image_id in store if image_id not in store.errors]
    images = images_of(store)
    return [Scene.from_store(store.path.name, store, images[i], ()) for i in sample_evenly(ids, count)]


def wrong_answers(parts: Sequence[OpenPart], pictures: Pictures | None, count: int) -> dict[str, Any]:
    """The values of ``listener.html``: numbers of answers, and pictures of wrong answers.

    Args:
        parts: the stores; those with predictions have answers.
        pictures: draws the wrong answers; None for no pictures.
        count: maximum number of pictures.
    """
    all_answers: list[Answer] = []
    for part in parts:
        if part.predictions is not None and part.store is not None and part.refer is not None and part.has_scenes:
            all_answers += read_answers(
                part.store, part.refer, part.dataset, part.splits, part.predictions, part.protocol, part.box_format
            )
    wrong = [answer for answer in all_answers if not answer.is_correct]
    unanswerable = sum(not answer.scene.referents[0].is_covered for answer in wrong)
    drawn = pictures.draw_answers(sample_evenly(wrong, count)) if pictures is not None else []
    return {"answers": len(all_answers), "wrong": len(wrong), "unanswerable": unanswerable, "pictures": drawn}


def pictures_section(scenes: Sequence[Scene], pictures: Pictures, count: int) -> Markup:
    """Example images, then those whose referents are covered worst and best.

    Args:
        scenes: all images.
        pictures: draws the images.
        count: maximum number of example images; at most a third as many of the worst, and of the best, come after them.
    """
    with_refs = [scene for scene in scenes if scene.referents]
    # drawn first, as the examples may use up `MAX_BYTES`
    worst = pictures.draw(hardest_scenes(with_refs, count // 3))
    best = pictures.draw(covered_scenes(with_refs, count // 3))
    examples = pictures.draw(sample_scenes(scenes, count))
    n_missed = sum(not referent.is_covered for scene in scenes for referent in scene.referents)
    for note in pictures.notes:
        log.warning("note: report: %s", note)
    return render("pictures.html", examples=examples, worst=worst, best=best, missed=n_missed, notes=pictures.notes)
