"""Read Parquet files with pyarrow, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refdet.errors import InputError, RuntimeFailure
from refdet.files.short_text import shorten

_BATCH_ROWS = 4096  # rows that are in memory at a time


def read_schema(path: Path) -> Any:
    """Read the schema of a Parquet file, without its rows.

    Args:
        path: the file.

    Returns:
        A pyarrow schema: the columns and their types, in file order.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged.
        RuntimeFailure: not enough memory.
    """
    with _open(path) as file:
        return file.schema_arrow


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a Parquet file.

    Args:
        path: the file.
        columns: names of the columns to read.

    Yields:
        Each row, column -> value.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged.
        RuntimeFailure: not enough memory.
    """
    with _open(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            yield from batch.to_pylist()


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet by its name or its first bytes."""
    if path.suffix.lower() == ".parquet":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"  # the format's signature


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a Parquet file; errors that pyarrow raises within the block name the file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install 'refdet[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except MemoryError:  # also pyarrow's ArrowMemoryError, a subclass
        raise RuntimeFailure(f"{path}: not enough memory to read it") from None
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: invalid UTF-8 in a text
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, not of pyarrow's parser
            raise
        raise InputError(f"{path}: damaged or not a Parquet file ({shorten(error)}); download it again") from None
