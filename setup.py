"""Builds refdet/_C, the compiled kernels of csrc/, where possible; everything else is in setup.cfg.

The package also works without it, in plain PyTorch, so if torch or a compiler is missing, that is reported and the
installation continues. Environment variables:

    REFDET_REQUIRE_EXT=1    fail if the extension cannot be built
    REFDET_BUILD_CUDA=1, 0  always or never build the CUDA kernels; by default they are built if a GPU is visible,
                            and torch has CUDA and its nvcc is found
    REFDET_SANITIZE=1       build with the address and undefined-behavior sanitizers, as `make test-asan` does
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Each operation is rounded separately, as in the plain PyTorch fallback; the other flags let loops vectorize.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Without it at::parallel_for is a plain loop; torch's threads are GCC's OpenMP on Linux only.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# Abort at the first finding; vptr needs type information that torch's libraries do not export.
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all"
SANITIZERS = SANITIZE.split() if os.environ.get("REFDET_SANITIZE") == "1" else []
REQUIRED = os.environ.get("REFDET_REQUIRE_EXT") == "1"


def log(text: str) -> None:
    print(f"refdet: {text}", file=sys.stderr, flush=True)


def sources(suffix: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def build_cuda() -> bool:
    """Whether to build the CUDA kernels too."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    setting = os.environ.get("REFDET_BUILD_CUDA")
    if setting == "0" or (setting != "1" and not torch.cuda.is_available()):
        return False
    reason = ""
    if torch.version.cuda is None:
        reason = "torch is built without CUDA"
    elif CUDA_HOME is None or not (nvcc := Path(CUDA_HOME, "bin", "nvcc")).exists():
        reason = "nvcc was not found"
    else:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        if f"release {torch.version.cuda.split('.')[0]}." not in version:
            reason = f"{nvcc} does not match CUDA {torch.version.cuda}, which torch is built with"
    if reason and setting == "1":
        sys.exit(f"refdet: REFDET_BUILD_CUDA=1, but {reason}")
    if reason:
        log(f"building without CUDA kernels: {reason}")
    return not reason


def extension() -> dict:
    """Arguments of `setup` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """A build that may fail unless REFDET_REQUIRE_EXT is set."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # from the compiler, ninja or torch's own checks
                without_extension(error)
                self.extensions = []

    cuda = build_cuda()
    extension_class = CUDAExtension if cuda else CppExtension
    kernels = extension_class(
        "refdet._C",
        sources(".cpp") + (sources(".cu") if cuda else []),
        depends=sources(".h") + sources(".cuh"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("REFDET_CUDA", None)] if cuda else [],
        # at::parallel_for is inline: host code of .cu and .cpp files must use the same flags
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP + SANITIZERS, "nvcc": ["-O3", *host_flags(OPENMP)]},
        extra_link_args=OPENMP + SANITIZERS,
    )
    log(f"building the kernels of csrc/ for {'CPU and CUDA' if cuda else 'CPU'}")
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}}


def host_flags(flags: list[str]) -> list[str]:
    """Flags that nvcc passes on to the host compiler."""
    return [arg for flag in flags for arg in ("-Xcompiler", flag)]


def without_extension(error: BaseException) -> None:
    if REQUIRED:
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    log(f"installing without compiled kernels, using the PyTorch fallback: {reason[:300]}")


def find_cuda() -> None:
    """Point torch at CUDA if the nvcc on the PATH is a wrapper script outside of the CUDA folder."""
    default = "/usr/local/cuda"
    nvcc = shutil.which("nvcc")
    outside = nvcc is not None and not any(Path(nvcc).resolve().parents[1].glob("lib*/libcudart.so"))
    if outside and Path(default, "bin", "nvcc").exists() and "CUDA_PATH" not in os.environ:
        os.environ.setdefault("CUDA_HOME", default)


def setup_args() -> dict:
    find_cuda()
    try:
        return extension()
    except Exception as error:  # torch is missing, or incompatible with the compiler or the CUDA toolkit
        without_extension(error)
        return {}


setup(**setup_args())
