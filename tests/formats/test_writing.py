"""What save writes: whole or not at all, true metadata, the dtype asked for, the same again."""

import hashlib
import json
import os
import stat

import pytest
import safetensors
import torch
from tiny_sd import (
    Net,
    adapted,
    adapters_of,
    make_pipeline,
    make_text_encoder,
    make_unet,
    parts,
    randomise,
)
from torch import nn

import lorakern
from lorakern.formats import convert, detect, inspect, storage

FORMATS = ("kohya", "diffusers", "peft")


def where(tmp_path, format):
    return tmp_path / ("folder" if format == "peft" else f"{format}.safetensors")


def header_of(path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_round_trip_is_bit_for_bit(tmp_path, format, sdxl):
    pipeline = adapted(sdxl, rank_pattern={".*to_k": 3}, alpha=1.75)
    path = lorakern.save(pipeline, where(tmp_path, format), format)
    assert detect(path) == format
    fresh = make_pipeline(sdxl)
    loaded = lorakern.load(fresh, path, multiplier=0.5)
    want = adapters_of(pipeline)
    assert loaded.keys() == want.keys() and loaded == adapters_of(fresh)
    for name, adapter in loaded.items():
        assert adapter.down.equal(want[name].down) and adapter.up.equal(want[name].up)
        assert (adapter.multiplier, adapter.rank, adapter.alpha) == (0.5, want[name].rank, 1.75)
    # what was loaded is saved as the same bytes
    again = lorakern.save(fresh, where(tmp_path / "again", format), format)
    for file in [path] if path.is_file() else sorted(path.rglob("*.*")):
        twin = again / file.relative_to(path) if path.is_dir() else again
        assert file.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_rslora_keeps_its_scale(tmp_path, format):
    encoder = make_text_encoder()
    lorakern.inject(encoder, rank=8, alpha=3, rslora=True, rank_pattern={".*q_proj": 2})
    want = {p: s[0].delta_weight() for p, s in lorakern.adapters.find(encoder).items()}
    path = lorakern.save(encoder, where(tmp_path, format), format)
    for name, adapter in lorakern.load(make_text_encoder(), path).items():
        torch.testing.assert_close(adapter.delta_weight(), want[name], rtol=1e-6, atol=0)
        assert adapter.rslora == (format != "kohya")


def test_kohya_evens_alphas_without_changing_the_update(tmp_path):
    unet = make_unet()
    lorakern.inject(unet, rank=4, alpha=4, targets="full", alpha_pattern={".*conv.*": 0.3})
    randomise(unet)
    want = {p: s[0].delta_weight() for p, s in lorakern.adapters.find(unet).items()}
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    assert inspect(path).alphas == {4.0: len(want)}
    for name, adapter in lorakern.load(make_unet(), path).items():
        torch.testing.assert_close(adapter.delta_weight(), want[name], rtol=1e-6, atol=1e-9)


def test_compiled_models_are_seen_through(tmp_path):
    encoder = make_text_encoder()
    lorakern.inject(encoder, rank=2)
    path = lorakern.save(torch.compile(encoder), tmp_path / "a.safetensors")
    loaded = lorakern.load(torch.compile(make_text_encoder()), path)
    assert set(loaded) == set(lorakern.adapters.find(encoder))


def test_multiplier_is_not_baked_in(tmp_path):
    unet = make_unet()
    made = lorakern.inject(unet, rank=2)
    lorakern.set_multiplier(unet, 0.0)
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    loaded = lorakern.load(make_unet(), path)
    assert all(a.multiplier == 1 and a.scale == 1 for a in loaded.values())
    assert all(a.down.equal(made[p].down) for p, a in loaded.items())


@pytest.mark.parametrize("format", FORMATS)
def test_dtype(tmp_path, format):
    unet = make_unet()
    lorakern.inject(unet, rank=2)
    path = lorakern.save(unet, where(tmp_path, format), format, dtype=torch.bfloat16)
    dtypes = inspect(path).dtypes
    # alpha stays float32, so that rslora's √rank is not rounded to 8 bits
    assert dtypes.pop("float32", 0) == (dtypes["bfloat16"] // 2 if format == "kohya" else 0)
    assert list(dtypes) == ["bfloat16"]


def test_values_that_would_be_lost_are_refused(tmp_path):
    unet = make_unet()
    made = lorakern.inject(unet, rank=2)
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    before = path.read_bytes()
    first = next(iter(made.values()))
    first.up.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"to_q\.up: 1 of 32 values are not finite"):
        lorakern.save(unet, path, dtype=torch.float16)
    first.up.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lorakern.save(unet, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_kohya_metadata_is_what_the_file_proves(tmp_path):
    unet = make_unet()
    lorakern.inject(unet, rank=4, alpha=2, targets="full", rank_pattern={".*conv[12]": 3})
    path = tmp_path / "a.safetensors"
    lorakern.save(unet, path, metadata={"ss_steps": "12", "ss_network_dim": "99"})
    found = header_of(path)
    hashes = {k: found.pop(k) for k in ("sshs_model_hash", "sshs_legacy_hash")}
    # the tiny UNet's cross-attention takes 24 features: no known base model, and none is claimed
    assert found == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"conv_dim": "Dynamic", "conv_alpha": "2.0"}',
        "ss_steps": "12",
    }
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert hashes["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    # a small file has nothing at 1 MiB
    assert hashes["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize("width, base, v2", [(768, "sd_v1", "False"), (1024, "sd_v2", "True")])
def test_base_model_is_told_by_its_cross_attention(tmp_path, width, base, v2):
    attention = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(width, 8)})})
    lorakern.inject(attention, rank=1)
    lorakern.save({"unet": attention}, tmp_path / "mine.safetensors", metadata={"a": "b"})
    found = header_of(tmp_path / "mine.safetensors")
    assert (found["ss_base_model_version"], found["ss_v2"], found["a"]) == (base, v2, "b")
    title = {"modelspec.title": "mine"} if base == "sd_v1" else {}
    assert title.items() <= found.items()


