"""A stand-in for CUDA graphs on the CPU: it captures by recording each call, and replays them all.

As strict as a real one, and more: a value read by the host, a random draw, a size that depends on
values, a tensor made of the host's numbers end a capture; what was captured is not done, and its
results hold NaN until a replay; a replay that reads memory which is freed, and was not the graph's,
is an error. Calls that torch does not see, as inside a C++ function, are not replayed.
"""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from training import assert_same, factors, fit, lines_of

from lorakern import backend, graphed
from lorakern.adapters import layers, shared

REFUSAL = "operation not permitted when stream is capturing"
_REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Outer:
    """A tensor that was there before the capture, in memory that somebody else has to keep."""

    def __init__(self, t: Tensor):
        self.storage = weakref.ref(t.untyped_storage())
        self.like = t.dtype, t.storage_offset(), t.shape, t.stride()

    def tensor(self) -> Tensor:
        storage = self.storage()
        assert storage is not None, f"the graph reads {self.like}, which is freed"
        dtype, *place = self.like
        return torch.empty(0, dtype=dtype).set_(storage, *place)


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _refused(function, args):
            raise RuntimeError(f"{function}: {REFUSAL}")
        self._save(function, args, kwargs)
        state = torch.get_rng_state()
        made = self.run(function, args, kwargs)
        if kwargs.get("generator") or not torch.equal(state, torch.get_rng_state()):
            raise RuntimeError(f"{function}: draws, and {REFUSAL}")
        return made

    def run(self, function, args, kwargs):
        recorded = tree_map_only(Tensor, self._reference, (args, kwargs))
        outer = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))} - self.own.keys()
        made = function(*args, **kwargs)
        for t in _tensors(made):
            storage = t.untyped_storage()
            if storage._cdata not in outer:
                self.own[storage._cdata] = storage
        results = [self._reference(t) for t in _tensors(made)]
        self.calls.append((function, *recorded, results))
        return made

    def end(self) -> None:
        """Undo what was done outside, and spoil what was made."""
        for there, value in self.before.values():
            there.copy_(value)
        for storage in self.own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            made = function(*_live(args), **_live(kwargs))
            for new, old in zip(_tensors(made), _live(results), strict=True):
                if new.untyped_storage()._cdata != old.untyped_storage()._cdata:
                    old.copy_(new)

    def _reference(self, t: Tensor) -> Tensor | Outer:
        return t.detach() if t.untyped_storage()._cdata in self.own else Outer(t)

    def _save(self, function, args, kwargs) -> None:
        arguments = function._schema.arguments
        named = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        written = [named.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        for t in _tensors(written):
            storage = t.untyped_storage()
            if storage._cdata not in self.own | self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage._cdata] = whole, whole.clone()


class OnCpu(graphed.OnCuda):
    """In the place of CUDA in graphed.CAPTURES; `eager` and `replay` are what its clock says."""

    tapes: list[Tape]
    replays, full = 0, False
    eager, replay = 2.0, 1.0

    def __init__(self, device: torch.device):
        # no stream
        return None

    def beside(self):
        return nullcontext()

    def timed(self, function):
        before = self.replays
        made = function()
        return made, self.eager if self.replays == before else self.replay

    def cramped(self):
        return self.full

    def capture(self, function):
        tape = Tape()
        try:
            with tape:
                made = function()
        finally:
            tape.end()
        self.tapes.append(tape)

        def replay():
            type(self).replays += 1
            tape.replay()

        return replay, made


@pytest.fixture(name="graphs")
def graphs_fixture(monkeypatch):
    """Runs on the CPU capture; each op is one call, which torch sees. Gives what captures."""
    kind = type("OnCpu", (OnCpu,), {"tapes": []})
    monkeypatch.setitem(graphed.CAPTURES, "cpu", kind)
    honest_call, honest_recorded = backend.Op.__call__, layers.recorded

    def call(self, *args):
        if not recording():
            return honest_call(self, *args)
        with _pop_mode_temporarily() as tape:
            return tape.run(lambda *given: honest_call(self, *given), args, {})

    monkeypatch.setattr(backend.Op, "__call__", call)
    monkeypatch.setattr(layers, "recorded", lambda t: recording() or honest_recorded(t))
    # one C++ function for both directions, of which torch sees nothing
    monkeypatch.setattr(backend, "whole", lambda *_: None)
    monkeypatch.setattr(shared, "native", lambda x: None)
    # what was picked before, and then in here, is forgotten
    backend._forget_picks()
    yield kind
    backend._forget_picks()


def notes(chosen) -> list[dict]:
    """What a run's log says of its graphs."""
    return [line for line in lines_of(chosen.output / "log.jsonl") if line.get("event") == "graph"]


def assert_equal_to_eager(make, graphs, **changes) -> list[dict]:
    """Losses and weights of eager steps and of graphs are the same to the bit; gives the notes."""
    one, other = (make(name, graphs=name, **changes) for name in ("off", "on"))
    assert fit(one).losses == fit(other).losses and not notes(one)
    assert_same(factors(one.output), factors(other.output))
    found = notes(other)
    assert len(graphs.tapes) == len(found) > 0 and all(note["captured"] for note in found), found
    assert graphs.replays > 0
    return found


def _refused(function, args) -> bool:
    if function is torch.ops.aten.index.Tensor:
        # by numbers the size is known, by a mask it is not
        return any(t is not None and t.dtype == torch.bool for t in args[1])
    return function is torch.ops.aten.lift_fresh.default or bool(_REFUSED & set(function.tags))


def recording() -> bool:
    return isinstance(_get_current_dispatch_mode(), Tape)


def _live(tree):
    # tree_map_only takes half the time of a replay
    if isinstance(tree, dict):
        return {name: _live(part) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_live(part) for part in tree])
    return tree.tensor() if isinstance(tree, Outer) else tree


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
