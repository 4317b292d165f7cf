"""lorakern: adapters for diffusion models on fused kernels, one float32 accumulator each."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch  # _native is linked to its libraries

try:
    __version__ = version("lorakern")
except PackageNotFoundError:
    # run from a source tree that was never installed
    __version__ = "0.0.0"

# the compiled kernels, when they were built; `lorakern why` says whether they were
if _spec := find_spec("lorakern._native"):
    try:
        from lorakern import _native  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{_spec.origin} does not load beside torch {torch.__version__}: it was built for"
            " another one, or is damaged. Install lorakern again with --no-build-isolation, or"
            f" delete the file to run on plain torch. ({error})"
        ) from error

# the ops look for their kernels in _native
from lorakern import functional
from lorakern.adapters import eject, inject, merge, set_multiplier, unmerge
from lorakern.arena import FlatAdamW
from lorakern.conditioning import accelerate
from lorakern.formats import load, save
from lorakern.frozen import accelerate_frozen

__all__ = [
    "FlatAdamW",
    "accelerate",
    "accelerate_frozen",
    "eject",
    "functional",
    "inject",
    "load",
    "merge",
    "save",
    "set_multiplier",
    "unmerge",
]
