"""What a call uses beside time: memory kept for backward, peak memory, operator calls."""

import os
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


def saved_bytes(forward: Callable[[], object], but: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps alive for backward, each storage once, beyond those in `but`."""
    known = {t.untyped_storage().data_ptr() for t in but}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        # holding t keeps its address from being given to another
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Most MiB that torch's allocator handed out during a call, above what was live before it.

    On the CPU from the profiler's record of each allocation, because the resident size of a
    process depends on what ran before.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    # or the profiler writes its own start and end to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0)) / MIB


def aten_calls(call: Callable[[], object], *, idle: bool = True) -> int:
    """Operators that torch's dispatcher ran during a call, backward included, views left out.

    A call of lorakern's C++ is not seen; what it calls in turn is.

    Args:
        idle: also those that only get memory, or see it in another shape.
    """
    with _Count() as count:
        call()
    return count.calls + idle * count.idle


class _Count(TorchDispatchMode):
    calls = idle = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::_unsafe_view", "aten::empty")):
            self.idle += 1
        else:
            self.calls += not func.is_view
        return func(*args, **(kwargs or {}))
