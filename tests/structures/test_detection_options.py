"""`DetectionOptions`: checked in one place, for the library and the command line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from refdet.errors import InputError
from refdet.extraction.options import ExtractOptions
from refdet.structures.detection_options import DetectionOptions


@pytest.mark.parametrize("kind", [DetectionOptions, ExtractOptions])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"score_threshold": float("nan")}, "score_threshold: must be a number from 0 to 1, not nan"),
        ({"nms_threshold": 1.5}, "nms_threshold: must be a number from 0 to 1, not 1.5"),
        ({"max_regions": 0}, "max_regions: must be 1 or more, not 0"),
    ],
)
def test_a_bad_value_is_named(kind: type[DetectionOptions], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        kind(**given)
    assert str(error.value) == said and isinstance(error.value, InputError)


def test_choices_of_an_extraction_are_checked() -> None:
    with pytest.raises(ValueError, match="^dtype: must be one of float32, float16, not 'float64'$"):
        ExtractOptions(dtype="float64")


def test_options_are_given_by_keyword_and_stay() -> None:
    with pytest.raises(TypeError):
        DetectionOptions(0.5)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        DetectionOptions().max_regions = 3  # type: ignore[misc]
