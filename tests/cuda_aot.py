"""Runs and compiles CUDA kernels where there is no GPU.

`host_library` compiles every csrc/cuda/*.cu, launchers and kernels, as plain C++ against the host
in tests/cuda_host; `check_on_host` puts a launcher that it registered before the judge. `usages`
has nvcc compile a .cuh for real chips and reads what ptxas says of it.
"""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.testing import check_every_kernel

ROOT = Path(__file__).parents[1]
HOST = ROOT / "tests/cuda_host"
CHIPS = (80, 90, 100)
# a launcher aims at few blocks, so that a small input takes all of a kernel's loops
BLOCKS = 4
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-Wno-unknown-pragmas")
# as dynamic_shared needs no initializer
_TLS = "-fno-extern-tls-init"


@dataclass(frozen=True)
class Usage:
    """Registers of a thread; stack and spilled bytes."""

    kernel: str
    registers: int
    stack: int
    spilled: int


def host_compile(source: Path, library: Path, *flags: str) -> ctypes.CDLL:
    """A C++ source compiled against the host, loaded."""
    command = ["g++", *_FLAGS, _TLS, f"-I{HOST}", f"-I{ROOT / 'csrc'}", str(source), *flags]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def host_library(folder: Path) -> ctypes.CDLL:
    """The launchers on the host, registered as torch.ops.lorakern_host.<launcher>.

    Compiled where the folder does not have them.
    """
    library = folder / "launchers.so"
    if library.exists():
        return ctypes.CDLL(str(library))
    launchers = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    source = folder / "launchers.cpp"
    # one file, so that torch's headers are read once
    source.write_text("".join(f'#include "cuda/{p.name}"\n' for p in launchers))
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    torch_library = Path(torch.__file__).parent / "lib"
    return host_compile(
        source,
        library,
        "-Dlorakern_native=lorakern_host",
        f"-DLORAKERN_BLOCKS={BLOCKS}",
        *headers,
        f"-L{torch_library}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    )


def check_on_host(library: ctypes.CDLL, op: str, args: tuple, launcher: str | None = None) -> None:
    """The launcher <op>_cuda is as exact as torch, and needs no order of its threads."""
    function = getattr(torch.ops.lorakern_host, launcher or f"{op}_cuda").default
    results = []
    for backwards in (False, True):
        library.cuda_host_order(ctypes.c_bool(backwards))
        results.append(_tuple(function(*args)))
    library.cuda_host_order(ctypes.c_bool(False))
    for i, (forth, back) in enumerate(zip(*results, strict=True)):
        assert torch.equal(forth, back), f"{op}: result {i} depends on the order of threads"
    found = backend.OPS[op]
    kernels, found.kernels = found.kernels, {"host": Kernel("")}
    found._loaded["host"] = function
    try:
        check_every_kernel(op, args)
    finally:
        found.kernels = kernels
        del found._loaded["host"]


def nvcc() -> str | None:
    """Path of nvcc, if there is one."""
    return shutil.which("nvcc")


def usages(header: str, kernels: list[str], folder: Path) -> dict[int, list[Usage]]:
    """chip -> what each kernel takes there.

    Args:
        header: a file of csrc/cuda.
        kernels: instantiations, "hada_delta_fwd_kernel<float, float>"; half and bfloat16 are
            __half and __nv_bfloat16.
    """
    source = _source(header, kernels, folder)
    chips = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in CHIPS]
    command = [nvcc(), "-std=c++20", "-O3", "-Xptxas", "-v", "--threads", "0", *chips]
    command += [f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(folder / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {chip: [] for chip in CHIPS}
    for entry in done.stderr.split("Compiling entry function ")[1:]:
        name, chip = re.match(r"'(\S+)' for 'sm_(\d+)a?'", entry).groups()
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        found[int(chip)].append(Usage(name, registers, stack, stores + loads))
    return found


def ptx(header: str, kernel: str, folder: Path, chip: int) -> str:
    """The PTX of a kernel for a chip; arguments as for `usages`."""
    source = _source(header, [kernel], folder)
    made = folder / "kernels.ptx"
    command = [nvcc(), "-std=c++20", "-O3", f"-arch=compute_{chip}", f"-I{ROOT / 'csrc'}", "-ptx"]
    done = subprocess.run([*command, source, "-o", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = made.read_text().split(".entry ")[1:]
    (found,) = (e for e in entries if kernel.partition("<")[0] in e.partition("(")[0])
    return found


def _source(header: str, kernels: list[str], folder: Path) -> Path:
    source = folder / "kernels.cu"
    table = ", ".join(f"(void*)lorakern::{kernel}" for kernel in kernels)
    source.write_text(
        f'#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include "cuda/{header}"\n'
        f"void* kernels[] = {{{table}}};\n"
    )
    return source


def _tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)
