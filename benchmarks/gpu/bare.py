"""Makes a checkout usable where refdet is not installed, without changing that Python.

refdet.cli lies in cli/ until it is installed, and some requirements may be missing. `prepare` fills build/gpu-site with
the missing ones, from the wheels of `pack.py`, and with a ``sitecustomize.py`` that finds refdet.cli; `environment` has
it on the PYTHONPATH, so that every process of the check starts with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pack

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu-site"
FINDER = f"""import importlib.util
import sys


class Cli:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "refdet.cli":
            return importlib.util.spec_from_file_location(
                name, {str(ROOT / "cli" / "__init__.py")!r}, submodule_search_locations=[{str(ROOT / "cli")!r}]
            )


sys.meta_path.append(Cli)
"""


def prepare() -> None:
    """Fill the folder. Exits with a message if a requirement is neither there nor among the wheels."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    (SITE / "sitecustomize.py").write_text(FINDER)
    needed = [line for line in pack.requirements() if not met(line)]
    if not needed:
        return
    print(f"installing {', '.join(needed)} from {pack.FOLDER} into {SITE}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--find-links", str(pack.FOLDER), "--target", str(SITE), *needed]
    if subprocess.run(command).returncode:
        sys.exit(f"error: {', '.join(needed)}: not installed here, and not in {pack.FOLDER}; make gpu-pack fills it")


def met(requirement: str) -> bool:
    """Whether an installed distribution meets a requirement such as "click>=8.2"."""
    try:
        found = metadata.version(pack.name_of(requirement))
    except metadata.PackageNotFoundError:
        return False
    least = requirement.partition(">=")[2].strip()
    return not least or _numbers(found) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".") if part.isdecimal()]


def environment() -> dict[str, str]:
    """The environment of processes that import refdet, the other benchmarks and the tests' helpers."""
    paths = [SITE, ROOT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    programs = [Path(sys.executable).parent, os.environ.get("PATH", "")]  # torch's builder looks for ninja there
    return {**os.environ, "PYTHONPATH": _joined(paths), "PATH": _joined(programs)}


def _joined(paths: Sequence[str | Path]) -> str:
    return os.pathsep.join(str(path) for path in paths if path)
