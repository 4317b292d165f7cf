"""method = "adapter": weight adapters (LoRA, LoHa, LoKr, DoRA) of UNet and text encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorakern
from lorakern import formats, models
from lorakern.adapters.groups import limit_norms, parameter_groups, tensors
from lorakern.adapters.targets import PRESETS
from lorakern.config import Config
from lorakern.data import Example
from lorakern.devices import bf16, checkpoint_gradients, device_of
from lorakern.methods.base import Method


class WeightAdapter(Method):
    """Adapters on layers of the UNet, and of the text encoders when asked.

    The text encoders take the same target preset as the UNet, "attn" when it is no preset.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.trains_text = config.adapter.text_encoder

    def check(self, index: dict[str, Any], examples: Sequence[Example]) -> None:
        if unknown := [form for form in self.config.formats if form not in formats.FORMATS]:
            there = ", ".join(sorted(formats.FORMATS))
            raise ValueError(f"no format {unknown[0]!r}; there are {there}")

    def inject(self, base: models.Base) -> None:
        config, chosen = self.config, self.config.adapter
        self.base = base
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
        self.trained = trained

    def check_export(self) -> None:
        for form in self.config.formats:
            formats.check(self.trained, self._path(form), form)

    def groups(self) -> list[dict]:
        chosen = self.config.optimizer
        text = chosen.text_encoder_lr or chosen.lr
        return [
            group
            for component, module in self.trained.items()
            for group in parameter_groups(
                module, chosen.lr if component == "unet" else text,
                loraplus_ratio=chosen.loraplus_ratio,
            )
        ]  # fmt: skip

    def after_update(self) -> None:
        if self.config.optimizer.max_norm is not None:
            for module in self.trained.values():
                limit_norms(module, self.config.optimizer.max_norm)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{component}.{name}": tensor
            for component, module in self.trained.items()
            for name, tensor in tensors(module).items()
        }

    def about(self) -> str:
        chosen = self.config.adapter
        layers = sum(len(lorakern.adapters.find(m)) for m in self.trained.values())
        return f"{chosen.algo} of rank {chosen.rank} on {layers} layers"

    def paths(self) -> list[Path]:
        return [self._path(form) for form in self.config.formats]

    def export(self, metadata: dict[str, str]) -> list[Path]:
        for form in self.config.formats:
            lorakern.save(self.trained, self._path(form), form, metadata=metadata)
        return self.paths()

    def _path(self, form: str) -> Path:
        """output/NAME.safetensors for kohya, else output/NAME-FORMAT, a folder or a file."""
        name = self.config.name
        return self.config.output / (f"{name}.safetensors" if form == "kohya" else f"{name}-{form}")
