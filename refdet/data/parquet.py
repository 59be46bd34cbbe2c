"""Read rows of Parquet files with pyarrow, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from refdet.errors import InputError, RefdetError, RuntimeFailure
from refdet.files.short_text import shorten

_ROWS = 4096  # at a time


def read_rows(path: Path, choose_columns: Callable[[Any], Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a Parquet file.

    Args:
        path: the file.
        choose_columns: returns the names of the columns to read, given the file's pyarrow schema.

    Yields:
        Each row, column -> value.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged.
        RuntimeFailure: not enough memory.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install 'refdet[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(choose_columns(file.schema_arrow))
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                yield from batch.to_pylist()
    except RefdetError:
        raise  # from choose_columns
    except MemoryError:  # also Arrow's
        raise RuntimeFailure(f"{path}: not enough memory to read it") from None
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: invalid UTF-8 in a text
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path}: damaged or not a Parquet file ({shorten(error)}); download it again") from None


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet by its name or its first bytes."""
    if path.suffix == ".parquet":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"
