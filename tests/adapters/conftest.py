"""What the groups of siblings did."""

import pytest

from lorakern.adapters import shared


@pytest.fixture
def fired(monkeypatch):
    """The number of layers of each call that a group made."""
    counts, real = [], shared.lora_linear_shared

    def spy(x, weights, *rest):
        counts.append(len(weights))
        return real(x, weights, *rest)

    monkeypatch.setattr(shared, "lora_linear_shared", spy)
    return counts
