"""What an adapter with recompute=True keeps for backward."""

import copy

import pytest
import torch
from torch import nn

from lorakern.adapters import attach


@pytest.mark.parametrize("algo", ["lora", "dora"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 12), nn.Conv2d(8, 12, 1).to(memory_format=torch.channels_last)], ids=str
)
def test_recompute_keeps_the_input_alone(algo, layer):
    x = torch.randn(4, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 3, 3)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grads, saved = {}, {}
    for again in (False, True):
        model = nn.Sequential(copy.deepcopy(layer))
        torch.manual_seed(0)
        adapter = attach(model, "0", algo, rank=4, recompute=again)
        nn.init.normal_(adapter.up)
        known = {t.data_ptr() for t in (x, *model.state_dict().values())}
        new = []

        def pack(tensor, known=known, new=new):
            new.extend([tensor.numel()] * (tensor.data_ptr() not in known))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        factors = [f for f in adapter.parameters() if f.requires_grad]
        grads[again], saved[again] = torch.autograd.grad(y.sin().sum(), [x, *factors]), new
    rows = x.numel() // 8
    # DoRA's gain, and the row's magnitude over its norm
    assert set(saved[True]) <= {12} and 4 * rows in saved[False]
    for mine, theirs in zip(*grads.values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_frozen_down_keeps_no_input_to_recompute_from():
    with pytest.raises(ValueError, match="recompute goes without freeze_down"):
        attach(nn.Sequential(nn.Linear(8, 12)), "0", rank=4, recompute=True, freeze_down=True)