def test_same_content_same_bytes(tmp_path):
    raw = [
        lorakern.save(adapted(), tmp_path / f"{i}.safetensors", metadata={"a": "1", "ü": '"\n'})
        for i in range(2)
    ]
    assert raw[0].read_bytes() == raw[1].read_bytes()
    assert header_of(raw[0])["ü"] == '"\n'


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, step, format):
    unet = make_unet()
    made = lorakern.inject(unet, rank=2)
    path = lorakern.save(unet, where(tmp_path, format), format)
    files = [path] if path.is_file() else sorted(path.iterdir())
    before = {file: file.read_bytes() for file in files}
    for adapter in made.values():
        adapter.up.data.add_(1)

    def no_power(*_):
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, no_power)
        with pytest.raises(OSError, match="no power"):
            lorakern.save(unet, path, format)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    lorakern.save(unet, path, format)
    assert {f: f.read_bytes() for f in files} != before


def test_files_are_made_like_any_other(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.txt"
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    storage.write({link: b"one", tmp_path / "new" / "b.txt": b"two"})
    assert link.is_symlink() and target.read_bytes() == b"one"
    plain = tmp_path / "plain.txt"
    plain.write_bytes(b"")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_save_refuses(tmp_path):
    path, net = tmp_path / "a.safetensors", Net()
    with pytest.raises(ValueError, match="no adapter to save"):
        lorakern.save(net, path)
    lorakern.inject(net, targets=["proj"], rank=2)
    with pytest.raises(ValueError, match="no format 'onnx'; there are diffusers, kohya, peft"):
        lorakern.save(net, path, "onnx")
    for format in ("kohya", "diffusers"):
        with pytest.raises(ValueError, match=r"files hold .*unet.*pass a dict"):
            lorakern.save(net, path, format)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        lorakern.save({"unet": net}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="want a folder for peft"):
        lorakern.save(net, path, "peft")
    with pytest.raises(ValueError, match="metadata is text to text, got 'steps': 3"):
        lorakern.save({"unet": net}, path, metadata={"steps": 3})
    lorakern.inject(net, targets=["proj"], rank=2, name="second")
    with pytest.raises(ValueError, match="adapters default, second; say which"):
        lorakern.save({"unet": net}, path)
    with pytest.raises(ValueError, match="no adapter called 'third'"):
        lorakern.save({"unet": net}, path, name="third")
    lorakern.inject(net, targets=["words"], rank=2, name="words")
    for format in ("kohya", "diffusers"):
        with pytest.raises(ValueError, match=r"words is an embedding layer.*save as peft"):
            lorakern.save({"unet": net}, path, format, name="words")
    assert os.listdir(tmp_path) == []
    lorakern.save({"unet": net}, path, name="second")


def test_an_older_peft_adapter_in_the_folder_is_not_mixed_in(tmp_path):
    pipeline = adapted()
    lorakern.save(pipeline, tmp_path, "peft")
    lorakern.adapters.eject(pipeline.text_encoder)
    with pytest.raises(ValueError, match="text_encoder holds an older adapter"):
        lorakern.save(pipeline, tmp_path, "peft")


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("with_model", [False, True])
def test_convert_there_and_back(tmp_path, sdxl, with_model):
    # names only: two layers a block, as Stable Diffusion XL has them
    pipeline = make_pipeline(sdxl)
    pipeline.unet = make_unet(sdxl, layers_per_block=2)
    for module in parts(pipeline).values():
        lorakern.inject(module, rank=2, alpha=3.0, targets="full")
        randomise(module)
    model = pipeline if with_model else None
    kohya = lorakern.save(pipeline, tmp_path / "a.safetensors", metadata={"ss_steps": "7"})
    there = convert(kohya, tmp_path / "b.safetensors", "diffusers", model)
    assert header_of(there)["ss_steps"] == "7"
    if sdxl or with_model:
        back = convert(there, tmp_path / "c.safetensors", "kohya", model)
        assert back.read_bytes() == kohya.read_bytes()
    else:
        # a tiny UNet's widths are neither Stable Diffusion's nor XL's
        with pytest.raises(ValueError, match="cannot tell SDXL"):
            convert(there, tmp_path / "c.safetensors", "kohya")
    direct = lorakern.save(pipeline, tmp_path / "d.safetensors", "diffusers")
    got, want = inspect(there), inspect(direct)
    assert (got.components, got.alphas) == (want.components, want.alphas)
    if with_model:
        folder = convert(there, tmp_path / "p", "peft", model)
        assert json.loads((folder / "unet" / "adapter_config.json").read_text())["lora_alpha"] == 3
        assert detect(folder) == "peft"
    else:
        with pytest.raises(ValueError, match="pass model="):
            convert(there, tmp_path / "p", "peft")


def test_convert_and_inspect_refuse(tmp_path):
    net = Net()
    lorakern.inject(net, targets="proj", rank=2)
    lorakern.save(net, tmp_path / "p", "peft")
    with pytest.raises(ValueError, match="no names of Stable Diffusion; pass model="):
        convert(tmp_path / "p", tmp_path / "a.safetensors", "kohya")
    with pytest.raises(ValueError, match="no format"):
        convert(tmp_path / "p", tmp_path / "a.safetensors", "onnx")
    found = inspect(tmp_path / "p")
    assert (found.format, found.algo, found.components) == ("peft", "lora", {"module": 1})
    assert (found.ranks, found.alphas, found.size) == ({2: 1}, {2.0: 1}, 4 * 2 * (6 + 10))
