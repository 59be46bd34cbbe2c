"""Downloads wheels of refdet's requirements for a GPU machine without a network: `make gpu-pack`.

    python benchmarks/gpu/pack.py [--python 3.12] [--out build/gpu-pack]

Copy the folder to the machine together with the repository. `check.py` installs the wheels of unmet requirements into
build/gpu-site. Large packages that a GPU machine has anyway (`ASSUMED`, such as torch) are not downloaded.
"""

from __future__ import annotations

import argparse
import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-pack"
ASSUMED = {"torch", "torchvision", "numpy", "pandas", "tensorboard"}
TESTS = ("lmdb",)  # extras that GPU tests import
MAX_BYTES = 64 << 20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def requirements() -> list[str]:
    """The requirements in setup.cfg to download."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"].split("\n") + list(TESTS)
    return [line.strip() for line in needed if line.strip() and name_of(line) not in ASSUMED]


def name_of(requirement: str) -> str:
    """The distribution's name in a requirement such as "click>=8.2"."""
    found = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
    return found[1].lower().replace("_", "-") if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--out", type=Path, default=FOLDER, help="its previous wheels are removed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for previous in options.out.glob("*.whl"):
        previous.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.out)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *requirements()])
    if done.returncode:
        sys.exit("error: pip could not download the wheels; see above")
    wheels = sorted(options.out.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    for path in wheels:
        print(f"  {path.stat().st_size / 2**20:6.1f} MiB  {path.name}")
    print(f"{len(wheels)} wheels, {size / 2**20:.1f} MiB, in {options.out}")
    if size > MAX_BYTES:
        sys.exit(f"error: more than {MAX_BYTES >> 20} MiB; add what the machine has to ASSUMED in {__file__}")


if __name__ == "__main__":
    main()
