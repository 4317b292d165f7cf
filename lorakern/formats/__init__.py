"""Registry of file formats: one import a line; save, load, inspect and convert adapter files."""

from lorakern.formats import (
    diffusers,  # noqa: F401  an import enters it in FORMATS
    kohya,  # noqa: F401
    peft,  # noqa: F401
)
from lorakern.formats.base import FORMATS, UnmatchedKeys
from lorakern.formats.convert import convert
from lorakern.formats.files import Summary, detect, inspect
from lorakern.formats.model import check, load, save

__all__ = [
    "FORMATS",
    "Summary",
    "UnmatchedKeys",
    "check",
    "convert",
    "detect",
    "inspect",
    "load",
    "save",
]
