"""The store: an HDF5 file of regions, schema ``refdet-features/1``. No torch, except for `refdet.store.dataset`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refdet.store.reader import (
        CORRUPTION_ERRORS,
        SCHEMA,
        Columns,
        Header,
        ImageRow,
        Store,
        StoreWriter,
        create,
        open,
    )

__all__ = ["CORRUPTION_ERRORS", "SCHEMA", "Columns", "Header", "ImageRow", "Store", "StoreWriter", "create", "open"]


def __getattr__(name: str) -> Any:
    """Import names from `refdet.store.reader` on first use, as importing h5py takes a tenth of a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refdet.store import reader

    return getattr(reader, name)
