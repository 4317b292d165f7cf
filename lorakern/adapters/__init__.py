"""Registry of weight adapters: one import a line; and what is done with them in a model."""

from lorakern.adapters import loha, lokr, lora  # noqa: F401  an import enters it in ALGOS
from lorakern.adapters.base import ALGOS, Adapter, register
from lorakern.adapters.model import (
    attach,
    eject,
    find,
    inject,
    merge,
    set_multiplier,
    unmerge,
)

__all__ = [
    "ALGOS",
    "Adapter",
    "attach",
    "eject",
    "find",
    "inject",
    "merge",
    "register",
    "set_multiplier",
    "unmerge",
]
