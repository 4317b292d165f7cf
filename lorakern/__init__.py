"""lorakern: adapters for diffusion models on fused kernels, one float32 accumulator each."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

try:
    __version__ = version("lorakern")
except PackageNotFoundError:
    # run from a source tree that was never installed
    __version__ = "0.0.0"

# the compiled kernels, when they were built; `lorakern why` says whether they were
for _library in sorted(Path(__file__).parent.glob("_native*.so")):
    torch.ops.load_library(_library)

# the ops look for their kernels in _native
from lorakern import functional  # noqa: E402
from lorakern.adapters import eject, inject, merge, set_multiplier, unmerge  # noqa: E402
from lorakern.arena import FlatAdamW  # noqa: E402
from lorakern.conditioning import accelerate  # noqa: E402
from lorakern.formats import load, save  # noqa: E402

__all__ = [
    "FlatAdamW",
    "accelerate",
    "eject",
    "functional",
    "inject",
    "load",
    "merge",
    "save",
    "set_multiplier",
    "unmerge",
]
