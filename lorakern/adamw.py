"""Spec of a clipped step of AdamW: what csrc/adamw.h and the kernels over it compute, in torch.

AdamW, Loshchilov & Hutter 2017, arXiv:1711.05101, as torch.optim.AdamW has it, after
torch.nn.utils.clip_grad_norm_; the average is that of lorakern.average.Average.
"""

import torch


def norm(grads):
    """Root of the sum of all squares of all gradients: a scalar, no unit."""
    return torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()


def step(
    p, grad, exp_avg, exp_avg_sq, average, step, lr, weight_decay, beta1, beta2, eps, norm,
    largest, memory, zero,
):  # fmt: skip
    """One step, in place; returns 1 where it was left out, else 0.

    Where the norm is not finite, p, both moments, the average and the number of steps stay as they
    are. The gradient becomes zeros in either case, if asked.

    Args:
        p, grad, exp_avg, exp_avg_sq: of one shape; average: too, or None.
        step: steps made before, a scalar.
        norm: of all gradients, a scalar, or None: neither clipped nor asked whether it is finite.
        largest: norm that the gradients are scaled down to; inf for not at all.
        memory: of the average, 0 to below 1.
        zero: whether to leave zeros in the gradient.
    """
    left_out = norm is not None and not norm.isfinite()
    if not left_out:
        step += 1
        clip = 1 if norm is None else (largest / (norm + 1e-6)).clamp(max=1)
        g = grad * clip
        p *= 1 - lr * weight_decay
        exp_avg += (1 - beta1) * (g - exp_avg)
        exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g.square())
        first, second = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
        p -= lr / first * exp_avg / ((exp_avg_sq / second).sqrt() + eps)
        if average is not None:
            keep = min(memory, (1 + step.item()) / (10 + step.item()))
            average += (1 - keep) * (p - average)
    if zero:
        grad.zero_()
    return int(left_out)
