"""Malicious stores: structures that HDF5 allows but no store has."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from evaluate_examples import PROVENANCE
from h5py import h5d, h5p, h5s, h5t, h5z

from refdet import store
from refdet.structures.regions import Regions

REGIONS = (3, 0, 2)  # of each image
HEADER = store.Header([{"id": 3, "name": "dög"}], "name: test", PROVENANCE, {"dtype": "float32"})


def write_store(path: Path, compression: str = "none", libver: str = "", ann_ids: bool = True) -> Path:
    """Write a valid store of three images with every kind of column.

    Args:
        path: the store to write.
        compression: of features and maps.
        libver: h5py's name of a version of the HDF5 layout, "" for that of stores.
        ann_ids: whether its regions have annotation ids.

    Returns:
        ``path``.
    """
    columns = store.Columns(
        {"fc7": (64,), "spatial_fc7": (4, 2, 2)}, masks=True, ann_ids=ann_ids, maps=("head",), compression=compression
    )
    rows = [store.ImageRow(10 + i, f"{i}.jpg", 9, 7, "", n, 2 * n, (2, 3, 4)) for i, n in enumerate(REGIONS)]
    random = np.random.default_rng(0)
    with store.create(path, HEADER, columns, rows) as writer:
        for row, n in zip(rows, REGIONS, strict=True):
            features = {name: random.random((n, *shape), np.float32) for name, shape in columns.features.items()}
            writer.put(
                Regions(
                    row.id, row.file_name, 9, 7, np.tile(np.float32([1, 1, 4, 5]), (n, 1)),
                    random.random(n, np.float32), np.full(n, 3),
                    ann_ids=np.arange(n) if ann_ids else None, masks=(b"o1",) * n, features=features,
                    maps={"head": random.random((2, 3, 4), np.float32)}, im_info=np.float32([48, 64, 1.5]),
                )
            )  # fmt: skip
    if libver:
        other = path.with_name("copy.h5")
        with h5py.File(path) as source, h5py.File(other, "w", libver=libver) as copy:
            copy.attrs.update(source.attrs)
            for name in source:
                source.copy(name, copy)
        other.replace(path)
    return path


Edit = Callable[[h5py.File], object]  # makes a store malicious; what it returns is ignored


def _fc7(make: Callable[[h5py.File, str, int], object]) -> Edit:
    """Edit that replaces ``features/fc7``; ``make`` creates it from the file, that name and the number of regions."""

    def edit(file: h5py.File) -> None:
        del file["features/fc7"]
        make(file, "features/fc7", sum(REGIONS))

    return edit


def _fc7_of_type(dtype: object) -> Edit:
    """Edit that makes ``features/fc7`` a dataset of one value of this type per region."""
    return _fc7(lambda file, name, n: file.create_dataset(name, (n,), dtype, data=np.zeros(n, dtype)))


def _virtual_of_itself(file: h5py.File, name: str, n: int) -> None:
    layout = h5py.VirtualLayout((n, 4), "f4")
    layout[:] = h5py.VirtualSource(".", name, (n, 4))
    file.create_virtual_dataset(name, layout)


def _fc7_chunk(chunk: bytes, compression: str, filter_mask: int = 0) -> Edit:
    """Edit that makes ``features/fc7`` one chunk of 5 x 64 float32, stored as these bytes.

    Args:
        chunk: the bytes.
        compression: "gzip" or "lzf".
        filter_mask: 1 to declare that the chunk was stored without compression.
    """

    def make(file: h5py.File, name: str, n: int) -> None:
        data = file.create_dataset(name, (n, 64), "f4", chunks=(n, 64), compression=compression)
        data.id.write_direct_chunk((0, 0), chunk, filter_mask)

    return _fc7(make)


def _fc7_filter(code: int, values: tuple[int, ...]) -> Edit:
    """Edit that makes ``features/fc7`` a dataset with this filter and these parameters of it."""

    def make(file: h5py.File, name: str, n: int) -> None:
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_chunk((n, 4))
        properties.set_filter(code, h5z.FLAG_OPTIONAL, values)  # optional: this HDF5 need not have the filter
        dtype, space = h5t.py_create(np.dtype("f4")), h5s.create_simple((n, 4))
        data = h5d.create(file.id, name.encode(), dtype, space, dcpl=properties)
        data.write_direct_chunk((0, 0), bytes(16 * n), 1)  # 1: stored without the filter

    return _fc7(make)


def _array_type(file: h5py.File, name: str, n: int) -> None:
    dtype = h5t.array_create(h5t.IEEE_F32LE, (3,))
    h5d.create(file.id, name.encode(), dtype, h5s.create_simple((n,)))


def _deep_groups(file: h5py.File) -> None:
    file.create_group("a/b/c/d/e/f/g/h/i/j")


def _many_groups(file: h5py.File) -> None:
    for i in range(1001):
        file.create_group(f"many/{i}")


def _many_attributes(file: h5py.File) -> None:
    for i in range(101):
        file["images"].attrs[str(i)] = i


def _partly_written(file: h5py.File, name: str, n: int) -> None:
    file.create_dataset(name, (n, 4), "f4", chunks=(1, 4))[0] = 1


# Name -> edit of a valid store, and a regular expression for the message that refuses the result.
STRUCTURES: dict[str, tuple[Edit, str]] = {
    "soft link": (_fc7(lambda file, name, n: file.__setitem__(name, h5py.SoftLink("/regions/box"))), "a soft link"),
    "soft loop": (_fc7(lambda file, name, n: file.__setitem__(name, h5py.SoftLink("/" + name))), "a soft link"),
    "dangling link": (lambda file: file.__setitem__("x", h5py.SoftLink("/nowhere")), "/x is a soft link"),
    "external link": (
        _fc7(lambda file, name, n: file.__setitem__(name, h5py.ExternalLink("/etc/passwd", "x"))),
        "/features/fc7 is a link to another file",
    ),
    "external group": (lambda file: file.__setitem__("x", h5py.ExternalLink("y.h5", "/")), "link to another file"),
    "group in itself": (lambda file: file.__setitem__("features/more", file["features"]), "under another name"),
    "root in itself": (lambda file: file.__setitem__("maps/root", file["/"]), "under another name"),
    "group twice": (lambda file: file.__setitem__("more", file["features"]), "under another name"),
    "external storage": (
        _fc7(lambda file, name, n: file.create_dataset(name, (n, 4), "f4", external=[("/etc/passwd", 0, 16 * n)])),
        "/features/fc7 has its values in another file",
    ),
    "virtual of itself": (_fc7(_virtual_of_itself), "/features/fc7 is a virtual dataset"),
    "named type": (lambda file: file.__setitem__("x", np.dtype("f4")), "neither a group nor a dataset"),
    "shared type": (
        lambda file: (file.__setitem__("x", np.dtype("f4")), file.create_dataset("a", (2,), file["x"])),
        "/a has a committed type|/x is neither",
    ),
    "compound": (_fc7_of_type("i4,f4"), "has an unsupported type"),
    "array type": (_fc7(_array_type), "has an unsupported type"),
    "opaque": (_fc7_of_type("V7"), "has an unsupported type"),
    "enum": (_fc7_of_type(h5py.enum_dtype({"a": 1}, "i4")), "has an unsupported type"),
    "complex": (_fc7_of_type("c8"), "has an unsupported type"),
    "long text": (_fc7_of_type("S5000"), "has an unsupported type"),
    "reference": (
        _fc7(lambda file, name, n: file.create_dataset(name, (n,), h5py.ref_dtype, data=[file.ref] * n)),
        "has an unsupported type",
    ),
    "ragged": (
        _fc7(lambda file, name, n: file.create_dataset(name, (n,), h5py.vlen_dtype("i4"))), "has an unsupported type",
    ),
    "no shape": (_fc7(lambda file, name, n: file.create_dataset(name, data=h5py.Empty("f4"))), "has no shape"),
    "nine dimensions": (_fc7(lambda file, name, n: file.create_dataset(name, data=np.zeros((1,) * 9))), "dimensions"),
    "never written": (_fc7(lambda file, name, n: file.create_dataset(name, (2**40, 4), "f4")), "declares .* but has 0"),
    "starts that expand": (
        lambda file: (
            file.__delitem__("maps/head_start"),
            file.create_dataset("maps/head_start", data=np.zeros(2**24, np.int64), compression="gzip"),
        ),
        "/maps/head_start declares 134217728 bytes but has",
    ),
    "chunks never written": (
        _fc7(lambda file, name, n: file.create_dataset(name, (2**40, 4), "f4", chunks=(2**16, 4))), "never written",
    ),
    "chunks partly written": (_fc7(_partly_written), "has 1 of 5 chunks"),
    "boxes of zeros": (
        lambda file: (
            file.__delitem__("regions/box"),
            file.create_dataset("regions/box", (2**23, 4), "f4", data=np.zeros((2**23, 4), "f4"), compression="gzip",
                                chunks=(2**20, 4)),
        ),
        "/regions/box declares 134217728 bytes",
    ),
    "huge chunks": (
        _fc7(lambda file, name, n: file.create_dataset(name, data=np.zeros((n, 2**22), "f4"), chunks=(n, 2**22))),
        "chunks of 83886080 bytes",
    ),
    "short gzip": (_fc7_chunk(zlib.compress(bytes(100)), "gzip"), "a chunk of 100 bytes instead of 1280"),
    # decompression stops one byte after the expected size
    "long gzip": (_fc7_chunk(zlib.compress(bytes(10**6)), "gzip"), "a chunk of 1281 bytes instead of 1280"),
    "gzip skipped": (_fc7_chunk(bytes(100), "gzip", 1), "a chunk of 100 bytes instead of 1280"),
    "short lzf": (_fc7_chunk(b"\x03abcd", "lzf"), "a chunk of 4 bytes instead of 1280"),
    "long lzf": (_fc7_chunk(b"\x00a" + b"\xe0\xff\x00" * 9, "lzf"), "a chunk of .* bytes instead of 1280"),
    "large compressed": (_fc7_chunk(bytes(4000), "gzip"), "larger compressed than uncompressed"),
    "fletcher32": (
        _fc7(lambda file, name, n: file.create_dataset(name, data=np.zeros((n, 4), "f4"), fletcher32=True)), "filters",
    ),
    "scale-offset": (
        _fc7(lambda file, name, n: file.create_dataset(name, data=np.zeros((n, 4), "i4"), scaleoffset=0)), "filters",
    ),
    "unknown filter": (_fc7_filter(32015, (3,)), r"unsupported filters \(32015\)"),
    "shuffle without parameters": (_fc7_filter(h5z.FILTER_SHUFFLE, ()), "unsupported filters"),
    "groups too deep": (_deep_groups, "groups deep"),
    "too many groups": (_many_groups, "more than 1000"),
    "too many attributes": (_many_attributes, "/images has more than 100 attributes"),
    "large attribute": (lambda file: file.attrs.__setitem__("x", np.zeros(5000, "i1")), "has 5000 values"),
    "odd attribute": (
        lambda file: file.attrs.__setitem__("x", np.zeros(2, "i4,f4")), "attribute x of / has an unsupported type",
    ),
    "attribute that refers": (lambda file: file.attrs.__setitem__("x", file.ref), "has an unsupported type"),
    "escape in a name": (lambda file: file.create_group("\x1b[2J"), "an invalid name"),
    "newline in a feature": (
        lambda file: file.create_dataset("features/a\nproven: clean", data=np.zeros((5, 2), "f4")),
        "an invalid name",
    ),
    "text of two dimensions": (
        lambda file: file.create_dataset("x", data=[["a"]], dtype=h5py.string_dtype()), "strings in 2 dimensions",
    ),
    "chunked strings": (
        lambda file: file.create_dataset("x", data=["a"], dtype=h5py.string_dtype(), chunks=(1,)), "chunked strings",
    ),
}  # fmt: skip


def repeat_text(path: Path) -> None:
    """Add 1000 strings that all refer to the same 100 KB: 100 MB in a file of 0.1 MB."""
    with h5py.File(path, "r+") as file:
        data = file.create_dataset("x", data=["y" * 100_000, *[""] * 999], dtype=h5py.string_dtype())
        offset = data.id.get_offset()  # of 16 bytes per string, which refer to its text
    content = bytearray(path.read_bytes())
    content[offset : offset + 16 * 1000] = content[offset : offset + 16] * 1000
    path.write_bytes(content)


def share_bytes(path: Path, times: int = 40) -> None:
    """Add datasets that share the same bytes, in a file of the oldest layout, whose metadata have no checksums."""
    with h5py.File(path, "r+") as file:
        data = [file.create_dataset(f"x{i}", (500,), "i8") for i in range(times)]
        data[0][:] = 1
        offset = data[0].id.get_offset()
    nowhere = 2**64 - 1  # address of the 4000 bytes of a dataset that was never written
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<QQ", nowhere, 4000), struct.pack("<QQ", offset, 4000)))
