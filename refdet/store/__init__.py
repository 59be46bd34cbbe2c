"""The store: the HDF5 file of regions, schema ``refdet-features/1``. No torch, but for `refdet.store.dataset`."""

from refdet.store.reader import DAMAGE, SCHEMA, Columns, Header, ImageRow, Store, StoreWriter, create, open

__all__ = ["DAMAGE", "SCHEMA", "Columns", "Header", "ImageRow", "Store", "StoreWriter", "create", "open"]
