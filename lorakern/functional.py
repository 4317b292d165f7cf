"""Registry of ops: one import a line. Each is a function of tensors, documented where it lives."""

from lorakern.ops.decoupled_attention.op import decoupled_attention
from lorakern.ops.lora_conv2d.op import lora_conv2d
from lorakern.ops.lora_linear.op import lora_linear

__all__ = ["decoupled_attention", "lora_conv2d", "lora_linear"]
