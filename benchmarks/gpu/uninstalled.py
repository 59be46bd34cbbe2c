"""Runs a checkout without installing refdet, and without changing the Python installation.

Without an installation, refdet.cli is in cli/, and some requirements may be missing. `prepare` fills build/gpu-site
with the missing requirements, from the wheels of `pack.py`, and with a ``sitecustomize.py`` that finds refdet.cli;
`environment` puts this folder on the PYTHONPATH of all processes of the check.
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
    """Fill build/gpu-site. Exits with a message if a requirement is neither installed nor among the wheels."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    (SITE / "sitecustomize.py").write_text(FINDER)
    missing = [line for line in pack.requirements() if not is_met(line)]
    if not missing:
        return
    print(f"installing {', '.join(missing)} from {pack.FOLDER} into {SITE}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--find-links", str(pack.FOLDER), "--target", str(SITE), *missing]
    if subprocess.run(command).returncode:
        sys.exit(f"error: {', '.join(missing)}: not installed here, and not in {pack.FOLDER}; make gpu-pack fills it")


def is_met(requirement: str) -> bool:
    """Whether an installed distribution meets a requirement such as "click>=8.2"."""
    try:
        installed = metadata.version(pack.name_of(requirement))
    except metadata.PackageNotFoundError:
        return False
    minimum = requirement.partition(">=")[2].strip()
    return not minimum or _numbers(installed) >= _numbers(minimum)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".") if part.isdecimal()]


def environment() -> dict[str, str]:
    """The environment of processes that import refdet, the other benchmarks and the tests' helpers."""
    paths = [SITE, ROOT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    programs = [Path(sys.executable).parent, os.environ.get("PATH", "")]  # torch's builder looks for ninja there
    return {**os.environ, "PYTHONPATH": _join_paths(paths), "PATH": _join_paths(programs)}


def _join_paths(paths: Sequence[str | Path]) -> str:
    return os.pathsep.join(str(path) for path in paths if path)
