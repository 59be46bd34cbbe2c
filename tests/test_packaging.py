"""The wheel: it contains every module and data file, and works without the source tree and without a compiler."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
# as pip builds a wheel; python -I keeps the current folder off sys.path
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built without a working compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("refdet", "refer", "cli", "csrc"):
        for path in (REPOSITORY / name).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                copy = source / path.relative_to(REPOSITORY)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    environment = {**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent", "REFDET_BUILD_CUDA": "0"}
    environment.pop("REFDET_REQUIRE_EXT", None)
    command = [sys.executable, "-I", "-c", BUILD, folder]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_whole_package(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{installed}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, installed in (("refdet", "refdet"), ("refer", "refer"), ("cli", "refdet/cli"))
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed", ".html", ".js", ".css", ".svg")
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_nvcc_gets_the_openmp_flag_of_the_host_compiler(tmp_path: Path) -> None:
    """`at::parallel_for` is inline: if only some files use OpenMP, the linker keeps one of two definitions."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    script = f"""
import json, runpy, setuptools, torch
torch.version.cuda = "13.0"
setuptools.setup = lambda **options: print(json.dumps(options["ext_modules"][0].extra_compile_args))
runpy.run_path({str(REPOSITORY / "setup.py")!r})
"""
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_PATH": str(tmp_path), "REFDET_BUILD_CUDA": "1",
                   "REFDET_REQUIRE_EXT": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    flags = json.loads(done.stdout.splitlines()[-1])
    wanted = [part for flag in flags["cxx"] if flag == "-fopenmp" for part in ("-Xcompiler", flag)]
    assert flags["nvcc"] == ["-O3", *wanted] and bool(wanted) == sys.platform.startswith("linux")


def test_the_wheel_works_without_the_source_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import refdet.cli.main, refdet.ops._library, refer
for module in (refdet, refer, refdet.cli.main):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
assert refdet.ops._library.DEVICES == frozenset()
sys.argv = ["refdet", "--version"]
refdet.cli.main.main()
"""
    # -S: without the .pth file that makes an editable installation shadow the wheel
    site = Path(pytest.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refdet, version ")
