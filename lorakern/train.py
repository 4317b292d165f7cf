"""Training: one loop. What it works on is made in lorakern/run.py.

Everything random in a step follows from the seed and the step's number, so a checkpoint needs no
random state, and a run that was interrupted goes on as if it had not been.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lorakern import graphed
from lorakern.config import Config
from lorakern.data import Bad
from lorakern.diffusion import seed_of
from lorakern.monitor import Log, Stop, peak_memory
from lorakern.run import Run, prepare

# steps in a row without a finite loss or gradient after which training ends
GIVE_UP = 10


class Diverged(RuntimeError):
    """Loss or gradient was not finite for GIVE_UP steps in a row; the weights are the last good."""


@dataclass(frozen=True)
class Progress:
    """One step, as `on_step` gets it: losses have no unit, `seconds` is the step's own time."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a run gave.

    paths: the adapter's files or folders, one a format.
    losses: of the steps made now, not finite where a step was skipped; no unit.
    steps_per_second: mean over the steps made now, without checkpoints and samples.
    peak_memory: bytes; on a GPU of tensors, on a CPU of the whole process.
    skipped: steps made now that did not reach the weights.
    bad: images left out.
    stopped: whether a signal ended the run early; its number, or None.
    """

    paths: list[Path]
    step: int
    losses: list[float]
    steps_per_second: float
    peak_memory: int
    skipped: int
    bad: list[Bad]
    stopped: int | None


def train(
    config: Config, on_step: Callable[[Progress], None] | None = None, *, bar: bool = True
) -> Result:
    """Train an adapter as `config` says; files go to config.output.

    Args:
        config: see `lorakern.config`; `config.from_dict` makes one from plain values.
        on_step: called after each step.
        bar: show progress on stderr.

    Raises:
        ValueError: model, data or settings cannot be used; the message names what.
        Diverged: see there.
        Whatever ends a step otherwise (out of memory, on_step) passes through; in every case
        the last whole step is in a checkpoint.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        run = prepare(config, bar=bar)
        return _loop(run, config, on_step, bar)


def _loop(run: Run, config: Config, on_step, bar: bool) -> Result:
    losses, seconds, skipped, bad_in_a_row = [], 0.0, 0, 0
    with (
        Log(config.output, run.describe()) as log,
        Stop() as stop,
        _bar(run, bar) as shown,
    ):
        backward = graphed.backward(run, log.note)
        try:
            while run.step < config.steps and stop.signal is None:
                start = time.perf_counter()
                torch.manual_seed(seed_of(config.seed, "step", run.step))
                loss = torch.zeros((), device=run.device)
                for index in run.batches(run.step):
                    loss += backward(run.batch(index))
                loss, norm = torch.stack([loss, run.clip()]).tolist()

                lr = run.schedule.get_last_lr()[0]
                finite = math.isfinite(loss) and math.isfinite(norm)
                run.update(finite)
                skipped, bad_in_a_row = skipped + (not finite), 0 if finite else bad_in_a_row + 1

                step = Progress(run.step, config.steps, loss, norm, lr, time.perf_counter() - start)
                losses.append(loss)
                seconds += step.seconds
                log.step(step, None if finite else run.images(run.step - 1))
                shown.set_postfix(loss=f"{_recent(losses):.4f}", refresh=False)
                shown.update()
                if bad_in_a_row == GIVE_UP:
                    raise Diverged(_diverged(run, loss, norm))
                if config.checkpoint.every and run.step % config.checkpoint.every == 0:
                    run.save()
                if config.sample.every and run.step % config.sample.every == 0:
                    run.draw()
                if on_step is not None:
                    on_step(step)
        finally:
            run.save()
        paths = run.export()
        per_second = len(losses) / seconds if seconds else 0.0
        result = Result(
            paths, run.step, losses, per_second, peak_memory(run.device), skipped, run.bad,
            stop.signal,
        )  # fmt: skip
        log.end(result)
    return result


def _bar(run: Run, bar: bool) -> tqdm:
    # a file gets a line now and then, a terminal a moving bar
    pause = 0.1 if sys.stderr.isatty() else 10.0
    total = run.config.steps
    return tqdm(total=total, initial=run.step, unit="step", disable=not bar, mininterval=pause)


def _recent(losses: list[float]) -> float:
    finite = [loss for loss in losses[-25:] if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _diverged(run: Run, loss: float, norm: float) -> str:
    images = run.images(run.step - 1)
    return (
        f"loss {loss} and gradient norm {norm} at step {run.step}, the {GIVE_UP}th in a row that"
        f" is not finite; none of them reached the weights. Last images: {', '.join(images[:5])}"
    )
