"""What an adapter is: factors beside a frozen layer, its scale, its checkpoint keys, its merge.

An adapter takes the place of its layer in the model and keeps it as `base`. Adapters stack: the
base of one may be another. The outermost runs for all of them, so that the frozen product and
every update share one accumulator and one rounding.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lorakern.adapters import layers
from lorakern.adapters.rebuilt import rebuilt

ALGOS: dict[str, type["Adapter"]] = {}
# one set of hooks for an adapter and its layer, so that each fires whichever holds it
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def register(algo: str) -> Callable[[type["Adapter"]], type["Adapter"]]:
    """Enter an adapter class under its name, the one that `inject` takes."""

    def enter(cls: type["Adapter"]) -> type["Adapter"]:
        if algo in ALGOS:
            raise ValueError(f"adapter {algo!r} is already registered")
        cls.algo = algo
        ALGOS[algo] = cls
        return cls

    return enter


class Adapter(nn.Module):
    """A frozen layer with an update: y = layer(x; W + ΔW), in one float32 sum, rounded once.

    A drop-in for the layer: `weight`, `bias`, `in_features` and the like are the layer's, hooks
    are shared with it, and in a state dict its keys keep their names. The factors are `down` and
    `up` beside them, or `<name>.down`, `<name>.up` for an adapter not named "default". A state
    dict that has none of the factors loads and leaves them as they are.

    Args:
        base: the layer, or the adapter around it; the adapter does not copy it.
        name: the adapter's name, without a dot.
        rank: R, at least 1.
        alpha: the update is multiplied by alpha / rank; None is rank. No unit.
        rslora: divide alpha by the root of the rank instead (arXiv:2312.03732).
        dtype: of the factors; float32, or float64 on a float64 layer, when None.

    Raises:
        ValueError: the layer cannot be adapted, or a number is out of range.
    """

    algo: str
    factors: tuple[str, ...] = ()
    kinds: tuple[str, ...] = tuple(layers.KINDS)
    # of siblings that read one input, and of all that read a text; see shared.py, shared_text.py
    _shared = _text = None

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str = "default",
        rank: int = 16,
        alpha: float | None = None,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        root = base.root if isinstance(base, Adapter) else base
        if reason := layers.refusal(root):
            raise ValueError(f"no adapter fits here: {reason}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
        if not name or "." in name:
            raise ValueError(f"an adapter's name is part of checkpoint keys: no dot, got {name!r}")
        dtype = dtype or layers.widest(root.weight.dtype)
        if dtype not in layers.DTYPES:
            raise ValueError(f"the dtype of the factors is a floating one, got {dtype}")
        self.kind = layers.kind_of(root)
        if self.kind not in self.kinds:
            raise ValueError(f"{self.algo} is for {', '.join(self.kinds)}, not {self.kind}")
        self.name, self.rank, self.rslora = name, rank, rslora
        self.base = base
        self.training = base.training
        for hooks in _HOOKS:
            self.__dict__[hooks] = base.__dict__[hooks]
        self._merged = False
        # not a buffer: a dtype move must not round it. Under torch.compile the tensor is an
        # input of the graph, so that a new value recompiles nothing
        self._scale_tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self._multiplier_tensor = self._scale_tensor.clone()
        self._multiplier = 1.0
        self.make_factors(root, dtype)
        self.alpha = rank if alpha is None else alpha

    # what an algorithm writes

    def make_factors(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Create the factors, each with `new_factor`, as a fresh adapter has them."""
        raise NotImplementedError

    def update(
        self, weight: Tensor, f: dict[str, Tensor], scale: float | Tensor,
        multiplier: float | Tensor, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """ΔW in the weight's shape, of these factors; all in the dtype of the sums.

        scale has the multiplier in it. mask: of the rows of ΔW in training, or None.
        """
        raise NotImplementedError

    def short(self, x: Tensor, own: bool = False) -> Tensor | None:
        """The output where it is but one op call; own: no other layer reads this very x."""
        return None

    def delta_output(self, x: Tensor) -> Tensor | None:
        """The update's share of the output, not rounded, where it is made of x; else None."""
        return None

    def skips(self) -> bool:
        """In training: whether this forward goes without the adapter."""
        return False

    def row_mask(self) -> Tensor | None:
        """[O] in training: what the rows of ΔW are multiplied by this time; None for 1."""
        return None

    # factors

    def new_factor(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> None:
        """An uninitialised parameter on the layer's device, entered in `factors`."""
        device = self.root.weight.device
        setattr(self, name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device)))
        self.factors = (*self.factors, name)

    def delta_weight(self) -> Tensor:
        """ΔW in the weight's shape, multiplier included; float32, or float64 on such a layer."""
        weight = self.root.weight
        wide = layers.widest(weight.dtype)
        f = {name: getattr(self, name).to(wide) for name in self.factors}
        return self.update(weight.to(wide), f, self.live_scale(), self.live_multiplier(), None)

    # scale

    @property
    def root(self) -> nn.Module:
        """The plain layer under all adapters."""
        base = self._modules["base"]
        return base.root if isinstance(base, Adapter) else base

    @property
    def scale(self) -> float:
        """multiplier · alpha / rank, or / √rank with rslora."""
        return self._scale

    @property
    def multiplier(self) -> float:
        """The user's strength: 1 is as trained, 0 takes the adapter out of the sum."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._set_scale(_finite("multiplier", value), self._alpha)

    @property
    def alpha(self) -> float:
        """What the rank divides to give the scale; not 0, no unit."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if _finite("alpha", value) == 0:
            raise ValueError("alpha must not be 0; a multiplier of 0 switches an adapter off")
        self._set_scale(self._multiplier, float(value))

    def _set_scale(self, multiplier: float, alpha: float) -> None:
        if self._merged:
            raise ValueError(f"adapter {self.name!r} is merged; unmerge it to change its scale")
        self._multiplier, self._alpha = multiplier, alpha
        self._scale = multiplier * self.strength(alpha)
        self._on = self._scale != 0
        self._scale_tensor.fill_(self._scale)
        self._multiplier_tensor.fill_(multiplier)
        self._look_around()

    def strength(self, alpha: float) -> float:
        """The scale at a multiplier of 1."""
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def _look_around(self) -> None:
        """Note whether this is the one adapter of a Linear and runs; a slim forward asks."""
        plain = not isinstance(self._modules["base"], Adapter)
        self._alone = plain and self.kind == "linear" and self._on and not self._merged

    def rebase(self, base: nn.Module) -> None:
        """Sit on another module of the same stack, as after an adapter between was taken out."""
        self.base = base
        self._look_around()

    def live_scale(self) -> float | Tensor:
        """The scale as ops take it: a number, or under torch.compile a 0-dim tensor."""
        return self._scale_tensor if torch.compiler.is_compiling() else self._scale

    def live_multiplier(self) -> float | Tensor:
        """The multiplier, as `live_scale`."""
        return self._multiplier_tensor if torch.compiler.is_compiling() else self._multiplier

    # forward

    def chain(self) -> list["Adapter"]:
        """This adapter and those under it, outermost first."""
        found, at = [], self
        while isinstance(at, Adapter):
            found.append(at)
            at = at._modules["base"]
        return found

    def forward(self, input: Tensor) -> Tensor:
        cast = torch._C._is_any_autocast_enabled() and layers.autocast_on(input.device.type)
        if not cast and (y := self.short(input)) is not None:
            return y
        root = self.root
        adapters = [] if self._merged else [a for a in self.chain() if a._on and not a.skips()]
        if not adapters:
            return root.forward(input)  # not a call: its hooks are this module's, and have fired
        weight, bias = root.weight, getattr(root, "bias", None)
        if not cast:
            return _run_all(adapters, root, input, weight, bias)
        device = input.device.type
        to = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x, w, b = input, weight, bias
            if self.kind != "embedding":
                # as the layer would have been cast; the sums are not
                x, w, b = (
                    t if t is None or t.dtype == torch.float64 else t.to(to) for t in (x, w, b)
                )
            y = self.short(x, x is not input) if w is weight and b is bias else None
            return _run_all(adapters, root, x, w, b) if y is None else y

    @classmethod
    def fused(
        cls, adapters: list["Adapter"], layer: nn.Module, x: Tensor, weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """One op call for several adapters of this class; None when there is none for them."""
        return None

    # drop-in

    @property
    def _is_full_backward_hook(self) -> bool | None:
        return self.root._is_full_backward_hook

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, value: bool | None) -> None:
        # nn.Module's own __init__ sets it before there is a layer
        if "_modules" in self.__dict__:
            self.root._is_full_backward_hook = value

    def __getattr__(self, name: str):
        own = self.__dict__
        for table in ("_parameters", "_buffers", "_modules"):
            if name in own.get(table, ()):
                return own[table][name]
        if name.startswith("__") or "base" not in own.get("_modules", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        # of the layer only: another adapter's factors and numbers are not this one's
        return getattr(self.root, name)

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias"):
            setattr(self.root, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"{self.name!r}, rank={self.rank}, alpha={self.alpha:g},"
            f" multiplier={self.multiplier:g}{', merged' if self._merged else ''}"
        )

    # checkpoints

    def _own_prefix(self, prefix: str) -> str:
        return prefix if self.name == "default" else f"{prefix}{self.name}."

    def state_dict(self, *, destination=None, prefix="", keep_vars=False):
        """As nn.Module's, with the layer's keys as they were before it was adapted."""
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        base = self._modules["base"]
        base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self._merged and base is self.root:
            # the file is of the frozen weight, or loading it would add the update twice
            destination[prefix + "weight"] = self.frozen_weight
        self._save_to_state_dict(destination, self._own_prefix(prefix), keep_vars)
        return destination

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own, mine, rest = self._own_prefix(prefix), {}, {}
        keys = [k for k in state_dict if k.startswith(prefix)]
        if self._merged:
            error_msgs.append(f"{prefix[:-1]} is merged; unmerge it before loading weights")
            for key in keys:
                del state_dict[key]
            return
        for key in keys:
            found = key.startswith(own) and key[len(own) :] in (*self._parameters, *self._buffers)
            put, cut = (mine, len(own)) if found else (rest, len(prefix))
            put[key[cut:]] = state_dict.pop(key)
        state_dict.update({f"{prefix}base.{k}": v for k, v in rest.items()})
        state_dict.update({prefix + k: v for k, v in mine.items()})
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        if mine:
            missing_keys += missing

    # merge

    @property
    def merged(self) -> bool:
        """Whether the layer's weight holds the update now."""
        return self._merged

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + Σ ΔW of the chain, summed in float32; the frozen weight is kept beside it.

        Called on the outermost adapter; nothing happens when it is merged already.
        """
        if self._merged:
            return
        chain, weight = self.chain(), self.root.weight
        total = weight.to(layers.widest(weight.dtype), copy=True)
        with layers.full_precision(weight.device.type):
            for adapter in chain:
                if adapter._on:
                    total += adapter.delta_weight()
        chain[-1].register_buffer("frozen_weight", weight.detach().clone(), persistent=False)
        weight.copy_(total)
        self._mark_merged(True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The frozen weight back, bit for bit; nothing happens when it is not merged."""
        if not self._merged:
            return
        innermost = self.chain()[-1]
        self.root.weight.copy_(innermost.frozen_weight)
        del innermost.frozen_weight
        self._mark_merged(False)

    def _mark_merged(self, merged: bool) -> None:
        for adapter in self.chain():
            adapter._merged = merged
            adapter._look_around()


def _run_all(
    adapters: list[Adapter], layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    first = type(adapters[0])
    if all(type(a) is first for a in adapters):
        y = first.fused(adapters, layer, x, weight, bias)
        if y is not None:
            return y
    if x.is_floating_point() and x.dtype != weight.dtype:
        raise ValueError(f"mixed dtypes: x is {x.dtype}, the layer's weight {weight.dtype}")
    wide = layers.widest(weight.dtype)
    x_wide = x.to(wide) if x.is_floating_point() else x
    outputs = [a.delta_output(x_wide) for a in adapters]
    if x.is_floating_point():
        rest = [a for a, y in zip(adapters, outputs, strict=True) if y is None]
        y = rebuilt(rest, layer, x, weight, bias)
    else:
        # indices: only the rows that are looked up are widened
        y = layers.run(layer, x, weight, None).to(wide)
    for output in outputs:
        y = y if output is None else y + output
    return y.to(weight.dtype)


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)
