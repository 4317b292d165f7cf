"""Forward, loss and backward of a batch as a CUDA graph, one a kind of batch (a bucket's shapes).

Forward and back, SD 1.5 makes 1,400 calls frozen and 2,700 with LoRA in plain torch (counted; casts
of autocast not), each 5 to 10 µs of the host's time, 1.5 in a graph: 15 to 25 ms a step against 4,
wherever the device's own work is less (batches below 4, SDXL at 1); else a graph gains nothing.
Predicted, not yet measured. Which it is, the host's time to launch does not tell: with a thousand
calls ahead the host waits for the device. So replays are timed against the eager steps before.

Images, noise, texts and the optimizer's step are outside, so that the numbers are the eager step's:
a graph reads copies of the batch, and adds to FlatAdamW's flat gradients.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from lorakern.adapters import Adapter
from lorakern.config import Config

if TYPE_CHECKING:
    from lorakern.methods.base import Method
    from lorakern.run import Batch, Run

# batches of a kind that run eagerly before one is captured, and as many replays that are timed
WARM = 3
# graphs at once; of what one needs, all but the batch and the loss lies in a pool that all share
MOST = 8
# of an eager batch's time, the most that a replay may take under "auto"
PAYS = 0.95
DROPS = ("dropout", "rank_dropout", "module_dropout")


class OnCuda:
    """A stream beside the current one, graphs captured on it, and the device's clock."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within runs on the stream, in its turn among what is around it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def timed(self, function: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Its result, and the seconds until the device has done it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made = function()
        end.record()
        end.synchronize()
        return made, start.elapsed_time(end) / 1e3

    def cramped(self) -> bool:
        """Whether a first graph would leave eager batches of other kinds no memory beside it."""
        at = self.stream.device
        cached = torch.cuda.memory_reserved(at) - torch.cuda.memory_allocated(at)
        return not self._graphs and torch.cuda.mem_get_info(at)[0] < cached

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Its calls, not run, as one that runs them; and its result, which each run writes."""
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs), None)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            made = function()
        self._graphs.add(graph)
        return graph.replay, made


# how a kind of device captures
CAPTURES: dict[str, type[OnCuda]] = {"cuda": OnCuda}


def refusal(config: Config, device: torch.device, method: "Method") -> str | None:
    """Why no step may be captured; None if it may. Before `method.inject`, of the config alone."""
    if device.type not in CAPTURES:
        return f"the device is {device}; want {', '.join(CAPTURES)}"
    if config.optimizer.name != "adamw":
        return f"optimizer {config.optimizer.name} has no gradients of a fixed place; adamw has"
    if config.gradient_checkpointing:
        return "gradient checkpointing asks for the random state, which a graph has not"
    if method.trains_text:
        return "a text encoder trains"
    for component, module in method.trained.items():
        for path, part in module.named_modules():
            adapter = isinstance(part, Adapter) and any(getattr(part, name, 0) for name in DROPS)
            if adapter or (isinstance(part, _DropoutNd) and part.p):
                return f"dropout at {component}.{path} draws anew each time, a graph does not"
    return None


def check(config: Config, device: torch.device, method: "Method") -> None:
    """Raises ValueError where config.graphs is "on" and there is a `refusal`."""
    if config.graphs == "on" and (reason := refusal(config, device, method)):
        raise ValueError(f'graphs is "on", but {reason}')


def about(config: Config, device: torch.device, method: "Method") -> str:
    """config.graphs, and what comes of it."""
    reason = None if config.graphs == "off" else refusal(config, device, method)
    return f"{config.graphs}: none, {reason}" if reason else config.graphs


def backward(run: "Run", note: Callable[..., None]) -> "Callable[[Batch], Tensor]":
    """`run.backward`, or the same by way of graphs; `note`, as Log's, is told of each kind."""
    if run.config.graphs == "off" or refusal(run.config, run.device, run.method):
        return run.backward
    return Graphs(run, CAPTURES[run.device.type](run.device), note)


@dataclass
class _Kind:
    """Batches of the same shapes: their graph, and the seconds of each until it is settled."""

    graph: "Callable[[Batch], Tensor] | None" = None
    eager: float | None = None
    seconds: list[float] = field(default_factory=list)
    settled: bool = False


class Graphs:
    """(batch) -> its share of the loss, as `Run.backward`; to be read before the next call.

    After WARM batches of a kind a graph is captured, and stays where config.graphs is "on" or it is
    the faster; when MOST are there or a capture failed, no more are.
    """

    def __init__(self, run: "Run", capture: OnCuda, note: Callable[..., None]):
        self.run, self.capture, self.note = run, capture, note
        self.kinds: dict[tuple, _Kind] = {}
        self.failed = False

    def __call__(self, batch: "Batch") -> Tensor:
        shapes = tuple((tuple(t.shape), t.dtype) for t in batch.tensors())
        kind = self.kinds.setdefault(shapes, _Kind())
        backward = kind.graph or self.run.backward
        with self.capture.beside():
            if kind.settled:
                return backward(batch)
            part, seconds = self.capture.timed(lambda: backward(batch))
            kind.seconds.append(seconds)
            if len(kind.seconds) == WARM:
                self._decide(kind, batch)
            return part

    def _decide(self, kind: _Kind, batch: "Batch") -> None:
        if kind.eager is None:
            kind.eager, kind.seconds, replay = min(kind.seconds), [], None
            reason = self._capture(kind, batch)
            if reason is None and self.run.config.graphs == "auto":
                return
        else:
            reason = "not faster" if (replay := min(kind.seconds)) > PAYS * kind.eager else None
        kind.graph, kind.settled = None if reason else kind.graph, True
        self.note(
            "graph", latents=list(batch.x0.shape), captured=reason is None, reason=reason,
            eager_seconds=kind.eager, replay_seconds=replay,
        )  # fmt: skip

    def _capture(self, kind: _Kind, batch: "Batch") -> str | None:
        """Give a kind its graph, while the gradients of its last batch are there; or why not."""
        if self.failed:
            return "a capture failed before"
        if sum(other.graph is not None for other in self.kinds.values()) == MOST:
            return f"there are {MOST} graphs"
        if self.capture.cramped():
            return "no memory for a second step is free"
        if any(p.grad is None for p in self.run.parameters if p.requires_grad):
            return "some of what trains gets no gradient"
        own, attach = tree_map_only(Tensor, torch.clone, batch), self.run.optimizer.attach
        attach()
        try:
            replay, part = self.capture.capture(lambda: self.run.backward(own))
        except RuntimeError as error:
            if self.run.config.graphs == "on":
                raise
            # torch keeps half of a capture that failed: another is not tried
            self.failed = True
            return f"capture failed: {error}"

        def graph(batch: "Batch") -> Tensor:
            for to, value in zip(own.tensors(), batch.tensors(), strict=True):
                to.copy_(value)
            attach()
            replay()
            return part

        kind.graph = graph
        return None
