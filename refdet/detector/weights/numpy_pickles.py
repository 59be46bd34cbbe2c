"""Read pickles of NumPy arrays and plain values, such as detectron2's ``.pkl``, without running code from them.

`torch_files.read_contents` must check a file first: that lengths do not exceed the file, that it does not repeat
itself, and that memo indices are small. The globals of such pickles (the classes and functions that they import) are
resolved to classes of this module, which only store their arguments; tensors are created once the whole file is read.
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

from refdet.detector.weights.torch_files import BoundedReader
from refdet.errors import InputError
from refdet.files.short_text import format_count, short_repr

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_NUMERIC_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_MAX_DEPTH = 4  # of nested dictionaries whose arrays become tensors; weights are not nested deeper


class UnsafeGlobal(pickle.UnpicklingError):
    """The pickle imports a global that arrays and plain values do not need; the message is its name."""


def has_arrays(names: Iterable[str]) -> bool:
    """Whether the globals of a pickle, by their dotted names, include those of NumPy's arrays."""
    return any(name.startswith((*_ARRAY_MODULES, *_BUFFER_MODULES)) for name in names)


def read_pickle(path: Path) -> Any:
    """Read a checked pickle; its arrays become tensors.

    Args:
        path: the file.

    Raises:
        UnsafeGlobal: the pickle imports a global that arrays and plain values do not need.
        InputError: an array is not numeric, or its shape does not match its number of bytes; or arrays share bytes.
            The message has no file name.
    """
    with path.open("rb") as file:
        value = _Reader(file).load()
        # Arrays that share bytes become separate tensors, so a small file could take much memory. Twice the size of the
        # file leaves room for a few that share.
        if sum(len(array.bytes) for array in _iter_arrays(value, _MAX_DEPTH)) > 2 * file.tell():
            raise InputError("damaged: it repeats itself")
        return _to_tensors(value, _MAX_DEPTH)


class _ReadOnlyCallable:
    """A callable that a pickle may call but not modify."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _DType:
    """A numeric dtype."""

    __slots__ = ("dtype",)

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or code not in _NUMERIC_DTYPES:
            raise InputError(f"holds an array of {short_repr(code)}, not of numbers; save the model's tensors alone")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array whose bytes are not decoded yet."""

    __slots__ = ("bytes", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.bytes: bytes | bytearray = b""
        self.dtype, self.shape, self.order = np.dtype("f4"), (0,), "C"

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> _Array:
        """Check and store the parts of an array."""
        if not isinstance(kind, _DType) or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
            raise pickle.UnpicklingError("not an array of numbers")
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise pickle.UnpicklingError("not the shape of an array")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise InputError(f"damaged: an array {shape} of {kind.dtype} has {format_count(len(content), 'byte')}")
        self.bytes, self.dtype, self.shape, self.order = content, kind.dtype, shape, order
        return self

    def tensor(self) -> Tensor:
        """The array as a tensor, in native byte order."""
        values = np.frombuffer(self.bytes, self.dtype).reshape(self.shape, order=self.order)  # type: ignore[call-overload]
        return torch.from_numpy(np.array(values, self.dtype.newbyteorder("="), order="C"))


class _OrderedDict(dict):
    """An OrderedDict of any Python; drops attributes such as ``_metadata``, the versions of a state dict's modules."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """An unpickler that allows only the globals in `find_class`."""

    def __init__(self, file: Any) -> None:
        reader = BoundedReader(file)
        self._encodable = 2 * reader.left  # characters that may still be encoded; the same text may be encoded again
        super().__init__(reader, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global to a callable of this module that takes the same arguments."""
        if module in _ARRAY_MODULES and name == "_reconstruct":
            return _ReadOnlyCallable(lambda *_: _TextArray(self))
        if module in _ARRAY_MODULES and name == "scalar":
            return _ReadOnlyCallable(self._scalar)
        if module in _BUFFER_MODULES and name == "_frombuffer":
            return _ReadOnlyCallable(lambda content, kind, shape, order: _Array().fill(content, kind, shape, order))
        if (module, name) == ("numpy", "ndarray"):
            return _ReadOnlyCallable(_Array)
        if (module, name) == ("numpy", "dtype"):
            return _ReadOnlyCallable(lambda code, *_: _DType(code))
        if (module, name) == ("_codecs", "encode"):
            return _ReadOnlyCallable(self.encode)
        if module in ("__builtin__", "builtins") and name == "bytes":
            return _ReadOnlyCallable(lambda: b"")  # how protocol 2 stores empty bytes
        if (module, name) == ("collections", "OrderedDict"):
            return _ReadOnlyCallable(_OrderedDict)
        raise UnsafeGlobal(f"{module}.{name}")

    def encode(self, text: Any, encoding: str = "latin1") -> bytes:
        """Encode the text as which old protocols store bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("not bytes as text")
        self._encodable -= len(text)
        if self._encodable < 0:
            raise InputError("damaged: it repeats itself")
        return text.encode("latin1")

    def _scalar(self, kind: Any, content: Any = b"") -> Any:
        """The number of a NumPy scalar, from its dtype and bytes."""
        content = self.encode(content) if isinstance(content, str) else content
        return _Array().fill(content, kind, (), "C").tensor().item()


class _TextArray(_Array):
    """An array whose bytes may be text, as in files of Python 2."""

    __slots__ = ("_reader",)

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def __setstate__(self, state: Any) -> None:
        *start, content = state
        super().__setstate__((*start, self._reader.encode(content) if isinstance(content, str) else content))


def _iter_arrays(value: Any, depth: int) -> Iterator[_Array]:
    """Iterate over the arrays that `_to_tensors` converts."""
    if isinstance(value, _Array):
        yield value
    elif isinstance(value, Mapping) and depth:
        for item in value.values():
            yield from _iter_arrays(item, depth - 1)


def _to_tensors(value: Any, depth: int) -> Any:
    """Convert arrays to tensors, in dictionaries nested up to a depth."""
    if isinstance(value, _Array):
        return value.tensor()
    if isinstance(value, Mapping) and depth:
        return {key: _to_tensors(item, depth - 1) for key, item in value.items()}
    return value
