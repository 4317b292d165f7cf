"""LoKr of shapes that are given, as from a file, and the scale of whole factors."""

import pytest
from torch import nn

from lorakern.adapters import attach


def conv():
    return nn.Conv2d(8, 12, 3, padding=1)


SHAPES = [
    ({"c": [4, 2], "d": [3, 4]}, None),
    ({"c_up": [4, 4], "c_down": [4, 2], "d_up": [3, 4], "d_down": [4, 4]}, None),
    ({"c": [4, 2]}, "want c, or c_up and c_down; and d"),
    ({"c": [4, 2], "c_up": [4, 4], "d": [3, 4]}, "want c, or c_up and c_down"),
    ({"c": [4, 2], "d": [3, 4], "e": [1, 1]}, "want c, or c_up and c_down"),
    ({"c": [4, 2], "d": [3, 5]}, r"c \[4, 2\], d \[3, 5\] do not multiply to weight \[12, 8\]"),
    ({"c": [4, 2], "d": [3, 4, 1, 1]}, r"too many or too few dims for weight \[12, 8\]"),
    ({"c": [4, 2], "d_up": [3, 4], "d_down": [3, 4]}, "want rank 4 in every low-rank factor"),
    ({"c": [4, 2], "d_up": [3, 2], "d_down": [2, 4]}, "want rank 4 in every low-rank factor"),
]


@pytest.mark.parametrize(("shapes", "message"), SHAPES, ids=str)
def test_lokr_of_given_shapes(shapes, message):
    model = nn.Sequential(nn.Linear(8, 12))
    if message:
        with pytest.raises(ValueError, match=message):
            attach(model, "0", "lokr", rank=4, shapes=shapes)
        return
    adapter = attach(model, "0", "lokr", rank=4, shapes=shapes)
    assert {n: list(getattr(adapter, n).shape) for n in adapter.factors} == shapes


def test_lokr_of_given_shapes_on_a_convolution():
    shapes = {"c": [3, 2], "d_core": [2, 2, 3, 3], "d_up": [4, 2], "d_down": [2, 4]}
    adapter = attach(nn.Sequential(conv()), "0", "lokr", rank=2, shapes=shapes)
    assert adapter.delta_weight().shape == (12, 8, 3, 3)
    for wrong in ({**shapes, "d_core": [2, 2, 3, 1]}, {**shapes, "d_core": [2, 3, 3, 3]}):
        with pytest.raises(ValueError, match=r"d_core \[2, "):
            attach(nn.Sequential(conv()), "0", "lokr", rank=2, shapes=wrong)
    flat = {"c": [3, 2], "d_up": [4, 2], "d_down": [2, 36]}
    adapter = attach(nn.Sequential(conv()), "0", "lokr", rank=2, shapes=flat)
    assert adapter.delta_weight().shape == (12, 8, 3, 3)


def test_alpha_of_a_whole_lokr():
    for style, scale in (("lycoris", 1.0), ("peft", 0.5)):
        adapter = attach(nn.Sequential(nn.Linear(8, 12)), "0", "lokr", rank=8, alpha=4, style=style)
        assert adapter.scale == scale
        adapter.multiplier = 0.25
        assert adapter.scale == 0.25 * scale
