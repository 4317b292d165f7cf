"""REGISTRY OF METHODS: what `method` in a config can be, one line each."""

from lorakern.config import Config
from lorakern.methods.adapter import WeightAdapter
from lorakern.methods.base import Method
from lorakern.methods.instantid import Identity
from lorakern.methods.ip_adapter import ImagePrompt

METHODS: dict[str, type[Method]] = {
    "adapter": WeightAdapter,
    "ip_adapter": ImagePrompt,
    "instantid": Identity,
}


def make(config: Config) -> Method:
    """The method that config.method names."""
    return METHODS[config.method](config)
