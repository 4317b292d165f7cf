"""Adapter factors and their gradients in flat buffers, so that a step over all is a few calls.

Some hundred small factors cost an optimizer, a norm and a clip a call each; their arithmetic is
little beside that. Here the factors are views of one buffer, and so are their gradients.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lorakern.adapters import layers
from lorakern.average import Average

# elements; a factor begins where a tensor of its own could, and a norm is summed row by row:
# float32 over all 42 million factors of an SDXL in one row is 0.2 % off
ALIGN, ROW = 16, 1024

# torch's step without its hooks, which FlatAdamW's own has run
_torch_step = inspect.unwrap(torch.optim.AdamW.step)


def _kernels(device: str) -> tuple[Callable, Callable] | None:
    """Norm and step of the compiled extension for a kind of device, if it has them."""
    names = f"arena_norm_{device}", f"arena_step_{device}"
    if all(hasattr(torch.ops.lorakern_native, name) for name in names):
        return tuple(getattr(torch.ops.lorakern_native, name).default for name in names)
    return None


def gathers(device: torch.device) -> bool:
    """Whether float32 factors there are stepped over a flat gradient, not where theirs lie."""
    return device.type != "cpu" or _kernels("cpu") is None


class _Flat:
    """Factors of one group, device and dtype: the buffer and, when asked for, its gradient."""

    def __init__(self, factors: list[nn.Parameter]):
        self.factors, self.starts, end = factors, [], 0
        for factor in factors:
            self.starts.append(end)
            end += _up(factor.numel(), ALIGN)
        buffer = factors[0].new_zeros(_up(end, ROW))
        # a learning rate, where kernels of CUDA read it
        self.lr, self.lr_there = math.nan, None
        self.parameter, self.values = nn.Parameter(buffer), self._places(buffer)
        self.addresses = [value.data_ptr() for value in self.values]
        for factor, value in zip(factors, self.values, strict=True):
            _take(factor, value)

    def _places(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + factor.numel()].view(factor.shape)
            for factor, start in zip(self.factors, self.starts, strict=True)
        ]

    @cached_property
    def grad(self) -> Tensor:
        return torch.zeros_like(self.parameter, requires_grad=False)

    @cached_property
    def slots(self) -> list[Tensor]:
        """The factors' places in the gradient."""
        return self._places(self.grad)

    @cached_property
    def gaps(self) -> list[Tensor]:
        """What of the gradient lies between and behind them."""
        ends = [start + f.numel() for f, start in zip(self.factors, self.starts, strict=True)]
        nexts = [*self.starts[1:], self.grad.numel()]
        return [self.grad[end:then] for end, then in zip(ends, nexts, strict=True) if end < then]

    def grads(self) -> list[Tensor | None]:
        """The factors' gradients, after a look at whether the factors are where they belong."""
        found = []
        for factor, value, at in zip(self.factors, self.values, self.addresses, strict=True):
            if factor.data_ptr() != at:
                _take(factor, value)
            grad = factor.grad
            if grad is None and not factor.requires_grad:
                raise ValueError(
                    f"a factor of shape {tuple(factor.shape)} was frozen; make a new optimizer"
                )
            found.append(grad)
        return found

    def gather(self) -> None:
        grads = self.grads()
        if all(grad is None for grad in grads):
            self.parameter.grad = None
            return
        # what scaled a gradient that is not finite was not finite
        if self.gaps:
            torch._foreach_zero_(self.gaps)
        new = []
        for factor, slot, grad in zip(self.factors, self.slots, grads, strict=True):
            if grad is None:
                slot.zero_()
            elif grad is not slot:
                new.append((factor, slot, grad))
        if new:
            factors, slots, grads = zip(*new, strict=True)
            torch._foreach_copy_(slots, grads)
            for factor, slot in zip(factors, slots, strict=True):
                factor.grad = slot
        self.parameter.grad = self.grad

    def attach(self) -> None:
        if all(grad is None for grad in self.grads()):
            self.grad.zero_()
        else:
            self.gather()
        for factor, slot in zip(self.factors, self.slots, strict=True):
            factor.grad = slot

    def rate(self, lr: float | Tensor) -> Tensor:
        """A learning rate on the device; a number is written there only when it is another."""
        if isinstance(lr, Tensor):
            return lr.to(self.parameter)
        if self.lr_there is None:
            self.lr_there = torch.empty((), dtype=torch.float32, device=self.parameter.device)
        if lr != self.lr:
            self.lr_there.fill_(lr)
            self.lr = lr
        return self.lr_there

    def clear(self) -> None:
        self.parameter.grad = None
        for factor in self.factors:
            factor.grad = None


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _take(factor: nn.Parameter, value: Tensor) -> None:
    """Move a factor into its place, at first or when it is back from a move of its module."""
    if factor.dtype != value.dtype or factor.device != value.device:
        raise ValueError(
            f"a factor was in {value.dtype} on {value.device}, and is in {factor.dtype} on"
            f" {factor.device} now; make a new optimizer"
        )
    value.copy_(factor.detach())
    factor.data = value


class FlatAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, fused, over one flat parameter a group, device and dtype.

    The factors given become views of the flat parameters; to modules, state dicts and copies they
    are what they were. Autograd makes their gradients as ever. In any loop:

        optimizer = lorakern.FlatAdamW(parameter_groups(unet, lr=1e-4))
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    Where the extension was built, a step over float32 is one pass that clips, updates and averages:
    on a CPU over the gradients where they lie, on CUDA over flat ones, with neither a wait for the
    device nor a launch that depends on a value, so that a CUDA graph may hold it. Its learning rate
    is then a CUDA tensor in the group, which a schedule fills. Else, and with amsgrad, maximize,
    fused=False or a GradScaler, it is torch's own passes over flat gradients.

    A factor without a gradient is stepped with zeros, unless no factor of its flat parameter has
    one. Before a GradScaler's `unscale_` call `gather`.

    Args:
        params: as torch.optim.AdamW's, without names; what does not require a gradient now is
            left out.
        lr, options: as torch.optim.AdamW's; `fused` is True when not given.
        zero: whether a step leaves zeros in the gradients, for a backward that adds to them.

    Attributes:
        average: an `Average` over `flats` that each step updates, or None.
        skipped: of the last step, 1 where the norm that `clip` gave was not finite and weights,
            moments and averages were left as they were, else 0: a scalar on the norm's device.

    Raises:
        ValueError: nothing trains, or a parameter is given twice. Later, from `gather`, `clip` and
            `step`: a factor was frozen, or its device or dtype changed. From `step`: a closure.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, *, zero: bool = False, **options):
        self._flats: list[_Flat] = []
        self._clip: tuple[Tensor, float] | None = None
        self.average: Average | None = None
        self.zero, self.skipped = zero, None
        super().__init__(params, lr, **{"fused": True, **options})
        if not self._flats:
            raise ValueError("no parameter requires a gradient")

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if not all(isinstance(p, nn.Parameter) for p in given):
            raise ValueError("want parameters, or groups of them, without names")
        taken = {id(f) for flat in self._flats for f in flat.factors}
        if len({id(p) for p in given} - taken) < len(given):
            raise ValueError("some parameters are given more than once")
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in given:
            if p.requires_grad:
                kinds.setdefault((p.device, p.dtype), []).append(p)
        flats = [_Flat(factors) for factors in kinds.values()]
        self._flats += flats
        super().add_param_group({**param_group, "params": [flat.parameter for flat in flats]})

    @property
    def flats(self) -> list[nn.Parameter]:
        """The flat parameters."""
        return [flat.parameter for flat in self._flats]

    @torch.no_grad()
    def gather(self) -> None:
        """Copy new gradients into flat ones, and make each a view; nothing happens to those there.

        `flats` then have their gradients as `.grad`, until `zero_grad`.
        """
        for flat in self._flats:
            flat.gather()

    @torch.no_grad()
    def attach(self) -> None:
        """Give every factor its place in a flat gradient as its own, where backward then adds.

        The place is the same each time, as a CUDA graph wants it. A gradient that is there moves
        in, the others become zeros.
        """
        for flat in self._flats:
            flat.attach()

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """Have the next step scale the gradients down to a norm of `largest`, inf for not at all.

        That step also leaves everything as it is if the norm is not finite; see `skipped`.

        Returns:
            The norm, a scalar: the root of the sum of all squares, no unit.
        """
        if kernels := self._native():
            grads = [grad for flat in self._flats for grad in self._read(flat) if grad is not None]
        else:
            self.gather()
            grads = [flat.grad for flat in self._flats if flat.parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        norm = kernels[0](grads) if kernels else _norm(grads)
        self._clip = norm, min(largest, self._clip[1] if self._clip else math.inf)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; new ones are then not added to old but take their place."""
        self._clip = None
        for flat in self._flats:
            flat.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the factors.

        Raises:
            ValueError: a closure, which would make gradients after they were clipped; or a factor
                was frozen or moved, see above.
        """
        if closure is not None:
            raise ValueError("step takes no closure here; call it after backward")
        (norm, largest), self._clip = self._clip or (None, math.inf), None
        if kernels := self._native():
            (self._step_cuda if self._on_cuda() else self._step_cpu)(kernels[1], norm, largest)
        else:
            self._step_torch(norm, largest)
        for flat in self._flats:
            increment_version(flat.factors)

    def _native(self) -> tuple[Callable, Callable] | None:
        """The kernels that run, or None where torch's own passes do."""
        device = self._flats[0].parameter.device
        alike = all((p.dtype, p.device) == (torch.float32, device) for p in self.flats)
        plain = all(g["fused"] and not (g["amsgrad"] or g["maximize"]) for g in self.param_groups)
        # of a GradScaler
        scaled = any(getattr(self, n, None) is not None for n in ("grad_scale", "found_inf"))
        return _kernels(device.type) if alike and plain and not scaled else None

    def _on_cuda(self) -> bool:
        return self._flats[0].parameter.is_cuda

    def _read(self, flat: _Flat) -> list[Tensor | None]:
        """The gradients that the kernels read: the factors' own, or the flat one."""
        if not self._on_cuda():
            return flat.grads()
        flat.gather()
        return [flat.parameter.grad]

    def _parts(self) -> Iterator[tuple[_Flat, list[Tensor | None], dict, dict, Tensor | None]]:
        """What steps: a flat parameter, what is read of its gradient, its group, state, average."""
        groups = (group for group in self.param_groups for _ in group["params"])
        for i, (flat, group) in enumerate(zip(self._flats, groups, strict=True)):
            grads = self._read(flat)
            if any(grad is not None for grad in grads):
                average = self.average.values[i] if self.average else None
                yield flat, grads, group, self._state(flat.parameter), average

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
        return state

    def _step_cpu(self, kernel: Callable, norm: Tensor | None, largest: float) -> None:
        memory = self.average.memory if self.average else 0.0
        for flat, grads, group, state, average in self._parts():
            self.skipped = kernel(
                flat.parameter, flat.values, grads, state["exp_avg"], state["exp_avg_sq"], average,
                state["step"], float(group["lr"]), *_hyper(group), norm, largest, memory, self.zero,
            )  # fmt: skip

    def _step_cuda(self, kernel: Callable, norm: Tensor | None, largest: float) -> None:
        memory = self.average.memory if self.average else 0.0
        if parts := list(self._parts()):
            flats, grads, groups, states, averages = zip(*parts, strict=True)
            self.skipped = kernel(
                [flat.parameter for flat in flats], [grad for (grad,) in grads],
                *[[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")],
                list(averages) if self.average else [],
                [flat.rate(group["lr"]) for flat, group in zip(flats, groups, strict=True)],
                [number for group in groups for number in _hyper(group)],
                norm, largest, memory, self.zero,
            )  # fmt: skip

    def _step_torch(self, norm: Tensor | None, largest: float) -> None:
        self.gather()
        stepped = [i for i, p in enumerate(self.flats) if p.grad is not None]
        if not stepped:
            return
        if norm is None:
            norm = torch.zeros((), device=self.flats[0].device)
        # a GPU is not waited for to spare it the product with 1
        elif math.isfinite(largest) and not (norm.is_cpu and norm + 1e-6 <= largest):
            nn.utils.clip_grads_with_norm_(self.flats, largest, norm)
        self.skipped = 1 - norm.isfinite().float()
        if all(group["fused"] for group in self.param_groups):
            scaler_s = getattr(self, "found_inf", None)
            if scaler_s is not None:
                self.skipped = torch.maximum(self.skipped, scaler_s.to(self.skipped))
            self.found_inf = self.skipped
            _torch_step(self)
            self.found_inf = scaler_s
        elif not self.skipped:
            _torch_step(self)
        for i in stepped if self.average else ():
            self.average.follow(i, self.state[self.flats[i]]["step"], 1 - self.skipped)
        if self.zero:
            torch._foreach_zero_([self._flats[i].grad for i in stepped])


def _hyper(group: dict) -> tuple[float, float, float, float]:
    beta1, beta2 = map(float, group["betas"])
    return float(group["weight_decay"]), beta1, beta2, float(group["eps"])


def _norm(grads: list[Tensor]) -> Tensor:
    """Of flat gradients."""
    rows = [
        torch.linalg.vector_norm(g.view(-1, ROW), dim=1, dtype=layers.widest(g.dtype))
        for g in grads
    ]
    return torch.linalg.vector_norm(torch.cat([r.to(rows[0]) for r in rows]))
