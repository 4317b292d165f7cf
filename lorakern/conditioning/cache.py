"""What stays the same from one denoising step to the next, computed once.

A value is found again by everything it was made of: the very tensor objects, their versions and
their memory, and all state of the modules. A scale that is applied afterwards is not part of it.
What is written through `tensor.data`, which PyTorch does not count, is not seen; `clear` is for it.
"""

from collections.abc import Callable, Hashable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorakern.adapters import layers

_OWN = frozenset(vars(nn.Module()))
_HOOKS = tuple(sorted(name for name in _OWN if name.startswith("_forward")))
_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Frames(Tensor):
    """A tensor that repeats itself for the frames of a video once, not at every step."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def repeat_interleave(self, repeats, dim=None, *, output_size=None) -> Tensor:
        """As Tensor's; the same object while this tensor is not written to."""
        key = repeats, dim, self._version
        made = self.__dict__.get("made")
        if made is None or made[0] != key or torch.is_grad_enabled():
            made = key, super().repeat_interleave(repeats, dim, output_size=output_size)
            self.made = made
        return made[1]


class Cache:
    """The last values by what they were made of.

    Used only where no gradient is wanted: a call with gradients enabled forgets all, so that no
    training step, however it writes the weights, comes between a value and its use.

    Args:
        size: number of values; 2 is for prompts and negative prompts that are run apart.
    """

    def __init__(self, size: int = 2):
        self.size, self.on = size, True
        self._entries: list[tuple[tuple, Any, Any, list]] = []

    def __getstate__(self) -> dict:
        # a copy's tensors are other tensors
        return self.__dict__ | {"_entries": []}

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all values, and let go of what they were made of."""
        self._entries = []

    def get(
        self,
        make: Callable[[], Any],
        tensors: Sequence[Tensor],
        modules: Sequence[nn.Module] = (),
        *others: Hashable,
    ) -> Any:
        """make(), or what it gave when all of this was the same.

        Args:
            make: a function of nothing but the tensors, the modules and the others.
            tensors: kept alive, so that none takes the place of another.
            modules: with their submodules; one that trains, or has hooks or a forward of its own,
                is not cached.
            others: compared by value.
        """
        if not self.on or layers.recorded(tensors[0]):
            return make()
        if torch.is_grad_enabled():
            self.clear()
            return make()
        seen = _Seen()
        if not (all(map(seen.add, tensors)) and all(map(seen.add, modules))):
            return make()
        key = (*others, _autocast(tensors), *seen.key)
        for known, _, value, versions in self._entries:
            # whoever was given a value may have written to it
            if known == key and _versions(value) == versions:
                return value
        value = make()
        entry = key, seen.keep(), value, _versions(value)
        self._entries = [entry, *(e for e in self._entries if e[0] != key)][: self.size]
        return value


class _Seen:
    """The state of tensors and modules as a key, and the objects whose ids are in it."""

    def __init__(self):
        self.key: list = []
        self.tensors: list[Tensor] = []
        self.objects: list = []
        self.visited: set[int] = set()

    def keep(self) -> tuple:
        # a weak reference: the address of freed memory is not given to another storage
        storages = [StorageWeakRef(t.untyped_storage()) for t in self.tensors]
        return self.tensors, self.objects, storages

    def add(self, thing) -> bool:
        """Put it in the key; False for what cannot be told to be the same later."""
        kind = type(thing)
        if kind in _SIMPLE:
            self.key.append(thing)
            return True
        if kind in (Tensor, nn.Parameter, Frames, nn.Buffer):
            return self._tensor(thing)
        if isinstance(thing, (type, BuiltinFunctionType)) or (
            isinstance(thing, FunctionType) and thing.__closure__ is None
        ):
            self.key.append(thing)
            return True
        self.key += (id(thing), kind)
        if id(thing) in self.visited:
            return True
        self.visited.add(id(thing))
        self.objects.append(thing)
        if isinstance(thing, nn.Module):
            return self._module(thing)
        if isinstance(thing, dict):
            self.key.append(len(thing))
            return all(self.add(k) and self.add(v) for k, v in thing.items())
        if isinstance(thing, (list, tuple, set, frozenset)):
            self.key.append(len(thing))
            return all(map(self.add, thing))
        if isinstance(thing, (Tensor, FunctionType)) or not hasattr(thing, "__dict__"):
            return False
        return self.add(vars(thing))

    def _tensor(self, t: Tensor) -> bool:
        if t.is_inference() or t.layout is not torch.strided:
            return False
        storage = t.untyped_storage()._cdata
        self.tensors.append(t)
        self.key += (id(t), t._version, storage, t.data_ptr(), t.dtype, t.shape, t.stride())
        return True

    def _module(self, m: nn.Module) -> bool:
        own = vars(m)
        if m.training or "forward" in own or any(own[hooks] for hooks in _HOOKS):
            return False
        for name in ("_parameters", "_buffers", "_modules"):
            for child in own[name].values():
                if not self.add(child):
                    return False
        if type(m) is nn.Linear:
            # its sizes are its weight's
            return True
        rest = ((name, value) for name, value in own.items() if name not in _OWN)
        return all(self.add(name) and self.add(value) for name, value in rest)


def _versions(value) -> list[int]:
    tensors = value if isinstance(value, tuple) else (value,)
    return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]


def _autocast(tensors: Sequence[Tensor]) -> torch.dtype | None:
    if not torch._C._is_any_autocast_enabled():
        return None
    device = tensors[0].device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
