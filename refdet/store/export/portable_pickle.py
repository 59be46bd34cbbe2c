"""Pickle arrays so that any version of numpy can read them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


class _PortablePickler(pickle.Pickler):
    """Pickles arrays by ``numpy.ndarray`` and ``numpy.dtype`` only.

    numpy's own pickles refer to ``numpy._core``, which does not exist before numpy 1.26.
    """

    def reducer_override(self, value: object) -> Any:
        if type(value) is not np.ndarray:
            return NotImplemented
        contents = value.ravel().tolist() if value.dtype == object else value.tobytes()
        # an empty array, and the arguments of its __setstate__: version, shape, dtype, Fortran order and contents
        return np.ndarray, ((0,),), (1, value.shape, value.dtype, False, contents)


def dumps(value: object, protocol: int) -> bytes:
    """Pickle plain Python values that may contain numpy arrays, but no numpy scalars."""
    file = io.BytesIO()
    _PortablePickler(file, protocol).dump(value)
    return file.getvalue()
