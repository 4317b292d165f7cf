"""LoRAs of all keys and values that a UNet makes of one text: on a GPU one op call for them all.

`link_text` knows them by the module tree: to_k and to_v of each cross-attention, of the same
in_features. The first that is called in a pass computes for all, and the outputs of the others are
kept as for siblings (shared.py): M rows of all their out_features. A CPU has no use for it: there a
product of text is worth its call, and the siblings of one attention are a group.
"""

import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lorakern.adapters.base import Adapter
from lorakern.adapters.shared import Kept, hooked, may_share, together

# passes in a row that left outputs behind, after which the layers run alone
_MOST_MISSES = 2


def link_text(model: nn.Module) -> None:
    """Make a group of the adapted keys and values of all cross-attentions in this module."""
    found: dict[int, list[Adapter]] = {}
    for attention in model.modules():
        if not getattr(attention, "is_cross_attention", False):
            continue
        for layer in map(attention._modules.get, ("to_k", "to_v")):
            if isinstance(layer, Adapter):
                layer._text = None
                if may_share(layer):
                    found.setdefault(layer.in_features, []).append(layer)
    for members in found.values():
        group = SharedText(members) if len(members) > 1 else None
        for layer in members:
            layer._text = group


class SharedText:
    """A group of adapters, whichever is called first. A copy's members join it when called."""

    def __init__(self, members: Iterable[Adapter] = ()):
        # weak, as a member holds its group
        self._members = {id(m): weakref.ref(m) for m in members}
        self._kept: Kept | None = None
        self._misses = 0

    def __reduce__(self):
        # one member's copy is not to copy all the others
        return SharedText, ()

    def output(self, member: Adapter, x: Tensor) -> Tensor | None:
        """The member's output on x; None when it has to compute it alone.

        So it is where hooks wait for saved tensors: checkpointing runs parts of the model again,
        and what a part saves must be made in it.
        """
        if torch.compiler.is_compiling() or hooked() or self._misses >= _MOST_MISSES:
            return None
        ref = self._members.get(id(member))
        if ref is None or ref() is not member:
            self._members[id(member)] = weakref.ref(member)
            return None
        # one read: threads share a group
        kept = self._kept
        if kept is None:
            return self._compute(member, x)
        y = kept.take(member, x)
        if y is None:
            # another pass: the last one broke off, or not all read one text
            self._kept, self._misses = None, self._misses + 1
            return self._compute(member, x) if self._misses < _MOST_MISSES else None
        if not kept.outputs:
            self._kept, self._misses = None, 0
        return y

    def _compute(self, member: Adapter, x: Tensor) -> Tensor | None:
        there = [m for ref in self._members.values() if (m := ref()) is not None]
        # one may be in another group by now
        members = [m for m in there if m._text is self]
        if len(members) < 2 or (made := together(x, members)) is None:
            return None
        self._kept = kept = Kept(x, members, *made)
        if (node := made[0][0].grad_fn) is not None:
            # what is left when backward has gone through would be of a graph that is no more
            node.register_prehook(partial(_forget, weakref.ref(kept)))
        return kept.take(member, x)


def _forget(kept: weakref.ref, _) -> None:
    if (found := kept()) is not None:
        found.outputs.clear()
