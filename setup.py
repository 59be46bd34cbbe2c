"""Builds refdet/_C, the compiled kernels of csrc/, where that is possible; all else stands in setup.cfg.

The package works without it, in plain PyTorch, so whatever is missing (torch, a compiler) is said and the
installation goes on. Environment variables:

    REFDET_REQUIRE_EXT=1    an extension that cannot be built is an error
    REFDET_BUILD_CUDA=1, 0  build the CUDA kernels although no GPU is visible, or never;
                            otherwise they are built where a GPU, a CUDA torch and its nvcc are there
    REFDET_SANITIZE=1       with the address and undefined-behaviour sanitizers, as `make test-asan` does
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# One rounding an operation, as in the plain PyTorch fallback; the rest lets loops become SIMD.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# at::parallel_for is a plain loop without it; torch's own threads are GCC's OpenMP on Linux only.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# What a sanitizer finds ends the program; vptr asks for type information that torch's libraries do not export.
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all"
SANITIZERS = SANITIZE.split() if os.environ.get("REFDET_SANITIZE") == "1" else []
REQUIRED = os.environ.get("REFDET_REQUIRE_EXT") == "1"


def say(text: str) -> None:
    print(f"refdet: {text}", file=sys.stderr, flush=True)


def sources(suffix: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def with_cuda() -> bool:
    """Whether to build the CUDA kernels too."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("REFDET_BUILD_CUDA")
    if wanted == "0" or (wanted != "1" and not torch.cuda.is_available()):
        return False
    reason = ""
    if torch.version.cuda is None:
        reason = "torch is built without CUDA"
    elif CUDA_HOME is None or not (nvcc := Path(CUDA_HOME, "bin", "nvcc")).exists():
        reason = "nvcc was not found"
    else:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        if f"release {torch.version.cuda.split('.')[0]}." not in told:
            reason = f"{nvcc} does not match CUDA {torch.version.cuda}, which torch is built with"
    if reason and wanted == "1":
        sys.exit(f"refdet: REFDET_BUILD_CUDA=1, but {reason}")
    if reason:
        say(f"building without CUDA kernels: {reason}")
    return not reason


def extension() -> dict:
    """The arguments of `setup` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Building that may fail, unless it is required."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # of the compiler, ninja or torch's own checks
                without_extension(error)
                self.extensions = []

    cuda = with_cuda()
    make = CUDAExtension if cuda else CppExtension
    kernels = make(
        "refdet._C",
        sources(".cpp") + (sources(".cu") if cuda else []),
        depends=sources(".h") + sources(".cuh"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("REFDET_CUDA", None)] if cuda else [],
        # at::parallel_for is inline: host code of .cu and .cpp files must agree on it
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP + SANITIZERS, "nvcc": ["-O3", *for_host(OPENMP)]},
        extra_link_args=OPENMP + SANITIZERS,
    )
    say(f"building the kernels of csrc/ for {'CPU and CUDA' if cuda else 'CPU'}")
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}}


def for_host(flags: list[str]) -> list[str]:
    """Flags of the host's compiler as nvcc takes them."""
    return [part for flag in flags for part in ("-Xcompiler", flag)]


def without_extension(error: BaseException) -> None:
    if REQUIRED:
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    say(f"installing without compiled kernels, using the PyTorch fallback: {reason[:300]}")


def find_cuda() -> None:
    """Point torch to CUDA where the nvcc on the PATH is a script that stands outside of CUDA's own folder."""
    usual = "/usr/local/cuda"
    found = shutil.which("nvcc")
    outside = found is not None and not any(Path(found).resolve().parents[1].glob("lib*/libcudart.so"))
    if outside and Path(usual, "bin", "nvcc").exists() and "CUDA_PATH" not in os.environ:
        os.environ.setdefault("CUDA_HOME", usual)


def options() -> dict:
    find_cuda()
    try:
        return extension()
    except Exception as error:  # no torch, or one that does not fit the compiler or the CUDA toolkit
        without_extension(error)
        return {}


setup(**options())
