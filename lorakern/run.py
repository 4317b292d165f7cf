"""A run: model, method, data and optimizer made from a config, and the state a step changes."""

import hashlib
import importlib
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import lorakern
from lorakern import cache, checkpoint, data, diffusion, graphed, methods, models
from lorakern.arena import FlatAdamW
from lorakern.average import Average
from lorakern.config import Config
from lorakern.devices import autocast, bf16, device_of, keep_freed_memory
from lorakern.frozen import accelerate_frozen
from lorakern.methods.base import Method
from lorakern.monitor import progress, write_bad


def prepare(config: Config, *, bar: bool) -> "Run":
    """Load, encode, inject, and go back to the checkpoint when config.resume says so."""
    if checkpoint.exists(config.output) and not config.resume:
        raise ValueError(
            f"{config.output} holds the checkpoints of a run: go on with --resume, or choose"
            " another output"
        )
    for name, path in (("output", config.output), ("cache", config.cache or config.output)):
        if path.resolve().is_relative_to(config.data.resolve()):
            raise ValueError(f"{name} {path} lies in the data folder {config.data}; choose another")
    method = methods.make(config)
    device = device_of(config.device)
    keep_freed_memory(device)
    graphed.check(config, device, method)
    examples, bad = data.find(config.data, config.caption)
    method.check(models.read_index(config.model), examples)
    base = models.load(config.model, keep=method.parts)
    sizes = data.bucket_sizes(config.resolution, base.bucket_step, square=not config.buckets)
    folder = config.cache or config.output / "cache"
    base.vae.to(device)
    shown = progress(examples, "latents", "image", bar)
    latents, unusable = cache.encode_images(base, examples, sizes, folder, shown)
    bad += unusable
    write_bad(config.output, bad)
    if not latents:
        some = "; ".join(f"{b.path}: {b.reason}" for b in bad[:5])
        raise ValueError(f"data: none of {len(bad)} images in {config.data} can be used: {some}")
    for encoder in base.text_encoders.values():
        encoder.to(device)
    texts = None
    if not method.trains_text:
        shown = progress(latents, "texts", "caption", bar)
        captions = (latent.tokens for latent in shown)
        texts = cache.encode_texts(base, [base.tokens(""), *captions], folder)
    method.encode(base, latents, folder, device, bar=bar)
    return Run(config, method, base, device, latents, texts, bad)


