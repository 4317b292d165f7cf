"""Registry of weight adapters: one import a line; and what is done with them in a model."""

from lorakern.adapters import dora_lora, loha, lokr, lora  # noqa: F401  an import enters it in ALGOS
from lorakern.adapters.base import ALGOS, Adapter, register
from lorakern.adapters.groups import limit_norms, parameter_groups
from lorakern.adapters.model import (
    attach,
    eject,
    find,
    inject,
    merge,
    options_of,
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
    "limit_norms",
    "merge",
    "options_of",
    "parameter_groups",
    "register",
    "set_multiplier",
    "unmerge",
]
