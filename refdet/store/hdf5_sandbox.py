"""Check an HDF5 file in a separate process before opening it.

Damaged files can make HDF5 crash, loop forever or use all memory. Only a separate process protects from that.
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

from refdet.store.schema import SCHEMA, SCHEMA_PREFIX

log = logging.getLogger(__name__)

MEMORY_LIMIT = 3 * 2**29  # 1.5 GiB of address space; Python with h5py uses a tenth of it, and a store adds little
CPU_SECONDS = 2.5  # limit of CPU time for an empty file
CPU_SECONDS_PER_GB = 200.0  # added per GB of the file, whose chunks are decompressed (lzf in Python)
WALL_TIME_FACTOR = 6  # limit of wall time / limit of CPU time, as the disk may be slow
_NOTE_AFTER = 3.0  # seconds until a note says that the check is running

_STARTED = b"started\n"  # printed by the child once its imports have succeeded
_KILLED_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
# The current folder may be untrusted, so python -I removes it and PYTHON* variables from the import path.
_CHILD_CODE = """
import sys
packages = ("site-packages", "dist-packages")
before_packages = next((i for i, path in enumerate(sys.path) if path.endswith(packages)), len(sys.path))
sys.path[before_packages:before_packages] = sys.argv[4:]
from refdet.store.hdf5_sandbox import main
main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
"""


def check_in_subprocess(path: Path) -> str:
    """Check a file in a separate process, or in this one with a warning if none can be started.

    Args:
        path: the file.

    Returns:
        The problem as the end of an error message, "" if HDF5 can read the file and it is a store.
    """
    seconds = CPU_SECONDS + CPU_SECONDS_PER_GB * path.stat().st_size / 1e9
    try:
        child = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-c",
                _CHILD_CODE,
                os.path.abspath(path),
                str(MEMORY_LIMIT),
                str(seconds),
                *_import_paths(),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd=os.sep,
        )
    except OSError as error:
        return _check_without_sandbox(path, str(error))
    with child:
        try:
            output = _wait(child, path, WALL_TIME_FACTOR * seconds)
        except subprocess.TimeoutExpired:
            return _damage_message(f"HDF5 does not finish within {WALL_TIME_FACTOR * seconds:.3g} seconds")
        finally:
            child.kill()  # no effect if it has ended
    if not output.startswith(_STARTED):  # failed before looking at the file
        return _check_without_sandbox(path, f"exit code {child.returncode}")
    return _interpret_output(output, child.returncode, seconds)


def _wait(child: subprocess.Popen[bytes], path: Path, seconds: float) -> bytes:
    """Wait for the check of ``path`` and return its output; logs a note if it takes long.

    Raises:
        subprocess.TimeoutExpired: it takes more than ``seconds``, not counting those before the note.
    """
    try:
        return child.communicate(timeout=_NOTE_AFTER)[0]
    except subprocess.TimeoutExpired:
        log.warning("note: checking %s for damage, once", path)
    return child.communicate(timeout=seconds)[0]


def _interpret_output(output: bytes, code: int, seconds: float) -> str:
    """Interpret the result of the process that `check_in_subprocess` has started.

    Args:
        output: standard output of the process.
        code: exit code of the process, negative for a signal.
        seconds: limit of CPU time of the process, for the message.

    Returns:
        The problem as the end of an error message, "" if there is none.
    """
    with suppress(ValueError):
        return str(json.loads(output.removeprefix(_STARTED))["problem"])
    if code >= 0:
        return _damage_message(f"HDF5 exits with {code}")
    name = signal.Signals(-code).name
    if name == "SIGXCPU":
        return _damage_message(f"HDF5 does not finish within {seconds:.3g} seconds of CPU time")
    if name in _KILLED_FROM_OUTSIDE:
        return f"not checked: the process that checks it was killed ({name}); free some memory and try again"
    return _damage_message(f"HDF5 crashes ({name})")


def _check_without_sandbox(path: Path, reason: str) -> str:
    """Check a file in this process, with a note; ``reason`` says why there is no separate one."""
    log.warning("note: %s: checked without a separate process (%s)", path, reason)
    return check_in_process(path)


def _import_paths() -> list[str]:
    """Folders from which the process imports refdet, h5py and numpy."""
    import h5py
    import numpy

    own = Path(__file__).resolve().parents[2]
    others = (Path(module.__file__).resolve().parents[1] for module in (h5py, numpy) if module.__file__)
    return list(dict.fromkeys(map(str, (own, *others))))


def _environment() -> dict[str, str]:
    """Environment of this process, but with a single thread and without HDF5 plugins, which are code in other files."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HDF5_PLUGIN")}
    return variables | {"HDF5_PLUGIN_PRELOAD": "::", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(path: str, memory: int, seconds: float) -> None:
    """Entry point of the process: print "started", then the problem as JSON.

    Args:
        path: the file to check.
        memory: limit of the address space in bytes.
        seconds: limit of CPU time.
    """
    import refdet.store.hdf5_structure  # noqa: F401  # before "started", as errors in it are not the file's fault

    with suppress(ImportError):  # not on Windows
        import resource

        cpu_limit = math.ceil(time.process_time() + seconds)
        limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: cpu_limit, resource.RLIMIT_CORE: 0}
        for resource_id, limit in limits.items():
            _, hard = resource.getrlimit(resource_id)
            resource.setrlimit(resource_id, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    print(_STARTED.decode(), end="", flush=True)
    print(json.dumps({"problem": check_in_process(Path(path))}), flush=True)


def check_in_process(path: Path) -> str:
    """Check a file in this process; returns the problem as `check_in_subprocess` does."""
    from refdet.store.hdf5_chunks import StructureError

    try:
        return _check(path)
    except StructureError as error:
        return f"refused: {_one_line(error)}; extract it again"
    except MemoryError:
        return _damage_message("HDF5 needs more memory than any store")
    except Exception as error:
        return _damage_message(_one_line(error))


def _check(path: Path) -> str:
    """As `check_in_process`, but raises an exception for a damaged file."""
    import h5py

    from refdet.store.hdf5_structure import check_structure

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"not a readable HDF5 file: {error}") from None
    with file:
        schema = file.attrs.get("schema")
        if not (isinstance(schema, str) and schema.startswith(SCHEMA_PREFIX)):
            actual = "no schema" if schema is None else f"schema {schema!r:.60}"
            return (
                f"not a feature store: {actual} instead of {SCHEMA!r}; give a file written by refdet extract-features"
            )
        check_structure(file)
    return ""


def _damage_message(problem: str) -> str:
    return f"damaged: {problem}; extract it again"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
