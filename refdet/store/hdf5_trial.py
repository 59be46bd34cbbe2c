"""A process that looks through an HDF5 file before ours opens it.

Damage makes HDF5 crash, loop for ever or take all memory, and only a process of its own can be ended then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from refdet.store.schema import FAMILY, SCHEMA

log = logging.getLogger(__name__)

MEMORY = 3 << 29  # bytes of address space; Python with h5py takes a tenth, a store whatever its size little more
SECONDS = 2.5  # of computing, and
SECONDS_A_GB = 200.0  # for each GB of the file: its chunks are unpacked, of lzf in Python
PATIENCE = 6  # times as many seconds may pass while it waits for the disk
_SOON = 3.0  # seconds without a word

_STARTED = b"started\n"
# The folder we are in may be a stranger's: -I takes it, and all that the environment says, off the path of imports.
_START = """
import sys
at = next((i for i, p in enumerate(sys.path) if p.endswith(("site-packages", "dist-packages"))), len(sys.path))
sys.path[at:at] = sys.argv[4:]
from refdet.store.hdf5_trial import main
main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
"""


def try_file(path: Path) -> str:
    """What is wrong with a file, as the words after its name in an error; "" if HDF5 can read it and it is a store's.

    Where no process can be started, the file is looked through in this one, and a warning says so.
    """
    seconds = SECONDS + SECONDS_A_GB * path.stat().st_size / 1e9
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, os.path.abspath(path), str(MEMORY), str(seconds), *_import_folders()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment(), cwd=os.sep,
        )  # fmt: skip
    except OSError as error:
        return _try_here(path, str(error))
    with child:
        try:
            output = _wait(child, path, PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return _damaged(f"HDF5 does not get to its end within {PATIENCE * seconds:.3g} seconds")
        finally:
            child.kill()
    if not output.startswith(_STARTED):
        return _try_here(path, f"it ends with {child.returncode}")
    return verdict(output, child.returncode, seconds)


def _wait(child: subprocess.Popen[bytes], path: Path, seconds: float) -> bytes:
    try:
        return child.communicate(timeout=_SOON)[0]
    except subprocess.TimeoutExpired:
        log.warning("note: looking through %s for damage, once", path)
    return child.communicate(timeout=seconds)[0]


def verdict(output: bytes, code: int, seconds: float) -> str:
    """What `try_file` says, of the other process's output and exit code."""
    with suppress(ValueError):
        return str(json.loads(output.removeprefix(_STARTED))["wrong"])
    if code >= 0:
        return _damaged(f"HDF5 ends with {code}")
    name = signal.Signals(-code).name
    if name == "SIGXCPU":
        return _damaged(f"HDF5 does not get to its end within {seconds:.3g} seconds of computing")
    return _damaged(f"HDF5 crashes ({name})")


def _try_here(path: Path, why: str) -> str:
    log.warning("note: %s: looked through without the guard of a process of its own (%s)", path, why)
    return look_through(path)


def _import_folders() -> list[str]:
    """Where this process has the packages from that the other one needs."""
    import h5py
    import numpy

    here = Path(__file__).resolve().parents[2]
    others = (Path(module.__file__).resolve().parents[1] for module in (h5py, numpy) if module.__file__)
    return list(dict.fromkeys(map(str, (here, *others))))


def _environment() -> dict[str, str]:
    """Ours, without plugins that HDF5 would load for a filter that it does not know, and with one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HDF5_PLUGIN")}
    return kept | {"HDF5_PLUGIN_PRELOAD": "::", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(path: str, memory: int, seconds: float) -> None:
    """The other process: say "started", then what is wrong as JSON."""
    import refdet.store.hdf5_structure  # noqa: F401  # before anything of the file is read: what fails up to here is ours

    with suppress(ImportError):  # not on Windows
        import resource

        spent = math.ceil(time.process_time() + seconds)
        limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: spent, resource.RLIMIT_CORE: 0}
        for what, limit in limits.items():
            _, hard = resource.getrlimit(what)
            resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    print(_STARTED.decode(), end="", flush=True)
    print(json.dumps({"wrong": look_through(Path(path))}), flush=True)


def look_through(path: Path) -> str:
    """See `try_file`; in this process."""
    from refdet.store.hdf5_chunks import Refused

    try:
        return _look(path)
    except Refused as error:
        return f"refused: {_line(error)}; extract it again"
    except MemoryError:
        return _damaged("HDF5 asks for more memory than a store can need")
    except Exception as error:
        return _damaged(_line(error))


def _look(path: Path) -> str:
    import h5py

    from refdet.store.hdf5_structure import check_structure

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"not a readable HDF5 file: {error}") from None
    with file:
        schema = file.attrs.get("schema")
        if not (isinstance(schema, str) and schema.startswith(FAMILY)):
            found = "no schema" if schema is None else f"schema {schema!r:.60}"
            return f"no store of refdet: {found}, not {SCHEMA!r}; is it a file of refdet extract-features?"
        check_structure(file)
    return ""


def _damaged(how: str) -> str:
    return f"damaged: {how}; extract it again"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
