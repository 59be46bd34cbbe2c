"""Reading a pickle that may hold nothing but plain values, so that a downloaded file cannot run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from .errors import ReferDataError, ReferNotFoundError

# Python 2 writes sets as calls of these; every other plain value has an opcode of its own.
_PLAIN = {
    (module, name): kind
    for module in ("builtins", "__builtin__")
    for name, kind in {"set": set, "frozenset": frozenset}.items()
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module, name]
        except KeyError:
            raise ReferDataError(
                f"asks for {module}.{name}; only lists, dictionaries, sets, numbers and strings are read"
            ) from None


def read_plain_pickle(path: Path) -> Any:
    """Unpickle a file of lists, tuples, dictionaries, sets, numbers, strings, booleans and None.

    Files of Python 2 are read too, their byte strings as latin-1.

    Raises:
        ReferNotFoundError: there is no such file.
        ReferDataError: the file is truncated, no pickle, or asks for anything else, which is named.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise ReferNotFoundError(f"{path}: no such file") from None
    except ReferDataError as error:
        raise ReferDataError(f"{path}: {error}") from None
    except OSError as error:
        raise ReferDataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except EOFError:
        raise ReferDataError(f"{path}: the file is cut short; download it again") from None
    except Exception as error:  # bytes that are no pickle can make the machine fail in any way
        reason = str(error) or type(error).__name__
        raise ReferDataError(f"{path}: not a readable pickle ({reason}); download it again") from None
