"""REGISTRY OF METHODS: what `method` in a config can be, one line each."""

from lorakern.config import Config
from lorakern.methods.adapter import WeightAdapter
from lorakern.methods.base import Method

METHODS: dict[str, type[Method]] = {
    "adapter": WeightAdapter,
}


def make(config: Config) -> Method:
    """The method that config.method names."""
    return METHODS[config.method](config)
