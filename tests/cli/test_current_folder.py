"""`python -m refdet` in a folder of files from elsewhere: no module in it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import refdet

PACKAGES = ("click", "h5py", "numpy", "PIL", "pycocotools", "safetensors", "torch", "torchvision", "tqdm", "yaml")
ROOT = Path(refdet.__path__[0]).parent


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_no_module_of_the_current_folder_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "list_modules.py").write_text("import sys; print(*sys.modules)")
    imported_by_python = set(run("-m", "list_modules", folder=tmp_path / "empty").stdout.split())
    assert {"sys", "runpy"} <= imported_by_python  # before any code of refdet runs
    names = {*sys.stdlib_module_names, *PACKAGES} - imported_by_python
    assert {"typing", "numpy"} <= names
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py from the current folder')")
    done = run("-m", "refdet", "recipes", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
