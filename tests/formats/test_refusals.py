"""Files that must not load: each an error that names the thing, and the model is as it was."""

import json

import pytest
import safetensors.torch
import torch
from tiny_sd import Net, adapted, make_pipeline, make_text_encoder, make_unet, parts, write

import lorakern
from lorakern.formats import UnmatchedKeys


@pytest.fixture
def good(tmp_path):
    """A kohya file of a tiny UNet's attention and the tensors in it."""
    unet = make_unet()
    lorakern.inject(unet, rank=2)
    path = lorakern.save(unet, tmp_path / "good.safetensors")
    return path, safetensors.torch.load_file(path)


def refuse(path, match: str, model=None, kind=ValueError) -> ValueError:
    """The error of loading; a UNet that it was tried on has no adapter and the same weights."""
    model = make_unet() if model is None else model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(kind, match=match) as caught:
        lorakern.load(model, path)
    assert [type(m) for m in model.modules()] == modules
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    return caught.value


def test_a_key_that_fits_nothing_is_listed(good):
    path, tensors = good
    first = next(iter(sorted(tensors)))
    name = first.partition(".")[0]
    renamed = {k.replace(name, "lora_unet_down_blocks_7_to_q"): v for k, v in tensors.items()}
    write(path, renamed)
    error = refuse(path, "1 of 32 layers fit none of unet", kind=UnmatchedKeys)
    assert error.keys == [
        f"lora_unet_down_blocks_7_to_q.{end}"
        for end in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    assert all(key in str(error) for key in error.keys)


def test_a_file_for_another_model_is_refused(tmp_path):
    net = Net()
    lorakern.inject(net, targets=["conv"], rank=2)
    lorakern.save(net, tmp_path, "peft")
    refuse(tmp_path, r"base_model\.model\.conv\.lora_A\.weight", kind=UnmatchedKeys)


def test_many_unmatched_keys_are_counted(good):
    path, tensors = good
    write(path, {f"stray.{i}": torch.zeros(1) for i in range(30)} | tensors)
    error = refuse(path, "and 10 more", kind=UnmatchedKeys)
    assert len(error.keys) == 30


def test_half_a_layer_is_listed(good):
    path, tensors = good
    gone = sorted(k for k in tensors if k.endswith("lora_up.weight"))[0]
    del tensors[gone]
    write(path, tensors)
    error = refuse(path, "2 of 95 keys make no whole layer", kind=UnmatchedKeys)
    name = gone.partition(".")[0]
    assert set(error.keys) == {f"{name}.lora_down.weight", f"{name}.alpha"}


def test_unknown_keys_name_the_formats(tmp_path):
    write(tmp_path / "a.safetensors", {"transformer.h.0.weight": torch.zeros(2, 2)})
    refuse(
        tmp_path / "a.safetensors",
        "none of the formats.*kohya.*transformer.h.0",
        None,
        UnmatchedKeys,
    )


def test_a_component_that_was_not_given_is_named(tmp_path):
    path = lorakern.save(adapted(), tmp_path / "a.safetensors")
    refuse(path, "12 are for text_encoder, which was not given", kind=UnmatchedKeys)
    loaded = lorakern.load(make_unet(), path, components=["unet"])
    assert "conv_in" in loaded
    with pytest.raises(ValueError, match="holds nothing for text_encoder_2"):
        lorakern.load(make_pipeline(), path, components="text_encoder_2")


FOREIGN = {
    "OFT": {"oft_blocks": (4, 4, 4)},
    "GLoRA": {"a1.weight": (16, 2), "b1.weight": (16, 2)},
    "IA3": {"weight": (16,), "on_input": ()},
    "norms": {"w_norm": (16,), "b_norm": (16,)},
    "full weight": {"diff": (16, 16)},
}


@pytest.mark.parametrize("algo", FOREIGN)
def test_other_algorithms_are_named(good, algo):
    path, tensors = good
    more = {f"lora_unet_conv_in.{k}": torch.ones(shape) for k, shape in FOREIGN[algo].items()}
    write(path, tensors | more)
    refuse(path, f"holds .*{algo}.*loads lora, loha, lokr only, and nothing was loaded")
    found = lorakern.formats.inspect(path)
    assert algo in found.algo and found.format == "kohya" and found.components == {}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"peft_type": "VERA"}, "PEFT type VERA; this version loads LORA, LOHA, LOKR"),
        ({"peft_type": "LOHA", "alpha": 2}, "is of LOHA, and conv holds lora"),
        ({"use_dora": True}, "use_dora is True, and conv has no magnitude"),
        ({"use_qalora": True}, "use_qalora: QALoRA, which this version does not load"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base weights"),
        ({"r": "many"}, "r is not a number"),
        ({"r": 3}, "rank 3 for conv in the config, 2 in its tensors"),
        ({"rank_pattern": {"con(": 4}}, "is no regex"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"alpha_pattern": {"conv": None}}, "of 'conv' is not a number: None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is not a number: inf"),
        ({"rank_pattern": {"(a+)+b": 4}}, "repeats groups"),
        (None, "is not JSON"),
    ],
)
def test_peft_configs_that_do_not_fit(tmp_path, change, match):
    net = Net()
    lorakern.inject(net, targets=["conv"], rank=2)
    lorakern.save(net, tmp_path, "peft")
    config = tmp_path / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()) | change) if change else "{"
    config.write_text(text)
    refuse(tmp_path, match, Net())


