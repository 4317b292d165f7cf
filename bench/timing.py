"""Times several callables side by side, so that a noisy machine is noisy to all of them alike.

Each round calls every arm once, in a random order; costs are ratios within a round.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# a sample is no shorter than this
SAMPLE_S = 300e-6


@dataclass(frozen=True)
class Times:
    """Seconds per call of one arm, one number a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles; 0 for one round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def over(self, base: "Times") -> float:
        """Median over the rounds of this arm's time over the base's in the same round."""
        pairs = zip(self.seconds, base.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def interleave(
    arms: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every arm once a round, in a random order, with the garbage collector off.

    Short calls are repeated within a sample, all arms equally often, until a sample of the
    fastest is long enough for the clock.

    Args:
        arms: what to call, by name. A call leaves nothing behind that slows the next one.
        device: on "cuda" the clock is a pair of events around a call on an idle device whose L2
            cache was flushed, so that launches count as they do where the CPU is the slower one.
        seconds: time to spend; at least 3 rounds are run, at most 300.
        rounds: number of rounds instead.
        clock: seconds on the CPU; time.thread_time on one thread leaves out what other processes
            took.
    """
    sample = _sample_cuda(device) if device.type == "cuda" else _sample_cpu(clock)
    once = {name: _warm_up(sample, call) for name, call in arms.items()}
    repeats = 1
    if device.type == "cpu":
        repeats = max(1, math.ceil(SAMPLE_S / min(once.values())))
    if rounds is None:
        rounds = min(300, max(3, int(seconds / (repeats * sum(once.values())))))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    order, shuffle = list(arms), random.Random(0).shuffle
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                taken[name].append(sample(arms[name], repeats))
    finally:
        if was_on:
            gc.enable()
    return {name: Times(seconds) for name, seconds in taken.items()}


def _warm_up(sample: Callable[[Callable, int], float], call: Callable) -> float:
    # the first call may compile, so how long it took says nothing
    sample(call, 1)
    return sample(call, 1)


def _sample_cpu(clock: Callable[[], float]) -> Callable[[Callable, int], float]:
    def sample(call: Callable, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return sample


def _sample_cuda(device: torch.device) -> Callable[[Callable, int], float]:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(size, 1), dtype=torch.int8, device=device)
    stream = torch.cuda.current_stream(device)

    def sample(call: Callable, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total_ms = 0.0
        for _ in range(repeats):
            flushed.zero_()
            # or the flush would hide as many launches as fit in its own time
            stream.synchronize()
            start.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            total_ms += start.elapsed_time(end)
        return total_ms / repeats / 1e3

    return sample
