"""`DetectionOptions` and `ExtractOptions` check their values, for the library and the command line."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import numpy as np
import pytest

from refdet.errors import InputError
from refdet.extraction.options import ExtractOptions, check_count
from refdet.structures.detection_options import DetectionOptions


@pytest.mark.parametrize("kind", [DetectionOptions, ExtractOptions])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_threshold": float("nan")}, "score_threshold: must be a number from 0 to 1, not nan"),
        ({"nms_threshold": 1.5}, "nms_threshold: must be a number from 0 to 1, not 1.5"),
        ({"max_regions": 0}, "max_regions: must be 1 or more, not 0"),
        ({"score_threshold": "0.5"}, "score_threshold: must be a number from 0 to 1, not '0.5'"),
        ({"nms_threshold": True}, "nms_threshold: must be a number from 0 to 1, not True"),
        ({"max_regions": 36.5}, "max_regions: must be a whole number, not 36.5"),
        ({"max_regions": None}, "max_regions: must be a whole number, not None"),
        ({"lower_threshold_if_empty": "no"}, "lower_threshold_if_empty: must be a bool, not 'no'"),
    ],
)
def test_an_error_names_option_and_value(kind: type[DetectionOptions], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        kind(**given)
    assert str(error.value) == message and isinstance(error.value, InputError)


def test_numpy_values_are_converted_so_that_json_can_store_them() -> None:
    options = ExtractOptions(
        score_threshold=np.float32(0.5),  # type: ignore[arg-type]
        nms_threshold=np.int64(1),
        max_regions=np.int64(36),  # type: ignore[arg-type]
        lower_threshold_if_empty=np.bool_(True),  # type: ignore[arg-type]
    )
    assert options == ExtractOptions(
        score_threshold=0.5, nms_threshold=1, max_regions=36, lower_threshold_if_empty=True
    )
    assert json.loads(json.dumps(asdict(options)))["max_regions"] == 36


def test_invalid_extraction_options_are_refused() -> None:
    with pytest.raises(ValueError, match="^dtype: must be one of float32, float16, not 'float64'$"):
        ExtractOptions(dtype="float64")
    with pytest.raises(ValueError, match="^dtype: must be one of float32, float16, not dtype"):
        ExtractOptions(dtype=np.dtype(np.float16))  # type: ignore[arg-type]
    for features in ("fc7", b"fc7", 7, None, [["fc7"]], ("fc7", 7)):
        with pytest.raises(ValueError, match=f"^features: a list of names is needed, not {re.escape(repr(features))}$"):
            ExtractOptions(features=features)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^crowd_as_object: must be a bool, not 'no'$"):
        ExtractOptions(crowd_as_object="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", "auto"])
def test_a_count_must_be_a_positive_integer(value: object) -> None:
    assert [check_count("workers", given) for given in (None, 1, np.int64(8))] == [None, 1, 8]
    with pytest.raises(ValueError, match=f"^workers: must be a whole number of 1 or more, not {value!r}$"):
        check_count("workers", value)


def test_options_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        DetectionOptions(0.5)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        DetectionOptions().max_regions = 3  # type: ignore[misc]
