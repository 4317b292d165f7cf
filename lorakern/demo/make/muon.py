"""Muon: momentum, then about the nearest orthogonal matrix, for weights of 2 or more dims.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Weights of
one shape are stacked, so that a small network costs few matrix products.
"""

from collections import defaultdict

import torch
import torch.distributed as dist


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of each U S V^T in float32 [N, rows, columns], rows <= columns.

    Not in bfloat16, as on GPUs: a CPU without bfloat16 products takes nine times as long for it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal; an update's RMS is 0.2 lr, as usual with AdamW.

    When torch.distributed is on, each process makes its part of the matrices orthogonal.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            stacks = defaultdict(list)
            for weight in group["params"]:
                rows, columns = len(weight), weight[0].numel()
                stacks[(min(rows, columns), max(rows, columns), rows > columns)].append(weight)
            updates = [
                self._directions(weights, tall, group["momentum"])
                for (_, _, tall), weights in stacks.items()
            ]
            share(updates, average=False)
            for (_, _, tall), update in zip(stacks, updates, strict=True):
                self._apply(stacks[(*sorted(update.shape[1:]), tall)], update, tall, group)

    def _directions(self, weights, tall, momentum):
        """[N, rows, columns], rows <= columns; zero where another process has the work."""
        looks = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            moment = state["momentum"].lerp_(weight.grad, 1 - momentum)
            look = weight.grad.lerp(moment, momentum).flatten(1)
            looks.append(look.mT if tall else look)
        looks = torch.stack(looks)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        made = torch.zeros_like(looks)
        if rank < len(looks):
            made[rank::ranks] = orthogonalise(looks[rank::ranks])
        return made

    def _apply(self, weights, updates, tall, group):
        # an orthogonal r x c matrix has entries of RMS 1 / sqrt(max(r, c))
        size = 0.2 * max(updates.shape[1:]) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            update = update.mT if tall else update
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(group["lr"] * size * update.reshape(weight.shape))


def share(tensors: list[torch.Tensor], average: bool) -> None:
    """Replaces each tensor by its sum or mean over the processes, sent as bfloat16."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).bfloat16()
    dist.all_reduce(flat)
    if average:
        flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