def test_peft_without_its_config_is_refused(tmp_path):
    net = Net()
    lorakern.inject(net, targets=["conv"], rank=2)
    lorakern.save(net, tmp_path, "peft")
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    refuse(tmp_path, "needs adapter_config.json", Net(), FileNotFoundError)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", "keeps alpha in adapter_config.json", Net())


def test_diffusers_header_is_checked(tmp_path):
    path = lorakern.save(adapted(), tmp_path / "a.safetensors", "diffusers")
    tensors = safetensors.torch.load_file(path)
    write(path, tensors, {"lora_adapter_metadata": '{"unet.r": 4, "unet.peft_type": "OFT"}'})
    refuse(path, r"\(unet\) is of PEFT type OFT")
    write(path, tensors, {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2}'})
    refuse(path, "has settings for unet, and none for text_encoder")
    write(path, tensors, {"lora_adapter_metadata": "[4]"})
    refuse(path, "no JSON object")


def first(tensors: dict, end: str) -> str:
    return sorted(k for k in tensors if k.endswith(end))[0]


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda t: t[first(t, "down.weight")].view(-1)[5].fill_(torch.nan), "1 of 32 values"),
        (lambda t: t[first(t, "up.weight")].fill_(torch.inf), "values are not finite"),
        (lambda t: t.update({first(t, "alpha"): torch.tensor(torch.nan)}), "not one finite number"),
        (lambda t: t.update({first(t, "alpha"): torch.ones(3)}), "not one finite number"),
        (lambda t: t.update({first(t, "alpha"): torch.tensor(0.0)}), "alpha of .* is 0"),
        (lambda t: t.update({first(t, "up.weight"): torch.ones(16, 3)}), "share no rank"),
        (lambda t: t.update({first(t, "up.weight"): torch.ones(16, 2).int()}), "torch.int32"),
        (lambda t: t.update({first(t, "down.weight"): torch.ones(0, 16)}), "share no rank"),
        (
            lambda t: t.update({first(t, "down.weight"): torch.ones(2, 17)}),
            r"1 of 32 layers do not fit: .*want \[2, 16\], got \[2, 17\]",
        ),
        (
            lambda t: t.update({first(t, "alpha").replace("unet_", "unet_x"): torch.tensor(1.0)}),
            "make no whole layer",
        ),
    ],
)  # fmt: skip
def test_spoilt_tensors(good, spoil, match):
    path, tensors = good
    spoil(tensors)
    write(path, tensors)
    refuse(path, match)


LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 36), "hada_w2_a": (16, 2), "hada_w2_b": (2, 36)}
LOKR = {"lokr_w1": (4, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 18)}
CORE = {"lokr_w1": (4, 2), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, 3, 3)}
LORA = {"lora_down.weight": (2, 4, 3, 3), "lora_up.weight": (16, 2, 1, 1)}


