"""Every algorithm, made by LyCORIS and by us: read, written, read by LyCORIS and PEFT, merged."""

import functools

import pytest
import safetensors.torch
import torch
from tiny_sd import make_unet, randomise, unet_answer
from torch import nn

import lorakern
from lorakern.adapters import find, merge

lycoris = pytest.importorskip("lycoris")
peft = pytest.importorskip("peft")

# LyCORIS's name of a setting -> the one here
OURS = {"use_tucker": "tucker", "dora_wd": "dora"}
CASES = {
    "lora": {},
    "lora tucker": {"use_tucker": True},
    "lora scalar": {"use_scalar": True},
    "dora": {"dora_wd": True},
    "dora on input": {"dora_wd": True, "wd_on_output": False},
    "loha": {},
    "loha tucker": {"use_tucker": True},
    "loha scalar": {"use_scalar": True},
    "loha dora": {"dora_wd": True},
    "lokr": {},
    "lokr tucker": {"use_tucker": True},
    "lokr scalar": {"use_scalar": True},
    "lokr decompose_both": {"decompose_both": True},
    "lokr unbalanced": {"unbalanced_factorization": True},
    "lokr dora": {"dora_wd": True},
    "lokr full_matrix": {"full_matrix": True},
    "lokr factor": {"factor": 4},
}
# what LyCORIS 4.1.3 makes wrong adapters of when it rebuilds them from a file
NOT_FROM_FILE = {"dora on input", *(case for case in CASES if case.startswith("lokr"))}
NOT_FROM_FILE -= {"lokr full_matrix", "lokr factor"}
NOT_IN_PEFT = {
    "dora on input": "DoRA on the output of lora",
    "loha dora": "DoRA on the output of lora",
    "lokr dora": "DoRA on the output of lora",
    "lokr unbalanced": "no decompose_factor gives the factors of",
}
every_case = pytest.mark.parametrize("case", CASES)
# LyCORIS and PEFT split the 4 channels of conv_in and conv_out by 4 in two ways
INSIDE = r"(?!conv_(in|out)$).*"


def algo_of(case: str) -> str:
    return case.split()[0].replace("dora", "lora")


def theirs(unet, case: str):
    """LyCORIS's network on a UNet, trained-looking."""
    network = lycoris.create_lycoris(
        unet, 1.0, linear_dim=2, linear_alpha=1, algo=algo_of(case), **CASES[case]
    )
    network.apply_to()
    made = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=made)
        if "dora_scale" in name:
            parameter.data.mul_(1 + 0.2 * noise.tanh())
        else:
            parameter.data.copy_(1.5 if "scalar" in name else 0.3 * noise)
    return network


def ours(case: str, targets: str = "full"):
    unet = make_unet()
    options = {OURS.get(key, key): value for key, value in CASES[case].items()}
    lorakern.inject(unet, algo_of(case), rank=2, alpha=1, targets=targets, **options)
    randomise(unet, 0.3)
    return unet


def assert_close(got, want):
    moved = (want - untouched()).abs().max()
    assert moved > 1e-2, f"the adapter moves it by {moved:.1e} only"
    off = ((got - want).abs().max() / want.abs().max()).item()
    assert off <= 1e-5, f"off by {off:.1e} of the largest value"


@functools.cache
def untouched():
    return unet_answer(make_unet())


@every_case
def test_lycoris_file_gives_lycoris_forward(tmp_path, case):
    unet = make_unet()
    network = theirs(unet, case)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    loaded = make_unet()
    made = lorakern.load(loaded, path)
    assert len(made) == len(network.loras)
    assert_close(unet_answer(loaded), unet_answer(unet))
    # a file that LyCORIS may have been unable to go on from is the same when written again
    lorakern.save(loaded, tmp_path / "again.safetensors")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    for key, tensor in safetensors.torch.load_file(path).items():
        assert again[key.replace("lycoris_", "lora_unet_")].equal(tensor), key


@every_case
def test_our_file_reloads_and_merges(tmp_path, case):
    unet = ours(case)
    path = lorakern.save(unet, tmp_path / "ours.safetensors")
    fresh, again = make_unet(), ours(case)
    assert len(lorakern.load(fresh, path)) == len(lorakern.load(again, path)) == len(find(unet))
    want = unet_answer(unet)
    for loaded in (fresh, again):
        assert_close(unet_answer(loaded), want)
        twin = lorakern.save(loaded, tmp_path / "twin.safetensors")
        assert twin.read_bytes() == path.read_bytes()
        if not CASES[case].get("use_scalar"):
            got, made = factors_of(loaded), factors_of(unet)
            assert got.keys() == made.keys()
            assert all(factor.equal(made[name]) for name, factor in got.items())
    merge(fresh)
    assert_close(unet_answer(fresh), want)


@every_case
def test_lycoris_loads_ours(tmp_path, case):
    unet = ours(case)
    path = lorakern.save(unet, tmp_path / "ours.safetensors")
    state = safetensors.torch.load_file(path)
    state = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in state.items()}
    stock = make_unet()
    rest = theirs(stock, case).load_state_dict(state, strict=False)
    assert not rest.unexpected_keys and all("scalar" in key for key in rest.missing_keys)
    assert_close(unet_answer(stock), unet_answer(unet))
    if case not in NOT_FROM_FILE:
        stock = make_unet()
        with torch.no_grad():
            network, _ = lycoris.create_lycoris_from_weights(1.0, None, stock, state)
        network.apply_to()
        assert_close(unet_answer(stock), unet_answer(unet))


@every_case
def test_peft_loads_ours(tmp_path, case):
    unet = ours(case, INSIDE)
    if case in NOT_IN_PEFT:
        with pytest.raises(ValueError, match=f"{NOT_IN_PEFT[case]}.*save as kohya"):
            lorakern.save(unet, tmp_path / "peft", "peft")
        return
    path = lorakern.save(unet, tmp_path / "peft", "peft")
    stock = make_unet()
    peft.PeftModel.from_pretrained(stock, path)
    want = unet_answer(unet)
    assert_close(unet_answer(stock), want)
    loaded = make_unet()
    assert len(lorakern.load(loaded, path)) == len(find(unet))
    assert_close(unet_answer(loaded), want)


def factors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{factor}": getattr(stack[0], factor)
        for path, stack in find(model).items()
        for factor in stack[0].factors
    }
