"""DoRA: W' = gain ∘ V, V = W + ΔW, gain = 1 + m·(magnitude / ‖V‖ - 1), m the multiplier.

Liu et al. 2024, arXiv:2402.09353: a norm a row. LyCORIS has a norm a column of input as well, and
the rule for m. At m = 0 ΔW is 0 too, and W' is W.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorakern.adapters import layers

# steps of any optimizer: torch's fused ones do not count up the version of what they change
_steps = 0


def _count(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


class Dora:
    """The settings of one adapter, and its norm until a factor, the weight or the scale changes.

    Args:
        on_output: a norm for each output, else for each input (a convolution's of one group).
        detach: the norm is a constant in backward (the paper, PEFT); else it is not (LyCORIS).
        eps: added to the norm; LyCORIS adds the dtype's epsilon. In the weight's unit.
    """

    def __init__(self, on_output: bool = True, detach: bool = True, eps: float = 0.0):
        self.on_output, self.detach, self.eps = on_output, detach, eps
        self._squares, self._norm = _Kept(), _Kept()

    def norm(self, v: Tensor) -> Tensor:
        """[O] or, by input, [I / groups] of a whole weight; of W it is a new magnitude."""
        axis = 0 if self.on_output else 1
        return v.square().sum([d for d in range(v.dim()) if d != axis]).sqrt()

    def update(
        self, weight: Tensor, delta: Tensor, magnitude: Tensor, multiplier: float | Tensor
    ) -> Tensor:
        """W' - W in the weight's shape; all in the dtype of the sums."""
        v = weight + delta
        divisor = self._divisor(self.norm(v.detach() if self.detach else v))
        more = multiplier * (magnitude / divisor - 1)
        shape = [-1] + [1] * (v.dim() - 1) if self.on_output else [-1] + [1] * (v.dim() - 2)
        return more.view(shape) * v + delta

    def row_gain(
        self,
        weight: Tensor,
        factors: list[Tensor],
        terms: Callable[[Tensor], tuple[Tensor, Tensor]],
        scale: float | Tensor,
        magnitude: Tensor,
        multiplier: float | Tensor,
    ) -> Tensor:
        """gain [O] in the dtype of the sums, without making ΔW.

        Args:
            weight: [O, ...], as it is stored.
            factors: what `terms` is made of; when they change, the norm does.
            terms: of W in the dtype of the sums, ⟨W, dW⟩ and ‖dW‖² by row, ΔW = scale·dW.
        """
        wide = layers.widest(weight.dtype)

        def divisor() -> Tensor:
            w = weight.to(wide).flatten(1)
            squares = self._squares.of([weight], None, lambda: w.square().sum(1))
            cross, square = terms(w)
            # a row may cancel to 0, and its square to a little less
            square = squares + 2 * scale * cross + scale * scale * square
            return self._divisor(square.clamp_min(0).sqrt())

        if self.detach:
            with torch.no_grad():
                made = self._norm.of([weight, *factors], scale, divisor)
        else:
            made = divisor()
        ratio = magnitude.to(wide) / made
        if not isinstance(multiplier, Tensor) and multiplier == 1:
            # three operations less, and nothing is lost of a small ratio
            return ratio
        return 1 + multiplier * (ratio - 1)

    def _divisor(self, norm: Tensor) -> Tensor:
        # a row of zeros has no direction for a magnitude to scale
        return torch.where(norm > 0, norm + self.eps, torch.inf)


class _Kept:
    """A tensor until one of those that it was made of changes. Not copied, pickled or compiled.

    In a CUDA graph, what is made of what trains is made anew, and nothing is kept of its memory.
    """

    def __init__(self):
        self._entry = None

    def __reduce__(self):
        return _Kept, ()

    def __deepcopy__(self, memo):
        return _Kept()

    def of(self, sources: list[Tensor], number, make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave when the sources and the number were the same."""
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return make()
        trains, recorded = any(t.requires_grad for t in sources), layers.recorded(sources[0])
        steps = trains and _steps
        now = number, steps, [(t._version, t.data_ptr(), t.dtype, t.device) for t in sources]
        # one read: threads of DataParallel share it
        entry = self._entry
        known = entry is not None and entry[0] == now and _same(entry[1], sources)
        if known and not (trains and recorded):
            return entry[2]
        made = make()
        if not recorded:
            self._entry = now, [weakref.ref(t) for t in sources], made
        return made


def _same(references: list, sources: list[Tensor]) -> bool:
    return all(r() is t for r, t in zip(references, sources, strict=True))
