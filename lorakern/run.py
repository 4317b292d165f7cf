"""A run: model, adapters, data and optimizer made from a config, and the state a step changes."""

import hashlib
import importlib
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lorakern
from lorakern import cache, checkpoint, data, diffusion, formats, models
from lorakern.adapters.groups import limit_norms, parameter_groups, tensors
from lorakern.adapters.targets import PRESETS
from lorakern.arena import Average, FlatAdamW
from lorakern.config import Config
from lorakern.monitor import write_bad


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
    if unknown := [form for form in config.formats if form not in formats.FORMATS]:
        there = ", ".join(sorted(formats.FORMATS))
        raise ValueError(f"no format {unknown[0]!r}; there are {there}")
    device = device_of(config.device)
    examples, bad = data.find(config.data, config.caption)
    base = models.load(config.model)
    sizes = data.bucket_sizes(config.resolution, base.bucket_step, square=not config.buckets)
    folder = config.cache or config.output / "cache"
    base.vae.to(device)
    shown = tqdm(examples, "latents", unit="image", disable=None if bar else True, leave=False)
    latents, unusable = cache.encode_images(base, examples, sizes, folder, shown)
    bad += unusable
    write_bad(config.output, bad)
    if not latents:
        some = "; ".join(f"{b.path}: {b.reason}" for b in bad[:5])
        raise ValueError(f"data: none of {len(bad)} images in {config.data} can be used: {some}")
    for encoder in base.text_encoders.values():
        encoder.to(device)
    texts = None
    if not config.adapter.text_encoder:
        shown = tqdm(latents, "texts", unit="caption", disable=None if bar else True, leave=False)
        captions = (latent.tokens for latent in shown)
        texts = cache.encode_texts(base, [base.tokens(""), *captions], folder)
    return Run(config, base, device, latents, texts, bad)


