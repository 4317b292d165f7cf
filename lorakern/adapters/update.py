"""What adapters share that are an update of named factors: ΔW = scale·f(factors), and its options.

One op makes the output of a Linear; everything else runs on W + ΔW in float32 (rebuilt.py).
"""

import torch
from torch import Tensor, nn

from lorakern.adapters import layers, masks
from lorakern.adapters.base import Adapter
from lorakern.adapters.dora import Dora


class Update(Adapter):
    """An adapter given by ΔW of its factors.

    Args:
        base, name, rank, alpha, rslora, dtype: as Adapter's.
        dora: train a magnitude of each row or column of W + ΔW too; `magnitude` [O] or
            [I / groups] is a further factor, at first the norm of W.
        wd_on_output: a magnitude for each output, else for each input.
        detach_norm: the norm is a constant in backward, as in PEFT; LyCORIS goes through it.
        norm_eps: added to the norm; LyCORIS has 1.2e-7, PEFT 0.
        use_scalar: ΔW is multiplied by a trained `scalar`, at first 0; no other factor is then 0.
        rank_dropout: probability in training that a row of ΔW is 0, as in LyCORIS and PEFT.
        rank_dropout_scale: the rows that are kept are divided by their share.
        module_dropout: probability in training that a forward goes without the adapter. Under
            torch.compile it breaks the graph.

    Raises:
        ValueError: as Adapter's; dora on an embedding; norm_eps or a probability out of range.
    """

    # the factor that a scalar is multiplied into
    scaled: str

    def __init__(
        self,
        base: nn.Module,
        *,
        dora: bool = False,
        wd_on_output: bool = True,
        detach_norm: bool = True,
        norm_eps: float = 0.0,
        use_scalar: bool = False,
        rank_dropout: float = 0.0,
        rank_dropout_scale: bool = False,
        module_dropout: float = 0.0,
        **options,
    ):
        if norm_eps < 0:
            raise ValueError(f"norm_eps must not be below 0, got {norm_eps!r}")
        self.dora = Dora(wd_on_output, detach_norm, norm_eps) if dora else None
        for what, p in (("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
            if not 0 <= p < 1:
                raise ValueError(f"{what} is a probability from 0 to below 1, got {p!r}")
        self.rank_dropout, self.rank_dropout_scale = rank_dropout, rank_dropout_scale
        self.use_scalar, self.module_dropout = use_scalar, module_dropout
        super().__init__(base, **options)
        if dora and self.kind == "embedding":
            raise ValueError("dora is for linear, conv2d: no source defines it on an embedding")
        root = self.root
        dtype = getattr(self, self.factors[0]).dtype
        if use_scalar:
            self.new_factor("scalar", (), dtype)
            nn.init.zeros_(self.scalar)
        if dora:
            norm = self.dora.norm(root.weight.detach().to(layers.widest(root.weight.dtype)))
            self.new_factor("magnitude", norm.shape, dtype)
            with torch.no_grad():
                self.magnitude.copy_(norm)
        # it was called before these were there
        self._look_around()

    # what an algorithm writes

    def delta(self, f: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        """scale·f(factors) in any shape of the weight's number of entries."""
        raise NotImplementedError

    def row_terms(self, w: Tensor, f: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """⟨w, dW⟩ and ‖dW‖² of each row of w [O, ...], dW the update at scale 1."""
        raise NotImplementedError

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, f: dict[str, Tensor],
        scale: float | Tensor, gain: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The fused op of a Linear."""
        raise NotImplementedError

    # the rest

    def skips(self) -> bool:
        p = self.module_dropout
        # from the CPU's generator: checkpointing restores its state
        return bool(p) and self.training and bool(torch.rand((), device="cpu") < p)

    def drops_rows(self) -> bool:
        """Whether rank_dropout acts on the rows of ΔW now."""
        return self.training and self.rank_dropout > 0

    def row_mask(self) -> Tensor | None:
        if not self.drops_rows():
            return None
        weight, p = self.root.weight, self.rank_dropout
        return masks.rows(len(weight), p, self.rank_dropout_scale, weight.device)

    def norm(self) -> Tensor:
        """‖ΔW‖ at a multiplier of 1, without DoRA's magnitude, in the dtype of the sums."""
        f = self.folded(layers.widest(self.root.weight.dtype))
        return self.delta(f, self.strength(self.alpha)).norm()

    def exported(self) -> tuple[dict[str, Tensor], int, float]:
        """Factors without scalar, for a file; the rank and alpha that give them the same scale."""
        f = self.fold({name: getattr(self, name).detach() for name in self.factors})
        f.pop("scalar", None)
        return f, self.rank, self.alpha

    def update(self, weight, f, scale, multiplier, mask) -> Tensor:
        delta = self.delta(self.fold(f), scale).reshape(weight.shape)
        if mask is not None:
            delta = mask.view(-1, *(1 for _ in weight.shape[1:])) * delta
        if self.dora is None:
            return delta
        return self.dora.update(weight, delta, f["magnitude"], multiplier)

    def fold(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors with the scalar in one of them."""
        return {**f, self.scaled: f["scalar"] * f[self.scaled]} if "scalar" in f else f

    def folded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The factors of ΔW in a dtype, rounded to it once."""
        f = self.fold({name: getattr(self, name) for name in self.factors})
        return {n: t.to(dtype) for n, t in f.items() if n not in ("scalar", "magnitude")}

    def gain(self) -> Tensor | None:
        """[O] of DoRA in the dtype of the sums; None for 1."""
        if self.dora is None:
            return None
        weight = self.root.weight
        wide = layers.widest(weight.dtype)
        return self.dora.row_gain(
            weight,
            [
                getattr(self, name)
                for name in (*self.factors, *self._buffers)
                if name != "magnitude"
            ],
            lambda w: self.row_terms(w, self.folded(wide)),
            self.live_scale(),
            self.magnitude,
            self.live_multiplier(),
        )

    @classmethod
    def fused(cls, adapters, layer, x, weight, bias):
        first = adapters[0]
        by_input = first.dora is not None and not first.dora.on_output
        if len(adapters) > 1 or by_input or first.drops_rows() or not layers.is_product(layer):
            return None
        rows = layers.pixels_last(layer, x)
        f, weight = first.folded(x.dtype), weight.flatten(1)
        y = first.linear(rows, weight, bias, f, first.live_scale(), first.gain())
        return layers.pixels_first(layer, y, x)
