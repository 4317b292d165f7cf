"""Runs of method = "ip_adapter" that cannot work are named, and its files are drawn with."""

import re

import pytest
import torch
from ip_training import embeddings_fixture, encoder_fixture, make_fixture  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from training import fit, home_fixture, one_thread  # noqa: F401

from lorakern import cli, config
from lorakern import plan as plans

BAD = {
    "missing": (
        lambda rows: {n: rows[n] for n in list(rows)[2:]},
        r"has none for 2 of 5 images: 0-red, 1-green; want a tensor for each",
    ),
    "widths": (lambda rows: rows | {"2-blue": torch.zeros(7)}, r"is \[24\], 2-blue is \[7\]"),
    "tokens": (lambda rows: {n: r[None] for n, r in rows.items()}, r"is \[1, 24\], want \[feat"),
    "none": (lambda rows: {}, "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_embeddings_that_cannot_work_are_named(home, make, tmp_path, case):
    change, message = BAD[case]
    rows = change(dict(sorted(load_file(home / "base.safetensors").items())))
    save_file(rows, tmp_path / "emb.safetensors")
    chosen = make(ip_adapter={"embeddings": tmp_path / "emb.safetensors"})
    for ask in (fit, lambda c: plans.plan(c, bar=False)):
        with pytest.raises(ValueError, match=message):
            ask(chosen)
    assert not chosen.output.exists()


def test_an_embedding_that_is_not_finite_is_named(home, make, tmp_path):
    rows = load_file(home / "base.safetensors")
    rows["3-red"][4] = float("nan")
    save_file(rows, tmp_path / "emb.safetensors")
    with pytest.raises(ValueError, match=r"3-red in .*emb.safetensors is not finite"):
        fit(make(ip_adapter={"embeddings": tmp_path / "emb.safetensors"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ip_adapter": {}}, "has no image_encoder; set ip_adapter.image_encoder"),
        ({"ip_adapter": {"embeddings": "nowhere"}}, "no file nowhere"),
        ({"ip_adapter": {"image_encoder": "nowhere"}}, "nowhere: want a transformers folder"),
        ({"ip_adapter": {"image_encoder": "a", "embeddings": "b"}}, "want one of them"),
        ({"ip_adapter": {"tokens": 8, "image_encoder": "a"}}, "tokens is 8; .* base .* 4"),
        ({"ip_adapter": {"image_dropout": 0.9, "both_dropout": 0.2}}, "add up to 1.15, over 1"),
        ({"adapter": {"rank": 8}}, 'adapter.rank is 8, which method = "ip_adapter" does not read'),
        ({"caption_dropout": 0.1}, "caption_dropout is 0.1, which method"),
        ({"formats": ["peft"]}, "formats is .*peft.*, which method"),
        (
            {"method": "adapter"},
            'embeddings is /.*base.safetensors, which method = "adapter" does not',
        ),
        ({"method": "ipadapter"}, "method: .*'adapter', 'ip_adapter' or 'instantid'"),
        ({"sample": {"every": 1, "prompts": ["a", "b"]}}, "0 image prompts for 2 prompts"),
        ({"sample": {"every": 1, "prompts": ["a"], "images": ["x"]}}, "none for 1 of 1 images: x"),
        ({"variant": "plus", "ip_adapter": {"variant": "plus", "embeddings": "base"}}, "want .tok"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else "",
)
def test_settings_that_cannot_work_are_named(home, make, changes, message):
    if changes.get("ip_adapter", {}).get("embeddings") == "base":
        changes["ip_adapter"]["embeddings"] = home / "base.safetensors"
    with pytest.raises(ValueError, match=message):
        fit(make(**changes))
    assert not make().output.exists()


def test_a_text_encoder_is_no_image_encoder(home, make):
    chosen = make(ip_adapter={"image_encoder": home / "model" / "text_encoder"})
    with pytest.raises(ValueError, match=r"is a CLIPTextModel; want CLIPVisionModelWithProjection"):
        fit(chosen)
    assert not chosen.output.exists()


@pytest.fixture(name="trained", scope="module")
def trained_fixture(home, encoder, embeddings):
    table = {
        "method": "ip_adapter", "model": str(home / "model"), "data": home / "data",
        "output": home / "trained", "cache": home / "cache", "resolution": 16, "steps": 2,
        "optimizer": {"lr": 0.05}, "ip_adapter": {"image_encoder": home / "encoder"},
    }  # fmt: skip
    return fit(config.from_dict(table)).paths[0]


def test_sample_shows_the_image(home, trained, tmp_path, capsys):
    words = ["sample", "--model", str(home / "model"), "--prompt", "a", "--steps", "2"]

    def drawn(name, *more):
        assert cli.main([*words, "--out", str(tmp_path / name), *more]) == 0, capsys.readouterr()
        return Image.open(tmp_path / name).tobytes()

    encoder = ["--image-encoder", str(home / "encoder")]
    red, blue = (["--image", str(home / "data" / f)] for f in ("0-red.png", "2-blue.png"))
    bare = drawn("bare.png")
    assert drawn("zero.png", "--adapter", f"{trained}:0", *red, *encoder) == bare
    one = drawn("red.png", "--adapter", str(trained), *red, *encoder)
    assert len({bare, one, drawn("blue.png", "--adapter", str(trained), *blue, *encoder)}) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "FILE"], "0 images for 1 prompts; want one IP-Adapter, and one --image"),
        (["--image", "x.png"], "no --adapter is one"),
        (["--adapter", "FILE", "--image", "IMAGE"], "the model has no image encoder"),
        (["--adapter", "FILE", "--image", "0-red", "--embeddings", "EMB"],
         "takes image embeddings of 20 channels, these have 24"),
        (["--adapter", "FILE", "--image", "nowhere.png", "--image-encoder", "ENCODER"],
         "image prompt nowhere.png: .*No such file"),
    ],
)  # fmt: skip
def test_sample_says_what_is_missing(home, trained, tmp_path, capsys, more, message):
    known = {"FILE": trained, "IMAGE": home / "data" / "0-red.png",
             "EMB": home / "base.safetensors", "ENCODER": home / "encoder"}  # fmt: skip
    words = ["sample", "--model", str(home / "model"), "--prompt", "a", "--out",
             str(tmp_path / "no.png"), *(str(known.get(word, word)) for word in more)]  # fmt: skip
    assert cli.main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "no.png").exists()


def test_inspect_and_merge_know_an_ip_adapter(home, trained, tmp_path, capsys):
    assert cli.main(["inspect", str(trained)]) == 0
    told = capsys.readouterr().out
    for text in ("ip_adapter", "base", "4 cross-attentions of 32 channels", "embeddings of 20",
                 "float32", "steps  2"):  # fmt: skip
        assert text in told
    merged = ["merge", "--model", str(home / "model"), "--adapter", str(trained)]
    assert cli.main([*merged, "--out", str(tmp_path / "merged")]) == 2
    assert "is an IP-Adapter, which has no weights to merge" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
