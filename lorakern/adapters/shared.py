"""LoRAs of sibling layers that read one input, as q, k and v do: one op call for all of them.

`link` knows siblings by their names. When the first of a group is called, the outputs of all are
computed, and those of the others are kept for the calls to come; each is given out once, and only
if that call would compute the same: on this very tensor, with nothing changed since. Every other
call is the layer's own.
"""

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakern.adapters.base import ALGOS, Adapter
from lorakern.ops.lora_linear_shared.native import native

# diffusers, transformers, Llama's own code; in the order of the calls
SIBLINGS = (
    ("to_q", "to_k", "to_v"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# on a GPU, where a product of so many rows is worth its launches: text of 13 images
FEW_ROWS = 1024
_latest = threading.local()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def link(parent: nn.Module) -> None:
    """Make a group of each set of adapted siblings under this module that may share an input.

    A query is left out where its input is another's: cross-attention, or other in_features.
    """
    for names in SIBLINGS:
        found = {n: m for n in names if isinstance(m := parent._modules.get(n), Adapter)}
        able = {n: m for n, m in found.items() if may_share(m)}
        if getattr(parent, "is_cross_attention", False):
            able = {n: m for n, m in able.items() if n not in ("to_q", "q_proj")}
        widths = [m.in_features for m in able.values()]
        members = [m for m in able.values() if m.in_features == widths[-1]]
        group = SharedInput(members) if len(members) > 1 else None
        for adapter in found.values():
            adapter._shared = group if adapter in members else None


def wins(x: Tensor, members: Sequence[Adapter]) -> bool:
    """Whether one call is faster than one a layer.

    On a CPU, as measured: what it saves is the gradients of x that would be added up. It pays where
    enough rows meet the weights, packed in the type of the sums, and these fit in one pass
    (kGroupBytes of csrc). On a GPU, by count: what it saves is launches, which are the time of a
    layer that meets few rows; of the gradients its kernel makes those of the factors alone.
    """
    dx = x.requires_grad and torch.is_grad_enabled()
    if not x.is_cpu:
        return not dx and x.numel() <= FEW_ROWS * x.shape[-1]
    if not (dx and x.numel() >= 256 * x.shape[-1]):
        return False
    size = sum(m.root.weight.numel() for m in members)
    return size * (8 if x.dtype is torch.float64 else 4) <= 2**24


class SharedInput:
    """A group of adapters; its first member computes for all. Copies link the copied members."""

    def __init__(self, members: Sequence[Adapter]):
        # weak: a member holds its group, and a model is freed when its last name goes
        self._members = [weakref.ref(m) for m in members]
        self._kept: Kept | None = None

    def __getstate__(self) -> list[Adapter | None]:
        return [m() for m in self._members]

    def __setstate__(self, members: list[Adapter | None]) -> None:
        self.__init__([m for m in members if m is not None])

    def output(self, member: Adapter, x: Tensor) -> Tensor | None:
        """The member's output on x; None when it has to compute it alone."""
        if torch.compiler.is_compiling():
            return None
        # one read: threads share a group
        kept = self._kept
        if kept is not None and kept.has(member):
            y = kept.take(member, x)
            if y is None:
                self._missed(kept)
            elif not kept.outputs:
                self._kept = None
            return y
        if kept is not None and self._is_first(member):
            self._missed(kept)
        return self._compute(x) if self._is_first(member) else None

    def _is_first(self, member: Adapter) -> bool:
        return len(self._members) > 1 and self._members[0]() is member

    def _missed(self, kept: "Kept") -> None:
        """Forget what was kept. The first member does not read what the others do, so it leaves.

        Not while hooks wait for saved tensors: checkpointing counts those of its second forward.
        """
        self._kept = None
        if not (kept.hooked or hooked()):
            self._members = self._members[1:]

    def _compute(self, x: Tensor) -> Tensor | None:
        members = [m() for m in self._members]
        if None in members or (made := together(x, members)) is None:
            return None
        (first, *ys), tensors = made
        self._kept = Kept(x, members[1:], ys, tensors[1:])
        # at most one group of a thread has outputs that wait
        last, _latest.group = getattr(_latest, "group", None), weakref.ref(self)
        other = last() if last is not None else None
        if other not in (None, self) and (kept := other._kept) is not None:
            other._missed(kept)
        return first


def together(x: Tensor, members: list[Adapter]) -> tuple[list[Tensor], list[tuple]] | None:
    """The members' outputs on x by one call, and the tensors of each.

    None where calls of their own would give others, or be faster.
    """
    if not wins(x, members):
        return None
    if not (_plain(x) and (run := native(x)) and all(_ready(m, x) for m in members)):
        return None
    tensors = [_tensors(m) for m in members]
    weights, biases, downs, ups = map(list, zip(*tensors, strict=True))
    if any(t.is_inference() for t in (*weights, *downs, *ups)):
        return None
    factors = {f.dtype for f in (*downs, *ups)}
    # a GPU's kernel reads float32 ones as they are
    if factors != {x.dtype} and (x.is_cpu or factors != {torch.float32}):
        downs, ups = ([f.to(x.dtype) for f in some] for some in (downs, ups))
    # what the public function would ask, _ready asked, and the kernel asks for shapes
    ys = run(x.contiguous(), weights, biases, downs, ups, [m.scale for m in members])
    return ys, tensors


class Kept:
    """Outputs that wait for their calls, and what they were computed of."""

    def __init__(self, x: Tensor, members: list[Adapter], ys: list[Tensor], tensors: list[tuple]):
        # weak: x is not kept longer than by its other users
        self.x, self.of_x, self.hooked = weakref.ref(x), _state([x]), hooked()
        self.grad = torch.is_grad_enabled()
        # the tensors too, so that no other takes the place of one
        each = zip(members, ys, tensors, strict=True)
        self.outputs = {id(m): (y, m.scale, some, _state(some)) for m, y, some in each}

    def has(self, member: Adapter) -> bool:
        return id(member) in self.outputs

    def take(self, member: Adapter, x: Tensor) -> Tensor | None:
        """The member's output, which is then no longer kept; None if a call would give another."""
        y, scale, _, state = self.outputs.pop(id(member), (None,) * 4)
        same = (
            self.x() is x
            and self.of_x == _state([x])
            and self.grad == torch.is_grad_enabled()
            and scale == member.scale
            and state == _state(_tensors(member))
        )
        return y if same else None


def may_share(adapter: Adapter) -> bool:
    alone = not isinstance(adapter._modules["base"], Adapter)
    if type(adapter) is not ALGOS["lora"] or adapter.kind != "linear":
        return False
    return alone and not adapter.recompute


def _plain(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_inference() and not torch.jit.is_tracing()


def _ready(member: Adapter, x: Tensor) -> bool:
    """Whether the member's forward on x would be nothing but one call of lora_linear."""
    if not member._alone or (member.dropout and member.training):
        return False
    if any(member.__dict__[hooks] for hooks in _HOOKS):
        return False
    weight, bias, down, up = _tensors(member)
    here = weight, down, up, *(() if bias is None else (bias,))
    if not all(t.is_cpu for t in here) if x.is_cpu else any(t.device != x.device for t in here):
        return False
    return (
        weight.dtype is x.dtype
        and x.shape[-1:] == weight.shape[1:]
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def _tensors(member: Adapter) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    own, layer = member._parameters, member._modules["base"]._parameters
    return layer["weight"], layer["bias"], own["down"], own["up"]


def _state(tensors: Sequence[Tensor | None]) -> list:
    """What tells a tensor from another, and from itself before a change."""
    return [
        None if t is None else (id(t), t._version, t.data_ptr(), t.requires_grad) for t in tensors
    ]


def hooked() -> bool:
    """Whether saved tensors go through hooks, as under checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
