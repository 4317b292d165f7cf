"""DoRA: LoRA with a magnitude of each row of W + ΔW. Liu et al. 2024, arXiv:2402.09353."""

from torch import nn

from lorakern.adapters.base import register
from lorakern.adapters.lora import Lora


@register("dora")
class DoraLora(Lora):
    """A LoRA with `dora=True`; its arguments and errors are Lora's."""

    kinds = ("linear", "conv2d")

    def __init__(self, base: nn.Module, **options):
        super().__init__(base, **{"dora": True, **options})
