"""Spec of kron_delta: ΔW = s·C ⊗ D. LoKr of LyCORIS, arXiv:2309.14859.

C and D are whole here: their low-rank products are small. Of a convolution D is [P, Q·kh·kw].
Dims: C [A, B], D [P, Q], O = A·P rows, I = B·Q columns.
"""


def kron_delta_fwd(c, d, scale):
    delta_APBQ = scale * c[:, None, :, None] * d[None, :, None, :]
    return delta_APBQ.flatten(2).flatten(0, 1)


def kron_delta_bwd(ddelta, c, d, scale, needs):
    """needs: which of dc, dd to compute; the others come back as empty tensors."""
    (A, B), (P, Q) = c.shape, d.shape
    # an entry of C a row, an entry of D a column
    ddelta_CD = ddelta.view(A, P, B, Q).transpose(1, 2).reshape(A * B, P * Q)
    grads = scale * (ddelta_CD @ d.flatten()), scale * (c.flatten() @ ddelta_CD)
    shaped = grads[0].view(A, B), grads[1].view(P, Q)
    return tuple(g if need else g.new_empty(0) for g, need in zip(shaped, needs, strict=True))
