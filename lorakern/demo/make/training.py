"""What the stages share: a schedule by step, averaged weights, checkpoints, a log line."""

import time
from pathlib import Path

import torch
from torch import nn


def warm_stable_decay(step: int, warm: int, decay_from: int, stop: int) -> float:
    """Factor on the learning rate: linear up, flat, then linear down to 0 between two steps."""
    up = min(1.0, (step + 1) / warm)
    down = (stop - step) / max(1, stop - decay_from)
    return min(up, max(0.0, min(1.0, down)))


class Average:
    """Exponential moving average of a module's floating-point state, with a growing memory."""

    def __init__(self, module: nn.Module, memory: float):
        self.memory, self.count = memory, 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        keep = min(self.memory, (1 + self.count) / (10 + self.count))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - keep)


class Log:
    """Prints the mean loss and the pace every few steps."""

    def __init__(self, name: str, every: int = 50):
        self.name, self.every = name, every
        self.losses, self.start = [], time.perf_counter()

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        if step % self.every == 0:
            pace = len(self.losses) / (time.perf_counter() - self.start)
            mean = sum(self.losses) / len(self.losses)
            print(f"{self.name} {step} loss {mean:.4f} {pace:.2f} steps/s", flush=True)
            self.losses, self.start = [], time.perf_counter()


def save_checkpoint(path: Path, **parts) -> None:
    """Writes atomically, so that a stopped run never leaves half a file."""
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