class Run:
    """A model with its adapters, the data and the optimizer: the state that a step changes.

    Attributes:
        step: updates made, skipped ones too.
        parameters: all factors.
        bad: images left out.
    """

    def __init__(self, config: Config, base, device, latents, texts, bad):
        self.config, self.base, self.device, self.bad = config, base, device, bad
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
        self.trained = inject(base, config)
        for form in config.formats:
            formats.check(self.trained, path_of(config, form), form)
        for module in self.trained.values():
            module.to(device)
        groups = [
            group
            for module, lr in zip(self.trained.values(), _rates(config), strict=False)
            for group in parameter_groups(
                module, lr, loraplus_ratio=config.optimizer.loraplus_ratio
            )
        ]
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

    def loss(self, index: int) -> Tensor:
        """The loss of one batch, a float32 scalar; the same for the same index and weights."""
        config, seed = self.config, self.config.seed
        latents = [self.latents[i] for i in self.order.batch(index)]
        entries = [cache.entry(latent.entry) for latent in latents]
        mean, std = (torch.stack([e[part] for e in entries]) for part in ("mean", "std"))
        t, noise, chance = diffusion.draw(seed, index, mean.shape, len(self.alpha_bars))
        keep = chance >= config.caption_dropout
        tokens = [la.tokens if k else self.empty for k, la in zip(keep, latents, strict=True)]
        sizes = torch.tensor([latent.time_ids for latent in latents])

        x0, noise = (mean + std * noise[0]).to(self.device), noise[1].to(self.device)
        t = t.to(self.device)
        alpha_bar = self.alpha_bars[t]
        with autocast(self.device, self.bf16):
            context, pooled = self.text(torch.stack(tokens))
            context = context.to(self.device)
            pooled = None if pooled is None else pooled.to(self.device)
            if self.base.zero_empty:
                keep = keep.to(context)
                context, pooled = context * keep[:, None, None], pooled * keep[:, None]
            noisy = diffusion.noisy_latent(x0, noise, alpha_bar)
            predicted = self.base.unet(
                noisy, t, context, **self.base.condition(pooled, sizes)
            ).sample
        wanted = diffusion.target(x0, noise, alpha_bar, predicts=self.predicts)
        return diffusion.loss(
            predicted, wanted, alpha_bar, predicts=self.predicts, gamma=config.loss.min_snr
        )

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
                if self.config.optimizer.max_norm is not None:
                    for module in self.trained.values():
                        limit_norms(module, self.config.optimizer.max_norm)
                if self.average is not None:
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
            self.config.output, self.step, self._factors(), state, self._settings(),
            self.config.checkpoint.keep,
        )  # fmt: skip
        self.saved = self.step

    def export(self) -> list[Path]:
        """Write the adapter in the chosen formats; see `path_of`."""
        metadata = {"lorakern_config": self.config.model_dump_json(), "steps": str(self.step)}
        paths = []
        for form in self.config.formats:
            path = path_of(self.config, form)
            with self.averaged():
                lorakern.save(self.trained, path, form, metadata=metadata)
            paths.append(path)
        return paths

    def averaged(self) -> AbstractContextManager:
        """A block in which the factors are what is exported: their moving average when asked."""
        return nullcontext() if self.average is None else self.average.shown()

    def draw(self) -> None:
        """Write samples/step-NNNNNN.png: a column a prompt, a row a seed."""
        sample = self.config.sample
        side = self.config.resolution
        for module in self.trained.values():
            module.eval()
        with self.averaged():
            rows = [
                models.draw(
                    self.base, sample.prompts, seed=sample.seed + row, steps=sample.steps,
                    guidance=sample.guidance, size=(side, side), bf16=self.bf16,
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
            "predicts": self.predicts,
            "versions": {"lorakern": lorakern.__version__, "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }

    def _factors(self) -> dict[str, Tensor]:
        return {
            f"{component}.{name}": tensor
            for component, module in self.trained.items()
            for name, tensor in tensors(module).items()
        }

    def _settings(self) -> dict[str, Any]:
        seen = hashlib.sha256()
        for latent in self.latents:
            seen.update(f"{latent.entry.name} {latent.tokens.tolist()}".encode())
        return {**self.config.fixed(), "data fingerprint": seen.hexdigest()[:16]}

    def _resume(self) -> None:
        found = checkpoint.newest(self.config.output)
        if found is None:
            raise ValueError(f"--resume: no whole checkpoint in {self.config.output}")
        if changed := checkpoint.differences(found.settings, self._settings()):
            raise ValueError(f"--resume: {found.path} is of another run: {'; '.join(changed)}")
        with torch.no_grad():
            for name, factor in self._factors().items():
                factor.copy_(found.factors[name])
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.schedule.load_state_dict(found.state["schedule"])
        if self.average is not None:
            self.average.load(found.state["average"])
        self.step = self.saved = found.step


def inject(base: models.Base, config: Config) -> dict[str, nn.Module]:
    """Put the adapters in, ready to train; returns the trained modules by component.

    The text encoders take the same target preset as the UNet, "attn" when it is no preset.
    """
    chosen = config.adapter
    trained: dict[str, nn.Module] = {"unet": base.unet}
    if chosen.text_encoder:
        trained |= base.text_encoders
    preset = isinstance(chosen.targets, str) and chosen.targets in PRESETS
    for component, module in trained.items():
        if bf16(config.precision, device_of(config.device)):
            with models.quiet_libraries():
                module.to(torch.bfloat16)
        targets = chosen.targets if component == "unet" or preset else "attn"
        lorakern.inject(
            module, chosen.algo, rank=chosen.rank, alpha=chosen.alpha, targets=targets,
            **chosen.options,
        )  # fmt: skip
        module.train()
        if config.gradient_checkpointing:
            checkpoint_gradients(module)
    return trained


def path_of(config: Config, form: str) -> Path:
    """output/NAME.safetensors for kohya, else output/NAME-FORMAT, a folder or a file."""
    if form == "kohya":
        return config.output / f"{config.name}.safetensors"
    return config.output / f"{config.name}-{form}"


def device_of(name: str) -> torch.device:
    """The device that "auto" or a name stands for.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


def bf16(precision: str, device: torch.device) -> bool:
    """Whether the model runs in bfloat16; the factors are float32 in any case."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def autocast(device: torch.device, on: bool) -> AbstractContextManager:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def checkpoint_gradients(module: nn.Module) -> None:
    """Recompute a diffusers or transformers module's activations; those of transformers must be in
    training mode."""
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing()
    elif hasattr(module, "activation_checkpointing_enable"):
        # transformers 5
        module.activation_checkpointing_enable()
    elif hasattr(module, "gradient_checkpointing_enable"):
        # 4 is reentrant if not told, and then layers behind a frozen embedding get no gradient
        module.gradient_checkpointing_enable({"use_reentrant": False})


def _rates(config: Config) -> list[float]:
    text = config.optimizer.text_encoder_lr or config.optimizer.lr
    return [config.optimizer.lr, text, text]


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
    tensors = optimizer.flats if isinstance(optimizer, FlatAdamW) else factors
    return Average(factors, tensors, config.optimizer.average)


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
