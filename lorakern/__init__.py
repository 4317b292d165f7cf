"""lorakern: adapters for diffusion models on fused kernels, one float32 accumulator each."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch  # noqa: F401  _native is linked to its libraries

try:
    __version__ = version("lorakern")
except PackageNotFoundError:
    # run from a source tree that was never installed
    __version__ = "0.0.0"

# the compiled kernels, when they were built; `lorakern why` says whether they were
if find_spec("lorakern._native"):
    from lorakern import _native  # noqa: F401

# the ops look for their kernels in _native
from lorakern import functional
from lorakern.adapters import eject, inject, merge, set_multiplier, unmerge
from lorakern.arena import FlatAdamW
from lorakern.conditioning import accelerate
from lorakern.formats import load, save

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
