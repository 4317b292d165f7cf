"""Spec of decoupled_attention: o = softmax(q k₀ᵀ/√d) v₀ + Σⱼ cⱼ mⱼ ∘ softmax(q kⱼᵀ/√d) vⱼ.

IP-Adapter, Ye et al. 2023, arXiv:2308.06721, for any number of image groups: one softmax a group,
not one over all keys. Group 0 is the text; scales and masks are of the groups after it.
Dims: B images, Q queries, T keys of a group, H heads, d channels of a head; C = H·d.
"""

import torch


def decoupled_attention_fwd(q, keys, values, scales, masks, heads):
    q_BHQd, factor = split(q, heads), (heads / q.shape[-1]) ** 0.5
    out_BHQd = torch.zeros_like(q_BHQd)
    for k, v, weight in zip(keys, values, weights(scales, masks), strict=True):
        p_BHQT = torch.softmax(factor * (q_BHQd @ split(k, heads).mT), -1)
        out_BHQd = out_BHQd + weight * (p_BHQT @ split(v, heads))
    return join(out_BHQd)


def decoupled_attention_bwd(dout, q, keys, values, scales, masks, heads, needs):
    """needs: whether to compute dq, then of each group whether to compute dk and dv.

    dk and dv are [N, C], the B·T rows of each wanted group after those of the one before; what is
    not wanted comes back empty.
    """
    q_BHQd, factor = split(q, heads), (heads / q.shape[-1]) ** 0.5
    dq_BHQd, dks, dvs = torch.zeros_like(q_BHQd), [], []
    need_dq, *need_groups = needs
    groups = zip(keys, values, weights(scales, masks), need_groups, strict=True)
    for k, v, weight, need in groups:
        k_BHTd, dout_BHQd = split(k, heads), weight * split(dout, heads)
        p_BHQT = torch.softmax(factor * (q_BHQd @ k_BHTd.mT), -1)
        dp_BHQT = dout_BHQd @ split(v, heads).mT
        ds_BHQT = factor * p_BHQT * (dp_BHQT - (p_BHQT * dp_BHQT).sum(-1, keepdim=True))
        dq_BHQd = dq_BHQd + ds_BHQT @ k_BHTd
        if need:
            dks.append(join(ds_BHQT.mT @ q_BHQd).flatten(0, 1))
            dvs.append(join(p_BHQT.mT @ dout_BHQd).flatten(0, 1))
    dq = join(dq_BHQd) if need_dq else q.new_empty(0)
    none = q.new_empty((0, q.shape[-1]))
    return dq, torch.cat([none, *dks]), torch.cat([none, *dvs])


def weights(scales, masks):
    """cⱼ mⱼ of each group, broadcast over [B, H, Q, d]; the text has 1."""
    yield 1
    for scale, mask in zip(scales, masks, strict=True):
        yield scale if mask is None else scale * mask[:, None, :, None]


def split(x, heads):
    """[B, T, C] -> [B, H, T, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    """[B, H, T, d] -> [B, T, C]"""
    return x.transpose(1, 2).flatten(2)
