"""What a method of training is: all that a Run asks of it, in the order in which it is asked."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lorakern import models
from lorakern.cache import Latent
from lorakern.config import Config
from lorakern.data import Example
from lorakern.devices import bf16, device_of


class Method(ABC):
    """What is trained, what a batch is conditioned on beside its text, what is kept and written.

    Before anything is written `check`; then `encode`, `inject`, `check_export`, and for each
    batch `keeps_caption`, `inputs`, `predict`; the rest when a checkpoint, a grid or a file is
    made. For a plan `check`, `inject` on tensors without numbers, and `blank` for `inputs`.

    Attributes:
        parts: of the pipeline, which it alone needs: "image_encoder" and the like.
        trains_text: whether text encoders train, so that their outputs are not kept.
        base: the model, from `inject` on.
        trained: component -> module, with "unet" in any case; what of their parameters requires a
            gradient is trained.
    """

    parts: tuple[str, ...] = ()
    trains_text = False

    def __init__(self, config: Config):
        self.config = config
        self.base: models.Base | None = None
        self.trained: dict[str, nn.Module] = {}

    @abstractmethod
    def check(self, index: dict[str, Any], examples: Sequence[Example]) -> None:
        """Raises ValueError for what cannot work: settings, files, images without a condition.

        Args:
            index: the model's model_index.json.
            examples: of the data folder; some may turn out to be no images.
        """

    def encode(
        self, base: models.Base, latents: Sequence[Latent], folder: Path, device: torch.device,
        *, bar: bool,
    ) -> None:  # fmt: skip
        """Cache what it needs of each image in `folder`, and free the parts that made it."""
        return None

    @abstractmethod
    def inject(self, base: models.Base) -> None:
        """Put what trains into the model, ready to train; sets `base` and `trained`.

        Raises:
            ValueError: it does not fit the model.
        """

    def to_bf16(self, module: nn.Module, exact: Iterable[nn.Parameter]) -> None:
        """Bring a module to bfloat16 where the config says so, but for these, to the bit."""
        if bf16(self.config.precision, device_of(self.config.device)):
            exact = [*exact]
            values = [p.detach().clone() for p in exact]
            with models.quiet_libraries():
                module.to(torch.bfloat16)
            for parameter, value in zip(exact, values, strict=True):
                parameter.data = value

    def check_export(self) -> None:
        """Raises ValueError, after `inject`, for what could not be written in the end."""
        return None

    def groups(self) -> list[dict]:
        """The trained parameters, as groups of an optimizer."""
        lr = self.config.optimizer.lr
        return [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}
            for module in self.trained.values()
        ]

    def keeps_caption(self, chance: Tensor) -> Tensor:
        """Which captions stay, [B] bool, for [B] numbers uniform in [0, 1)."""
        return chance >= self.config.caption_dropout

    def inputs(self, latents: Sequence[Latent], chance: Tensor) -> dict[str, Tensor]:
        """What `predict` gets for these images, [B, ...] on the CPU; chance as `keeps_caption`."""
        return {}

    def blank(self, batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Zeros like `inputs` of images of (width, height) pixels."""
        return {}

    def predict(
        self, noisy: Tensor, t: Tensor, context: Tensor, condition: dict[str, Any],
        inputs: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """The UNet's output.

        A CUDA graph may hold it: work of the device alone, and no decision on a value. What of a
        method cannot be so is for `graphed.refusal` to name.

        Args:
            noisy: [B, C, H, W].
            t: [B] int64.
            context: [B, T, width], of the text.
            condition: further arguments of the UNet, as `Base.condition` gives them.
            inputs: of this batch, on noisy's device.
        """
        return self.base.unet(noisy, t, context, **condition).sample

    def after_update(self) -> None:
        """Called when an optimizer's step has reached the weights."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of `trained`, by name: the very tensors, detached."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have as it was, beside the config and the images; JSON types."""
        return {}

    @abstractmethod
    def about(self) -> str:
        """What trains, in a few words, for a plan; after `inject`."""

    @abstractmethod
    def paths(self) -> list[Path]:
        """The files or folders that `export` writes."""

    @abstractmethod
    def export(self, metadata: dict[str, str]) -> list[Path]:
        """Write what was trained; returns `paths`."""

    def draw(self, **options) -> list[Image.Image]:
        """One picture a prompt of config.sample.prompts; the options are those of models.draw."""
        return models.draw(self.base, self.config.sample.prompts, **options)
