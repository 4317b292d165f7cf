"""Builds lorakern._native from csrc/ against the torch that is installed.

LORAKERN_BUILD: auto (default) builds what it can: without CUDA where that fails, and pure Python
    where a compiler fails too, and says why; cpu and cuda build that or fail with the reason; none
    builds nothing.
LORAKERN_ARCH: instruction set of a portable wheel (x86-64-v3, armv8.2-a, ...); default: this
    machine's. TORCH_CUDA_ARCH_LIST is torch's own switch for CUDA.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import setup
from setuptools.errors import CompileError, LinkError, PlatformError

MODES = ("auto", "cpu", "cuda", "none")


def compile_flags(arch: str | None) -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", "-g0", f"-march={arch}" if arch else native, *openmp]


def loads(library: str) -> bool:
    """Whether this library loads beside torch; asked elsewhere, for here it would stay loaded."""
    load = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    tried = subprocess.run([sys.executable, "-c", load, library], stderr=subprocess.DEVNULL)
    return tried.returncode == 0


def give_up(mode: str, reason: str) -> dict:
    """No extension in mode auto, an error in the others.

    Raises:
        SystemExit: the mode asks for what cannot be built.
    """
    if mode != "auto":
        raise SystemExit(f"LORAKERN_BUILD={mode}: {reason}")
    print(f"WARNING: lorakern is installed without its compiled kernels: {reason}", file=sys.stderr)
    return {}


def extension(mode: str) -> dict:
    """The arguments for setup() that build the extension; none when there is nothing to build.

    Raises:
        SystemExit: the mode is unknown, or it asks for what cannot be built.
    """
    if mode not in MODES:
        raise SystemExit(f"LORAKERN_BUILD: want one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as missing:
        return give_up(mode, f"{missing}; install beside torch with pip --no-build-isolation")
    # where pip puts ninja, which compiles on all cores; it need not be on the PATH
    found = os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join(found)
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    no_cuda = (not torch.version.cuda and f"torch {torch.__version__} has no CUDA") or (
        not cpp_extension.CUDA_HOME and "no nvcc was found; set CUDA_HOME"
    )
    if mode == "cuda" and no_cuda:
        return give_up(mode, no_cuda)
    with_cuda = mode != "cpu" and not no_cuda
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            there = self.get_ext_fullpath(native.name)
            if os.path.exists(there) and not loads(there):
                # compiled for another torch, and so is what it was linked of
                shutil.rmtree(self.build_temp, ignore_errors=True)
                self.force = True
            try:
                super().build_extensions()
            except (CompileError, LinkError, PlatformError, RuntimeError, OSError) as failed:
                if mode == "auto" and any(s.endswith(".cu") for s in native.sources):
                    print(f"WARNING: no CUDA kernels, the build failed: {failed}", file=sys.stderr)
                    # in place: setuptools has written the extension's full name into it
                    vars(native).update(vars(extension("cpu")["ext_modules"][0]))
                    return self.build_extensions()
                self.extensions = []
                give_up(mode, f"the build failed: {failed}")

    native = kind(
        "lorakern._native",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")) + (cuda_sources if with_cuda else []),
        # a source distribution takes these along, and what changed among them is built again
        depends=sorted(glob("csrc/**/*.*", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": compile_flags(os.environ.get("LORAKERN_ARCH")), "nvcc": ["-O3"]},
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extension(os.environ.get("LORAKERN_BUILD", "auto")))
