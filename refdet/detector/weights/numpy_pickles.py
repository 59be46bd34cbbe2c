"""Pickles of NumPy arrays and plain values, such as detectron2's ``.pkl``, read without importing or calling anything.

`torch_files.read_contents` checks a file first: lengths are within it, and it neither repeats itself nor uses large
indices of the memo. Here the names that pickles of arrays import stand for classes of this module, which keep what they
are given; tensors are made of it once everything was read.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refdet.detector.weights.torch_files import Limited
from refdet.errors import InputError
from refdet.files.short_text import short_repr

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class NotPlain(pickle.UnpicklingError):
    """The pickle imports something else than arrays; the text is its name."""


def has_arrays(classes: Iterable[str]) -> bool:
    """Whether the imports of a pickle include NumPy's arrays."""
    return any(name.lstrip(".").startswith((*_ARRAY_MODULES, *_BUFFER_MODULES)) for name in classes)


def read_pickle(path: Path) -> Any:
    """Read a checked pickle; its arrays become tensors.

    Args:
        path: the file.

    Raises:
        NotPlain: it imports anything but arrays and plain types.
        InputError: an array has another dtype or another number of bytes than its shape; without the file's name.
    """
    with path.open("rb") as file:
        value = _Reader(file).load()
        # each array becomes a tensor of its own, even of bytes that others have too
        if sum(len(array.bytes) for array in _arrays(value, 4)) > 2 * file.tell():
            raise InputError("damaged: it repeats itself")
        return _with_tensors(value, 4)


class _Fixed:
    """Something that a pickle may call but not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _Type:
    """A dtype, of a plain number."""

    __slots__ = ("dtype",)

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise InputError(f"holds an array of {short_repr(code)}, not of numbers; save the model's tensors alone")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array whose bytes are not yet numbers."""

    __slots__ = ("bytes", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.bytes: bytes | bytearray = b""
        self.dtype, self.shape, self.order = np.dtype("f4"), (0,), "C"

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> _Array:
        """Check and keep the parts of an array."""
        if not isinstance(kind, _Type) or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
            raise pickle.UnpicklingError("not an array of numbers")
        sides = shape if isinstance(shape, tuple) else ()
        if sides != shape or len(sides) > 8 or not all(type(side) is int and 0 <= side < 2**40 for side in sides):
            raise pickle.UnpicklingError("not the shape of an array")
        if math.prod(sides) * kind.dtype.itemsize != len(content):
            raise InputError(f"damaged: an array {sides} of {kind.dtype} has {len(content)} bytes")
        self.bytes, self.dtype, self.shape, self.order = content, kind.dtype, sides, order
        return self

    def tensor(self) -> Tensor:
        """The array as a tensor of the machine's byte order."""
        values = np.frombuffer(self.bytes, self.dtype).reshape(self.shape, order=self.order)  # type: ignore[call-overload]
        return torch.from_numpy(np.array(values, self.dtype.newbyteorder("="), order="C"))


class _Dict(dict):
    """An ordered dictionary; attributes, such as the versions of modules, are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names in `find_class` only."""

    def __init__(self, file: Any) -> None:
        limited = Limited(file)
        self._budget = 2 * limited.left  # bytes of text that may become bytes
        super().__init__(limited, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        """What a name of a pickle stands for."""
        if module in _ARRAY_MODULES and name == "_reconstruct":
            return _Fixed(lambda *_: _Text(self))
        if module in _ARRAY_MODULES and name == "scalar":
            return _Fixed(self._scalar)
        if module in _BUFFER_MODULES and name == "_frombuffer":
            return _Fixed(lambda content, kind, shape, order: _Array().fill(content, kind, shape, order))
        if (module, name) == ("numpy", "ndarray"):
            return _Fixed(_Array)
        if (module, name) == ("numpy", "dtype"):
            return _Fixed(lambda code, *_: _Type(code))
        if (module, name) == ("_codecs", "encode"):
            return _Fixed(self.encode)
        if module in ("__builtin__", "builtins") and name == "bytes":
            return _Fixed(lambda: b"")  # protocol 2 of no bytes
        if (module, name) == ("collections", "OrderedDict"):
            return _Fixed(lambda: _Dict())
        raise NotPlain(f"{module}.{name}")

    def encode(self, text: Any, encoding: str = "latin1") -> bytes:
        """Bytes that an old protocol holds as text."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("not bytes as text")
        self._budget -= len(text)
        if self._budget < 0:
            raise InputError("damaged: it repeats itself")
        return text.encode("latin1")

    def _scalar(self, kind: Any, content: Any = b"") -> Any:
        content = self.encode(content) if isinstance(content, str) else content
        return _Array().fill(content, kind, (), "C").tensor().item()


class _Text(_Array):
    """An array whose bytes are text in files of Python 2."""

    __slots__ = ("_reader",)

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def __setstate__(self, state: Any) -> None:
        *start, content = state
        super().__setstate__((*start, self._reader.encode(content) if isinstance(content, str) else content))


def _arrays(value: Any, depth: int) -> Iterator[_Array]:
    """The arrays that `_with_tensors` converts."""
    if isinstance(value, _Array):
        yield value
    elif isinstance(value, Mapping) and depth:
        for item in value.values():
            yield from _arrays(item, depth - 1)


def _with_tensors(value: Any, depth: int) -> Any:
    """Arrays as tensors, in a few levels of dictionaries; what is deeper is no weight."""
    if isinstance(value, _Array):
        return value.tensor()
    if isinstance(value, Mapping) and depth:
        return {key: _with_tensors(item, depth - 1) for key, item in value.items()}
    return value
