"""Check the structure of a store's HDF5 file, rejecting HDF5 features that no store uses.

HDF5 files can refer to other files (external links, external storage, virtual datasets), contain themselves, and
declare sizes without data. A store consists only of groups and plain arrays with all their data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

from refdet.store.hdf5_chunks import StructureError, check_chunks, check_filters
from refdet.store.schema import MAPS

MAX_OBJECTS = 1000  # a store has about 25
MAX_DEPTH = 8
MAX_RANK = 8
MAX_ATTRIBUTES = 100  # per object
MAX_ATTRIBUTE_VALUES = 4096
MAX_TEXT = 2**26  # characters of an attribute
MAX_NAME = 255  # bytes of the name of a link or attribute
MAX_FIXED_TEXT = 4096  # bytes of a fixed-length string

# Features and maps are read image by image and may compress well, as they are mostly zeros. All other datasets are read
# at once, so their size is limited to this many bytes or, if that is more, this multiple of their size in the file.
_FEATURES, _MAPS = "/features/", tuple(f"/maps/{name}" for name in MAPS)
MAX_UNCOMPRESSED = 2**26
MAX_RATIO = 32

_VLEN_STRING = np.dtype([("bytes", "<u4"), ("address", "<u8"), ("index", "<u4")])  # a variable-length string on disk
_STRING_BLOCK = 10_000  # strings to read at once
_LINK_KINDS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}


def check_structure(file: h5py.File) -> None:
    """Check everything in a file except the values of large arrays.

    All attributes and strings are read once, since HDF5 reads these without checksums.

    Args:
        file: the open file.

    Raises:
        StructureError: the file has something that no store has, or declares more data than it has.
        Exception: h5py can raise any exception on a damaged file.
    """
    descriptor = file.id.get_vfd_handle()
    size = os.fstat(descriptor).st_size
    if file.id.get_create_plist().get_userblock():
        raise StructureError("its HDF5 data do not start at the first byte")
    stored = 0  # bytes of all datasets in the file
    for name, node in _iterate_objects(h5g.open(file.id, b"/")):
        _check_attributes(name, node)
        if isinstance(node, h5d.DatasetID):
            stored += _check_dataset(name, node, size, descriptor)
    if stored > size:
        raise StructureError(f"its datasets overlap: {stored} bytes in a file of {size}")


def _iterate_objects(root: h5g.GroupID) -> Iterator[tuple[str, Any]]:
    """Iterate once over (path, object) of all groups and datasets, checking links before following them."""
    pending: list[tuple[str, int, h5g.GroupID]] = [("", 0, root)]
    seen = {h5o.get_info(root).addr}
    yield "/", root
    while pending:
        parent, depth, group = pending.pop()
        for name, kind in _links(parent, group):
            path = f"{parent}/{name}"
            if kind != h5l.TYPE_HARD:
                raise StructureError(f"{path} is {_LINK_KINDS.get(kind, 'a user-defined link')}")
            node = h5o.open(group, name.encode())
            address = h5o.get_info(node).addr  # the same for all hard links to an object
            if isinstance(node, h5g.GroupID):
                if address in seen:
                    raise StructureError(f"{path} is a group that already exists under another name")
                if depth == MAX_DEPTH:
                    raise StructureError(f"{path} is more than {MAX_DEPTH} groups deep")
                pending.append((path, depth + 1, node))
            elif not isinstance(node, h5d.DatasetID):
                raise StructureError(f"{path} is neither a group nor a dataset")
            if address not in seen:
                seen.add(address)
                yield path, node
            if len(seen) > MAX_OBJECTS:
                raise StructureError(f"it has more than {MAX_OBJECTS} groups and datasets")


def _links(parent: str, group: h5g.GroupID) -> list[tuple[str, int]]:
    """(name, kind) of a group's links, without following them."""
    links: list[tuple[bytes, int]] = []

    def visit(name: bytes, info: Any) -> bool | None:
        links.append((name, info.type))
        return True if len(links) > MAX_OBJECTS else None  # True stops the iteration; `_iterate_objects` then fails

    group.links.iterate(visit, info=True)
    return [(_decode_name(parent, name), kind) for name, kind in links]


def _decode_name(parent: str, name: bytes) -> str:
    """Decode and check the name of a link or attribute; ``parent`` is the path of its group or dataset."""
    text = name.decode("utf-8", "backslashreplace")
    if (
        text.encode() != name
        or not text.isprintable()
        or len(name) > MAX_NAME
        or "/" in text
        or text in ("", ".", "..")
    ):
        raise StructureError(f"{parent or '/'} contains an invalid name: {text!r:.80}")
    return text


