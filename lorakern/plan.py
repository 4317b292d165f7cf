"""What a run would do, before it does it: images, steps, parameters, memory.

The memory of a step is found by running it on shapes alone: the model is built from its
configuration with tensors that hold no numbers, and the bytes that live at once are counted.
"""

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakern import backend, checkpoint, data, diffusion, graphed, methods, models
from lorakern.arena import gathers
from lorakern.config import Config
from lorakern.data import Bad
from lorakern.devices import autocast, bf16, device_of
from lorakern.methods.base import Method
from lorakern.monitor import progress

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What would happen; all memory in bytes.

    buckets: (width, height) in pixels -> images.
    left_out: images that cannot be read.
    per_epoch: steps that see each image once.
    about, trained: what trains in words, and its parameters.
    weights: of the parts that stay in memory while training.
    factors: of what trains, its gradients not included.
    optimizer: as FlatAdamW has them, two float32 moments a parameter, where it gathers a flat
        gradient, and one of an average.
    step: what one step adds at its peak: activations, gradients and temporaries.
    start: the step a resumed run would begin at.
    graphs: whether steps run as CUDA graphs, in words.
    """

    config: Config
    buckets: dict[tuple[int, int], int]
    left_out: list[Bad]
    per_epoch: float
    about: str
    writes: list[Path]
    trained: int
    weights: int
    factors: int
    optimizer: int
    step: int
    start: int
    predicts: str
    graphs: str

    @property
    def memory(self) -> int:
        """Bytes of tensors at the peak of a step."""
        return self.weights + self.factors + self.optimizer + self.step

    def __str__(self) -> str:
        config, images = self.config, sum(self.buckets.values())
        sizes = ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(self.buckets.items()))
        lines = [
            ("model", f"{config.model}, predicts {self.predicts}"),
            ("images", f"{images} in {config.data} ({sizes})"),
            *(("left out", f"{bad.path}: {bad.reason}") for bad in self.left_out[:5]),
            *([("left out", f"{len(self.left_out) - 5} more")] if len(self.left_out) > 5 else []),
            (
                "steps",
                f"{config.steps} of {config.batch_size} x {config.accumulate} images"
                f" ({config.steps / self.per_epoch:.1f} epochs)"
                + (f", going on from step {self.start}" if self.start else ""),
            ),
            (
                "adapter",
                f"{self.about}, {self.trained:,} parameters,"
                f" {self.trained * 4 / MIB:.1f} MiB a file",
            ),
            ("device", f"{device_of(config.device)}, {self._precision()}"),
            ("graphs", self.graphs),
            (
                "memory",
                f"about {_mib(self.memory)} of tensors at the peak of a step: weights"
                f" {_mib(self.weights)}, factors {_mib(self.factors)}, optimizer"
                f" {_mib(self.optimizer)}, activations and gradients {_mib(self.step)}",
            ),
            ("", "(counted on shapes; Python, torch and the driver come on top, 0.5 to 1 GiB)"),
            ("writes", ", ".join(map(str, self.writes))),
        ]
        return "\n".join(f"{name:>9}  {text}" for name, text in lines)

    def _precision(self) -> str:
        low = bf16(self.config.precision, device_of(self.config.device))
        return "bf16 with float32 factors" if low else "float32"


def plan(config: Config, *, bar: bool = True) -> Plan:
    """Look at data, model and output, and change nothing.

    Raises:
        ValueError: what would end the run at its start; the message names it.
    """
    examples, bad = data.find(config.data, config.caption)
    method = methods.make(config)
    graphed.check(config, device_of(config.device), method)
    method.check(models.read_index(config.model), examples)
    base = models.skeleton(config.model)
    sizes = data.bucket_sizes(config.resolution, base.bucket_step, square=not config.buckets)
    measured = _measure(method, base, max(sizes, key=math.prod))
    buckets: Counter[tuple[int, int]] = Counter()
    for example in progress(examples, "images", "image", bar):
        try:
            image = data.read_image(example.path.read_bytes())
            buckets[data.nearest_bucket(image.size, sizes)] += 1
        except (data.BadImage, OSError) as reason:
            bad.append(Bad(example.path, str(reason)))
    if not buckets:
        some = "; ".join(f"{b.path}: {b.reason}" for b in bad[:5])
        raise ValueError(f"data: none of {len(bad)} images in {config.data} can be used: {some}")
    per_epoch = sum(math.ceil(n / config.batch_size) for n in buckets.values()) / config.accumulate
    found = checkpoint.newest(config.output) if config.resume else None
    return Plan(
        config, dict(buckets), bad, per_epoch, start=found.step if found else 0,
        predicts=config.loss.predicts.replace("auto", base.predicts), **measured,
    )  # fmt: skip


def _measure(method: Method, base: models.Base, size: tuple[int, int]) -> dict[str, Any]:
    """One batch of pictures of `size`, run on shapes: some fields of Plan."""
    config, unet = method.config, base.unet
    batch = config.batch_size
    width, height = (side // base.latent_factor for side in size)
    length = base.pipe.text_encoder.config.max_position_embeddings
    method.inject(base)
    device = device_of(config.device)
    graphed.check(config, device, method)
    trained = method.trained
    with FakeTensorMode(), backend.use("reference"):
        for module in {**trained, "unet": unet, **base.text_encoders}.values():
            _without_numbers(module)
        latent = torch.empty(batch, unet.config.in_channels, height, width)
        t = torch.zeros(batch, dtype=torch.long)
        tokens = torch.zeros(batch, len(base.text_encoders), length, dtype=torch.long)
        inputs = method.blank(batch, size)
        with torch.no_grad():
            text = base.encode_text(tokens)
        with _Peak() as peak:
            with autocast(torch.device("cpu"), bf16(config.precision, device)):
                context, pooled = base.encode_text(tokens) if method.trains_text else text
                condition = base.condition(pooled, torch.zeros(batch, 6))
                predicted = method.predict(latent, t, context, condition, inputs)
            diffusion.loss(
                predicted, latent, torch.full((batch,), 0.5), predicts="noise", gamma=None
            ).backward()
    stay = {**trained, "unet": unet}
    if config.sample.every:
        stay |= {"vae": base.vae, **base.text_encoders}
    factors = [p for m in trained.values() for p in m.parameters() if p.requires_grad]
    frozen = [p for m in stay.values() for p in m.parameters() if not p.requires_grad]
    numbers = 2 + gathers(device) + bool(config.optimizer.average)
    return {
        "about": method.about(),
        "graphs": graphed.about(config, device, method),
        "writes": method.paths(),
        "trained": sum(p.numel() for p in factors),
        "weights": sum(map(_bytes, frozen)),
        "factors": sum(map(_bytes, factors)),
        "optimizer": numbers * sum(4 * p.numel() for p in factors),
        "step": peak.most,
    }


def _without_numbers(module: nn.Module) -> None:
    """Put fake CPU tensors in the place of meta ones, whose attention has another formula."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live; `most` at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            # dropout's draws on the host: a seed, or whether to skip a module
            return False if args[0].dtype == torch.bool else 0
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_):
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 1024 * MIB else f"{size / 1024 / MIB:,.2f} GiB"