@pytest.mark.parametrize(
    "whole, change, match",
    [
        (LOHA, {"hada_w2_b": None}, "3 of 3 keys make no whole layer.*conv_in.hada_w1_a"),
        (LOHA, {"hada_t1": (2, 2, 3, 3)}, "5 of 5 keys make no whole layer.*conv_in.hada_t1"),
        (LOHA, {"lokr_w1": (4, 2)}, "5 of 5 keys make no whole layer"),
        (LOHA, {"hada_w2_a": (16, 3)}, r"hada_w2_a \[16, 3\].* share no rank of at least 1"),
        (LOHA, {"hada_w1_a": (16, 0), "hada_w1_b": (0, 36), "hada_w2_a": (16, 0),
                "hada_w2_b": (0, 36)}, r"hada_w1_a \[16, 0\].* share no rank"),
        (LOHA, {"hada_w1_b": (2, 35)}, r"conv_in.hada_w1_b want \[2, 36\], got \[2, 35\]"),
        (LOHA, {"hada_w1_b": (2, 4)}, r"conv_in.hada_w1_b want \[2, 36\], got \[2, 4\]"),
        (LOKR, {"lokr_w2_a": None}, "2 of 2 keys make no whole layer.*lokr_w1, .*lokr_w2_b"),
        (LOKR, {"lokr_t1": (2, 2, 3, 3)}, "1 of 4 keys make no whole layer.*lokr_t1"),
        (LOKR, {"lokr_w1_a": (4, 2)}, "4 of 4 keys make no whole layer"),
        (LOKR, {"lokr_w1": None, "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2)}, "share no rank"),
        (LOKR, {"lokr_w1": (8, 2)}, r"lokr_w1 \[8, 2\], .*lokr_w2_b \[2, 18\] multiply to 32"
                                    r" rows and 36 columns, and the weight is \[16, 4, 3, 3\]"),
        (LOKR, {"lokr_w1": (4, 3), "lokr_w2_b": (2, 12)}, r"the weight is \[16, 4, 3, 3\]"),
        (CORE, {"lokr_t2": (2, 2, 3, 1)}, r"lokr_t2 want \[2, 2, 3, 3\], got \[2, 2, 3, 1\]"),
        (CORE, {"lokr_t2": (2, 3, 3, 3)}, "share no rank"),
        (CORE, {"lokr_t2": (2, 2)}, r"want a core .* got .*lokr_t2 \[2, 2\]"),
        (LORA, {"lora_mid.weight": (2, 2, 3, 3)},
         r"a down \[R, I\] beside it, got .*lora_down.weight \[2, 4, 3, 3\]"),
        (LORA, {"dora_scale": (15, 1, 1, 1)},
         r"dora_scale want \[16, 1, 1, 1\] or \[1, 4, 1, 1\], got \[15, 1, 1, 1\]"),
        (LORA, {"dora_scale": (1, 5, 1, 1)}, r"or \[1, 4, 1, 1\], got \[1, 5, 1, 1\]"),
        ({}, {"dora_scale": (16, 1, 1, 1)}, "1 of 1 keys make no whole layer"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_factors_that_contradict_are_named(tmp_path, whole, change, match):
    shapes = {end: shape for end, shape in (whole | change).items() if shape is not None}
    path = tmp_path / "a.safetensors"
    write(path, {f"lora_unet_conv_in.{end}": torch.ones(shape) for end, shape in shapes.items()})
    refuse(path, match)
    if whole:
        # and without the change it loads
        write(path, {f"lora_unet_conv_in.{end}": torch.ones(s) for end, s in whole.items()})
        assert lorakern.load(make_unet(), path).keys() == {"conv_in"}


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_spoilt_numbers_of_other_algorithms(tmp_path, algo):
    unet = make_unet()
    lorakern.inject(unet, algo, rank=1, dora=True, targets=["conv_in"])
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    whole = safetensors.torch.load_file(path)
    for key in whole:
        spoilt = {k: t.clone() for k, t in whole.items()}
        spoilt[key].view(-1)[0] = torch.nan
        write(path, spoilt)
        finite = "is not one finite number" if key.endswith("alpha") else "values are not finite"
        refuse(path, f"{key}.*{finite}")
    write(path, whole | {"lora_unet_conv_in.alpha": torch.tensor(0.0)})
    refuse(path, "alpha of conv_in is 0")


def test_dora_on_an_embedding_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["words"], use_dora=True)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    refuse(tmp_path, "words is an Embedding, and DoRA on one is not read", Net())


def test_adapters_that_are_there_must_have_the_same_factors(tmp_path):
    path = tmp_path / "a.safetensors"
    for algo, there, file in (
        ("lokr", {}, {"full_matrix": True}),
        ("lokr", {}, {"unbalanced_factorization": True}),
        ("loha", {}, {"tucker": True}),
        ("lora", {}, {"dora": True}),
        ("lora", {"dora": True}, {"dora": True, "wd_on_output": False}),
    ):
        unet, other = make_unet(), make_unet()
        lorakern.inject(unet, algo, rank=1, targets=["conv1"], **file)
        lorakern.save(unet, path)
        lorakern.inject(other, algo, rank=1, targets=["conv1"], **there)
        with pytest.raises(ValueError, match=f"has {algo} .* give another name"):
            lorakern.load(other, path)


def test_one_layer_under_two_names_is_refused(tmp_path):
    encoder = make_text_encoder()
    lorakern.inject(encoder, rank=2)
    path = lorakern.save(encoder, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(path)
    # CLIP as some transformers versions call it, beside the usual name
    more = {k.replace("te_text_model_", "te1_text_model_"): v.clone() for k, v in tensors.items()}
    write(path, tensors | more)
    refuse(path, "defines one tensor twice", make_text_encoder())


def header(entries: dict | bytes, data: bytes) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


HOSTILE = {
    "empty": b"",
    "text": b"not a safetensors file, only some words of text",
    "pickle": b"PK\x03\x04" + bytes(64),
    "header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "header of an exabyte": (1 << 60).to_bytes(8, "little") + b"{}",
    "tensor larger than memory": header({"a": entry([1 << 20, 1 << 20], 1 << 42)}, bytes(8)),
    "size overflows": header({"a": entry([1 << 40, 1 << 40], 8)}, bytes(8)),
    "negative size": header({"a": entry([-2], 8)}, bytes(8)),
    "overlap": header({"a": entry([2], 8), "b": entry([2], 8)}, bytes(8)),
    "unknown dtype": header({"a": entry([2], 8, "PICKLE")}, bytes(8)),
    "deep nesting": header(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", b""),
    "not UTF-8": header(b"\xff\xfe{}", b""),
    "no tensor": header({}, b""),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    match = "bad.safetensors.*(not a whole safetensors file|holds no tensors|values|want at least)"
    refuse(path, match)


@pytest.mark.parametrize("left", [0.01, 0.5, 0.99])
def test_truncated_files(good, left):
    path, _ = good
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)])
    refuse(path, rf"good.safetensors \({int(len(whole) * left)} bytes\) is not a whole")


def test_paths_that_hold_nothing(tmp_path):
    refuse(
        tmp_path / "nowhere.safetensors", "no such file or folder.*nowhere", None, FileNotFoundError
    )
    refuse(
        tmp_path, "want one .safetensors file in the folder, found: none", None, FileNotFoundError
    )
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.ckpt")
    refuse(tmp_path / "a.ckpt", "pickle files can run code and are not read")


def test_a_failure_in_the_middle_takes_back_what_was_attached(good, monkeypatch):
    attach, calls = lorakern.adapters.attach, []

    def fails_at_the_tenth(*args, **options):
        calls.append(args)
        if len(calls) == 10:
            raise MemoryError("no memory")
        return attach(*args, **options)

    monkeypatch.setattr(lorakern.adapters, "attach", fails_at_the_tenth)
    refuse(good[0], "no memory", kind=MemoryError)


def test_adapters_that_are_there_must_be_the_same(good):
    path, tensors = good
    unet = make_unet()
    lorakern.inject(unet, rank=2, targets=["to_q"])
    with pytest.raises(ValueError, match=r"do not cover the same layers.*only in the file: .*to_k"):
        lorakern.load(unet, path)
    other = make_unet()
    lorakern.inject(other, rank=3)
    with pytest.raises(ValueError, match=r"of rank 3.*of rank 2; give another name"):
        lorakern.load(other, path)
    same = make_unet()
    made = lorakern.inject(same, rank=2, alpha=9)
    assert lorakern.load(same, path).keys() == made.keys()
    assert all(adapter.alpha == 2 for adapter in made.values())
    lorakern.merge(same)
    with pytest.raises(ValueError, match="is merged; unmerge the model"):
        lorakern.load(same, path)
    # beside the others, under another name
    assert len(lorakern.load(other, path, name="second")) == len(tensors) // 3


def test_a_multiplier_that_is_no_number_changes_nothing(good):
    with pytest.raises(ValueError, match="finite number, got nan"):
        lorakern.load(make_unet(), good[0], multiplier=torch.nan)


@pytest.mark.parametrize("model", [object(), {}, {"unet": 3}], ids=["object", "empty", "number"])
def test_models_that_are_none(good, model):
    with pytest.raises(ValueError, match="component"):
        lorakern.load(model, good[0])


def test_every_component_of_the_file_is_loaded_or_none(tmp_path):
    path = lorakern.save(adapted(), tmp_path / "a.safetensors")
    pipeline = make_pipeline()
    pipeline.text_encoder = make_text_encoder(width=16)
    with pytest.raises(ValueError, match="layers do not fit"):
        lorakern.load(pipeline, path)
    for module in parts(pipeline).values():
        assert not lorakern.adapters.find(module)
