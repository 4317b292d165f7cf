"""The bench of a UNet's call with image prompts: nothing wrong is timed, and what it says."""

import csv

import pytest
import torch

pytest.importorskip("diffusers")

from bench import timing, unet_call
from lorakern.conditioning import ip_adapter

CALL = ["--model", "tiny", "--size", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_of_a_call(tmp_path, capsys):
    unet_call.main([*CALL, "--rounds", "2", "--record", "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == len(unet_call.IMAGES) * len(unet_call.ARMS)
    for name in unet_call.IMAGES:
        case = f"tiny 8x8 B2 T77+{name}"
        arms = {r["backend"]: r for r in rows if r["case"] == case}
        assert tuple(arms) == unet_call.ARMS
        for row in arms.values():
            assert (row["op"], row["direction"], row["saved_bytes"]) == ("unet_call", "infer", "0")
            assert row["rounds"] == "2"
            for figure in ("median_us", "peak_mib", "first_s", "cost_over_frozen"):
                assert float(row[figure]) > 0, figure
        calls = [int(arms[arm]["aten_calls"]) for arm in unet_call.ARMS]
        assert calls == sorted(calls, reverse=True) and len(set(calls)) == 3
        assert float(arms["diffusers"]["cost_over_frozen"]) == 1
    assert capsys.readouterr().out.count("unet_call tiny") == len(unet_call.IMAGES)


@pytest.mark.parametrize(
    "name, dtype, wrong", [("4", "float32", 1.01), ("4+4+4 masked", "bfloat16", 2.0)]
)
def test_a_wrong_call_is_not_timed(name, dtype, wrong, monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda *_, **__: pytest.fail("it was timed"))
    right = ip_adapter.decoupled_attention
    monkeypatch.setattr(
        ip_adapter, "decoupled_attention", lambda *args, **more: wrong * right(*args, **more)
    )
    with pytest.raises(AssertionError, match="lorakern uncached predicts"):
        unet_call.main([*CALL, "--dtype", dtype, "--images", name])


def test_arms_share_their_weights():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_call.train_step.TINY)
    other = unet_call._shared(unet)
    pairs = list(zip(unet.parameters(), other.parameters(), strict=True))
    assert pairs and all(a is b for a, b in pairs)
    assert not {id(m) for m in unet.modules()} & {id(m) for m in other.modules()}
