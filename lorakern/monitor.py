"""What a run tells of itself, and how it is told to end."""

import json
import resource
import signal
import sys
import threading
from collections.abc import Collection
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lorakern.data import Bad
from lorakern.formats import storage

if TYPE_CHECKING:
    from lorakern.train import Progress, Result


class Log:
    """output/log.jsonl, one JSON object a line, and TensorBoard in output/tensorboard if installed.

    A resumed run appends; where a step is there twice, the later line counts.
    """

    def __init__(self, output: Path, about: dict[str, Any]):
        output.mkdir(parents=True, exist_ok=True)
        self._file = open(output / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = _tensorboard(output / "tensorboard")
        self._write({"event": "start", **about})

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._write({"event": "error", "error": f"{kind.__name__}: {error}"})
        self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, step: "Progress", images: list[str] | None) -> None:
        """One step; `images` are its files when it was skipped."""
        line = {
            "step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr,
            "seconds": round(step.seconds, 6),
        }  # fmt: skip
        self._write(line if images is None else {**line, "skipped": True, "images": images})
        if self._board is not None:
            for name in ("loss", "grad_norm", "lr"):
                self._board.add_scalar(name, getattr(step, name), step.step)

    def note(self, event: str, **about) -> None:
        """A line between two steps."""
        self._write({"event": event, **about})

    def end(self, result: "Result") -> None:
        """The last line."""
        self._write(
            {
                "event": "end", "step": result.step, "paths": [str(p) for p in result.paths],
                "steps_per_second": result.steps_per_second, "peak_memory": result.peak_memory,
                "skipped_steps": result.skipped, "signal": result.stopped,
            }
        )  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity
        odd = {k: str(v) for k, v in line.items() if isinstance(v, float) and not isfinite(v)}
        self._file.write(json.dumps(line | odd, allow_nan=False) + "\n")
        self._file.flush()


class Stop:
    """SIGINT and SIGTERM set `signal`, so that a run can end between two steps.

    A second one acts as it would have without this. Outside the main thread nothing is caught.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _ask(self, number: int, _frame) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def write_bad(output: Path, bad: list[Bad]) -> None:
    """output/bad_images.jsonl: the files that are left out, and why; none when all are usable."""
    path = output / "bad_images.jsonl"
    if bad:
        lines = [json.dumps({"path": str(b.path), "reason": b.reason}) for b in bad]
        storage.write({path: ("\n".join(lines) + "\n").encode()})
        print(
            f"{len(bad)} images are left out ({bad[0].path.name}: {bad[0].reason}); see {path}",
            file=sys.stderr,
        )
    else:
        path.unlink(missing_ok=True)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def progress(items: Collection, what: str, unit: str, bar: bool) -> tqdm:
    """The items, with a bar on a terminal while they are gone through, if `bar`."""
    return tqdm(items, what, unit=unit, disable=None if bar else True, leave=False)
