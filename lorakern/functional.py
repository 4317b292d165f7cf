"""Registry of ops: one import a line. Each is a function of tensors, documented where it lives."""

from lorakern.ops.decoupled_attention.op import decoupled_attention
from lorakern.ops.frozen_linear.op import frozen_linear
from lorakern.ops.hada_delta.op import hada_delta
from lorakern.ops.hada_linear.op import hada_linear
from lorakern.ops.kron_delta.op import kron_delta
from lorakern.ops.kron_linear.op import kron_linear
from lorakern.ops.lora_conv2d.op import lora_conv2d
from lorakern.ops.lora_delta.op import lora_delta
from lorakern.ops.lora_linear.op import lora_linear
from lorakern.ops.lora_linear_shared.op import lora_linear_shared

__all__ = [
    "decoupled_attention",
    "frozen_linear",
    "hada_delta",
    "hada_linear",
    "kron_delta",
    "kron_linear",
    "lora_conv2d",
    "lora_delta",
    "lora_linear",
    "lora_linear_shared",
]
