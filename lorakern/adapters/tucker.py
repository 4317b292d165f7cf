"""Tucker form of a k x k kernel: a core over its pixels between two 1 x 1 factors."""

import torch
from torch import Tensor


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[O, I, kh, kw][o, i, p, q] = Σ_ab core[a, b, p, q]·up[o, a]·down[b, i].

    Args:
        core: [R, R, kh, kw], up: [O, R], down: [R, I].

    Source: LyCORIS, Yeh et al. 2023, arXiv:2309.14859; FedPara, arXiv:2108.06098.
    """
    inner = (core.movedim(1, 3) @ down).movedim(3, 1)
    return torch.tensordot(up, inner, 1)
