"""What the groups of siblings did."""

import pytest

from lorakern.adapters import shared


@pytest.fixture
def fired(monkeypatch):
    """The number of layers of each call that a group made; the cost rule lets every one through."""
    counts, real = [], shared.native

    def spy(x):
        run = real(x)
        return run and (
            lambda x, weights, *rest: counts.append(len(weights)) or run(x, weights, *rest)
        )

    monkeypatch.setattr(shared, "native", spy)
    monkeypatch.setattr(shared, "wins", lambda x, members: True)
    return counts