class Batch(NamedTuple):
    """All that a batch's loss depends on beside the weights, on the run's device.

    x0, noise: [B, C, H, W] float32.
    t: [B] int64, steps of the noise schedule.
    keep: [B] bool, whose captions stay.
    sizes: [B, 6] int64, as Latent.time_ids.
    text: what `Base.encode_text` gives; where a text encoder trains, what it takes.
    inputs: the method's.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    keep: Tensor
    sizes: Tensor
    text: Tensor | tuple[Tensor, Tensor | None]
    inputs: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self) if isinstance(leaf, Tensor)]


class Run:
    """A model with what trains in it, the data and the optimizer: the state that a step changes.

    Attributes:
        step: updates made, skipped ones too.
        trained: component -> module; what trains is in them.
        parameters: all that train.
        bad: images left out.
    """

    def __init__(self, config: Config, method: Method, base, device, latents, texts, bad):
        self.config, self.method, self.base = config, method, base
        self.device, self.bad = device, bad
        self.latents, self.step, self.saved = latents, 0, 0
        self.order = data.Order([la.bucket for la in latents], config.batch_size, config.seed)
        self.text = texts or base.encode_text
        self.empty = base.tokens("")
        self.predicts = config.loss.predicts.replace("auto", base.predicts)
        self.alpha_bars = base.alpha_bars.to(device)
        self.bf16 = bf16(config.precision, device)

        if not config.sample.every:
            base.free("vae", *(() if texts is None else base.text_encoders))
        torch.manual_seed(diffusion.seed_of(config.seed, "factors"))
        method.inject(base)
        method.check_export()
        graphed.check(config, device, method)
        self.trained = method.trained
        for module in self.trained.values():
            module.to(device)
            accelerate_frozen(module)
        groups = method.groups()
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = _optimizer(config, groups)
        self.schedule = _schedule(config, self.optimizer)
        self.average = _average(config, self.optimizer, self.parameters)
        self._whole = True
        if config.resume:
            self._resume()

    def batches(self, step: int) -> list[int]:
        """The numbers of the batches of a step."""
        first = step * self.config.accumulate
        return list(range(first, first + self.config.accumulate))

    def images(self, step: int) -> list[str]:
        """The image files of a step."""
        members = [i for batch in self.batches(step) for i in self.order.batch(batch)]
        return sorted({str(self.latents[i].path) for i in members})

    def batch(self, index: int) -> Batch:
        """A batch by its number: all that is read and drawn for it, the same each time."""
        latents = [self.latents[i] for i in self.order.batch(index)]
        entries = [cache.entry(latent.entry) for latent in latents]
        mean, std = (torch.stack([e[part] for e in entries]) for part in ("mean", "std"))
        t, noise, chance = diffusion.draw(self.config.seed, index, mean.shape, len(self.alpha_bars))
        keep = self.method.keeps_caption(chance)
        tokens = torch.stack(
            [la.tokens if k else self.empty for k, la in zip(keep, latents, strict=True)]
        )
        made = Batch(
            mean + std * noise[0], noise[1], t, keep,
            torch.tensor([latent.time_ids for latent in latents]),
            self._told(tokens),
            self.method.inputs(latents, chance),
        )  # fmt: skip
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), made)

    def _told(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Batch.text; in bfloat16 where autocast would have each layer round it anew."""
        if self.method.trains_text:
            return tokens
        context, pooled = self.text(tokens)
        return context.to(torch.bfloat16) if self.bf16 else context, pooled

    def loss_of(self, batch: Batch) -> Tensor:
        """A batch's loss, a float32 scalar; nothing but work of the device, and no wait for it."""
        with autocast(self.device, self.bf16):
            text = batch.text
            context, pooled = self.text(text) if self.method.trains_text else text
            if self.base.zero_empty:
                keep = batch.keep.to(context)
                context, pooled = context * keep[:, None, None], pooled * keep[:, None]
            alpha_bar = self.alpha_bars[batch.t]
            noisy = diffusion.noisy_latent(batch.x0, batch.noise, alpha_bar)
            condition = self.base.condition(pooled, batch.sizes)
            predicted = self.method.predict(noisy, batch.t, context, condition, batch.inputs)
        wanted = diffusion.target(batch.x0, batch.noise, alpha_bar, predicts=self.predicts)
        return diffusion.loss(
            predicted, wanted, alpha_bar, predicts=self.predicts, gamma=self.config.loss.min_snr
        )

    def loss(self, index: int) -> Tensor:
        """The loss of a batch by its number; the same for the same index and weights."""
        return self.loss_of(self.batch(index))

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradients of a batch's share of a step's loss; returns that share."""
        part = self.loss_of(batch) / self.config.accumulate
        part.backward()
        return part.detach()

    def clip(self) -> Tensor:
        """Bring the gradients down to the largest norm chosen; returns theirs before, a scalar."""
        largest = self.config.optimizer.clip or math.inf
        if isinstance(self.optimizer, FlatAdamW):
            return self.optimizer.clip(largest)
        return nn.utils.clip_grad_norm_(self.parameters, largest)

    def update(self, finite: bool) -> None:
        """End a step: the gradients reach the weights when they are finite, and are cleared."""
        self._whole = False
        with warnings.catch_warnings():
            if finite:
                self.optimizer.step()
                self.method.after_update()
                if self.average is not None and not _averages(self.optimizer):
                    self.average.update(self.step + 1)
            else:
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)`")
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._whole = True

    def save(self) -> None:
        """Write a checkpoint, unless this step has one or was broken off inside the update."""
        if not self._whole or self.step == self.saved:
            return
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        if self.average is not None:
            state["average"] = self.average.values
        checkpoint.save(
            self.config.output, self.step, self.method.tensors(), state, self._settings(),
            self.config.checkpoint.keep,
        )  # fmt: skip
        self.saved = self.step

    def export(self) -> list[Path]:
        """Write what was trained; returns the files or folders."""
        metadata = {"lorakern_config": self.config.model_dump_json(), "steps": str(self.step)}
        with self.averaged():
            return self.method.export(metadata)

    def averaged(self) -> AbstractContextManager:
        """A block in which the weights are what is exported: their moving average when asked."""
        return nullcontext() if self.average is None else self.average.shown()

    def draw(self) -> None:
        """Write samples/step-NNNNNN.png: a column a prompt, a row a seed."""
        sample = self.config.sample
        side = self.config.resolution
        for module in self.trained.values():
            module.eval()
        with self.averaged():
            rows = [
                self.method.draw(
                    seed=sample.seed + row, steps=sample.steps, guidance=sample.guidance,
                    size=(side, side), bf16=self.bf16,
                )
                for row in range(sample.rows)
            ]  # fmt: skip
        for module in self.trained.values():
            module.train()
        models.write_image(
            models.grid(rows), self.config.output / "samples" / f"step-{self.step:06d}.png"
        )

    def describe(self) -> dict[str, Any]:
        """What the log begins with."""
        return {
            "step": self.step,
            "images": len(self.latents),
            "left_out": len(self.bad),
            "parameters": sum(p.numel() for p in self.parameters),
            "device": str(self.device),
            "bf16": self.bf16,
            "graphs": graphed.about(self.config, self.device, self.method),
            "predicts": self.predicts,
            "versions": {"lorakern": lorakern.__version__, "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }

    def _settings(self) -> dict[str, Any]:
        seen = hashlib.sha256()
        for latent in self.latents:
            seen.update(f"{latent.entry.name} {latent.tokens.tolist()}".encode())
        own = {"data fingerprint": seen.hexdigest()[:16], **self.method.settings()}
        return self.config.fixed() | own

    def _resume(self) -> None:
        found = checkpoint.newest(self.config.output)
        if found is None:
            raise ValueError(f"--resume: no whole checkpoint in {self.config.output}")
        if changed := checkpoint.differences(found.settings, self._settings()):
            raise ValueError(f"--resume: {found.path} is of another run: {'; '.join(changed)}")
        with torch.no_grad():
            for name, factor in self.method.tensors().items():
                factor.copy_(found.factors[name])
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.schedule.load_state_dict(found.state["schedule"])
        if self.average is not None:
            self.average.load(found.state["average"])
        self.step = self.saved = found.step


def _optimizer(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    chosen = config.optimizer
    options = dict(chosen.options)
    if chosen.weight_decay is not None:
        options["weight_decay"] = chosen.weight_decay
    if chosen.name == "adamw":
        # torch's own passes over the factors of a layer that was skipped
        skips = config.adapter.options.get("module_dropout")
        kind, options = torch.optim.AdamW if skips else FlatAdamW, {"fused": True, **options}
    else:
        kind = _named_class(chosen.name)
    try:
        return kind(groups, lr=chosen.lr, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {chosen.name} with {options}: {error}") from error


def _average(config: Config, optimizer, factors: list[Tensor]) -> Average | None:
    if not config.optimizer.average:
        return None
    flat = isinstance(optimizer, FlatAdamW)
    tensors = optimizer.flats if flat else factors
    average = Average(factors, tensors, config.optimizer.average)
    # weights that are brought down after the step are averaged after that
    if flat and config.optimizer.max_norm is None:
        optimizer.average = average
    return average


def _averages(optimizer) -> bool:
    """Whether the optimizer's own step keeps the average."""
    return isinstance(optimizer, FlatAdamW) and optimizer.average is not None


def _named_class(name: str) -> type:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f'optimizer.name {name!r}: want adamw, or "module:Class"')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer.name {name!r}: {error}") from None


def _schedule(config: Config, optimizer: torch.optim.Optimizer):
    from diffusers.optimization import get_scheduler

    chosen = config.optimizer
    if chosen.warmup and chosen.schedule == "constant":
        raise ValueError(
            f"optimizer.warmup is {chosen.warmup}, and the constant schedule has none; set"
            ' optimizer.schedule = "constant_with_warmup"'
        )
    return get_scheduler(
        chosen.schedule,
        optimizer,
        num_warmup_steps=chosen.warmup,
        num_training_steps=config.steps,
    )