def _check_attributes(path: str, node: Any) -> None:
    """Check the attributes of a group or dataset, and read each once."""
    names: list[bytes] = []

    def visit(name: bytes, *_: Any) -> bool | None:
        names.append(name)
        return True if len(names) > MAX_ATTRIBUTES else None  # True stops the iteration

    h5a.iterate(node, visit)
    if len(names) > MAX_ATTRIBUTES:
        raise StructureError(f"{path} has more than {MAX_ATTRIBUTES} attributes")
    owner = h5py.Group(node) if isinstance(node, h5g.GroupID) else h5py.Dataset(node)
    for raw in names:
        name = f"attribute {_decode_name(path, raw)} of {path}"
        attribute = h5a.open(node, raw)
        is_text, shape = _check_type(name, attribute.get_type()), _check_shape(name, attribute.get_space())
        if math.prod(shape) > MAX_ATTRIBUTE_VALUES:
            raise StructureError(f"{name} has {math.prod(shape)} values")
        value = owner.attrs[raw.decode()]
        if is_text and isinstance(value, str) and len(value) > MAX_TEXT:
            raise StructureError(f"{name} has {len(value)} characters")


def _check_dataset(name: str, data: h5d.DatasetID, size: int, descriptor: int) -> int:
    """Check a dataset.

    Args:
        name: path of the dataset.
        data: the dataset.
        size: size of the file in bytes.
        descriptor: file descriptor of the file.

    Returns:
        Size of the dataset in the file in bytes.

    Raises:
        StructureError: the dataset has something that no store has, or declares more data than it has.
    """
    dcpl = data.get_create_plist()
    if dcpl.get_external_count():
        raise StructureError(f"{name} has its values in another file (external storage)")
    layout = dcpl.get_layout()
    if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
        raise StructureError(f"{name} is a virtual dataset")
    is_text, shape = _check_type(name, data.get_type()), _check_shape(name, data.get_space())
    itemsize = _VLEN_STRING.itemsize if is_text else data.get_type().get_size()
    filters = check_filters(name, dcpl, itemsize)
    declared, stored = math.prod(shape) * itemsize, data.get_storage_size()
    is_read_at_once = not name.startswith(_FEATURES) and name not in _MAPS
    if is_read_at_once and declared > max(MAX_UNCOMPRESSED, MAX_RATIO * stored):
        raise StructureError(f"{name} declares {declared} bytes but has {stored}")
    if layout == h5d.CHUNKED:
        if is_text:
            raise StructureError(f"{name} has chunked strings")
        check_chunks(name, data, shape, itemsize, dcpl.get_chunk(), filters, size)
        return stored
    offset = data.get_offset() if layout == h5d.CONTIGUOUS else 0  # compact data are in the header of the dataset
    if declared and (stored != declared or offset is None or offset + stored > size):
        raise StructureError(f"{name} declares {declared} bytes but has {stored}")
    if is_text and declared:
        if layout != h5d.CONTIGUOUS:
            raise StructureError(f"{name} has strings in the header")
        _read_strings(name, data, shape, offset, size, descriptor)
    return stored


def _read_strings(
    name: str, data: h5d.DatasetID, shape: tuple[int, ...], offset: int, size: int, descriptor: int
) -> None:
    """Read all strings once, after checking their total length, as all of them could share the same bytes."""
    if len(shape) != 1:
        raise StructureError(f"{name} has strings in {len(shape)} dimensions")
    raw = os.pread(descriptor, shape[0] * _VLEN_STRING.itemsize, offset)
    total = int(np.frombuffer(raw, _VLEN_STRING)["bytes"].sum(dtype=np.uint64))
    if total > size:
        raise StructureError(f"{name} declares {total} bytes of strings in a file of {size}")
    texts = h5py.Dataset(data)
    for first in range(0, shape[0], _STRING_BLOCK):
        texts[first : first + _STRING_BLOCK]  # fails or crashes here if the strings are damaged


def _check_type(name: str, type_id: h5t.TypeID) -> bool:
    """Check that a store may use a type.

    Args:
        name: the dataset or attribute, for error messages.
        type_id: its type.

    Returns:
        True for variable-length strings; False for numbers, bools and short fixed-length strings.

    Raises:
        StructureError: another type, or numbers that NumPy lacks.
    """
    if type_id.committed():
        raise StructureError(f"{name} has a committed type")
    type_class, size = type_id.get_class(), type_id.get_size()
    if type_class == h5t.STRING:
        if type_id.is_variable_str():
            return True
        allowed = size <= MAX_FIXED_TEXT
    elif type_class in (h5t.INTEGER, h5t.FLOAT):
        allowed = size <= 8 and type_id.equal(h5t.py_create(type_id.dtype))
    else:
        allowed = type_class == h5t.ENUM and type_id.equal(h5t.py_create(np.dtype(bool), logical=True))
    if not allowed:
        raise StructureError(f"{name} has an unsupported type")
    return False


def _check_shape(name: str, space: h5s.SpaceID) -> tuple[int, ...]:
    """Check and return the shape of a dataset or attribute; () for a scalar."""
    if space.get_simple_extent_type() not in (h5s.SCALAR, h5s.SIMPLE):
        raise StructureError(f"{name} has no shape")
    if space.get_simple_extent_ndims() > MAX_RANK:
        raise StructureError(f"{name} has more than {MAX_RANK} dimensions")
    shape: tuple[int, ...] = space.get_simple_extent_dims()
    return shape
