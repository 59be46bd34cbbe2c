"""Pickles of arrays that numpy of any age reads."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


class _PortablePickler(pickle.Pickler):
    """Rebuilds arrays from ``numpy.ndarray`` and ``numpy.dtype`` alone.

    numpy itself names a function of ``numpy._core``, a module that numpy before 1.26 lacks.
    """

    def reducer_override(self, value: object) -> Any:
        if type(value) is not np.ndarray:
            return NotImplemented
        contents = value.ravel().tolist() if value.dtype == object else value.tobytes()
        return np.ndarray, ((0,),), (1, value.shape, value.dtype, False, contents)  # the state of ndarray.__setstate__


def dumps(value: object, protocol: int) -> bytes:
    """Pickle plain Python values, and numpy arrays (no numpy scalars) anywhere among them."""
    file = io.BytesIO()
    _PortablePickler(file, protocol).dump(value)
    return file.getvalue()
