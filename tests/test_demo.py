"""The model that ships, and `lorakern demo` from end to end, made short."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorakern import cli, models
from lorakern.demo import run
from lorakern.demo.likeness import Likeness

pytest.importorskip("peft", reason="stock diffusers loads LoRA files by way of peft")


@pytest.fixture(scope="module")
def base():
    return models.load(str(run.BASE))


def test_the_weights_that_ship_are_small_and_float16():
    from safetensors import safe_open

    files = sorted(run.BASE.rglob("*.safetensors"))
    assert [f.parent.name for f in files] == ["text_encoder", "unet", "vae"]
    assert sum(f.stat().st_size for f in files) <= 15_000_000
    for file in files:
        with safe_open(file, "pt") as stored:
            dtypes = {stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
        assert dtypes == {torch.float16}


def test_stock_diffusers_loads_and_draws():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(run.BASE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    words = "a red apple, flat emoji style"
    picture = pipe(words, num_inference_steps=4, generator=rng).images[0]
    assert picture.size == (64, 64)
    assert np.array(picture).std() > 10


def test_every_picture_of_the_subject_has_a_caption_of_the_new_word():
    pictures = sorted(run.SUBJECT.glob("*.png"))
    assert 4 <= len(pictures) <= 8
    for picture in pictures:
        assert Image.open(picture).size == (64, 64)
        assert "sks" in picture.with_suffix(".txt").read_text()


def test_likeness_knows_the_subject(base):
    pictures = [Image.open(p).convert("RGB") for p in sorted(run.SUBJECT.glob("*.png"))]
    things = ["a red car, flat emoji style", "a cat, noto emoji style", "a banana, 3d emoji style"]
    others = models.draw(base, things, seed=0, steps=12, guidance=3.0)
    judge = Likeness(base, pictures[:-1], others[1:])
    assert judge(pictures[:1]) == pytest.approx(1, abs=1e-4)
    assert judge(pictures[-1:]) > judge(others[:1]) + 0.1


@pytest.mark.parametrize(
    ("algo", "library"),
    [("lora", "diffusers"), ("dora", "diffusers"), ("loha", "peft"), ("lokr", "peft")],
)
def test_the_demo_writes_all_it_says(algo, library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "PROMPTS", run.PROMPTS[:1])
    monkeypatch.setattr(run, "SEEDS", (1,))
    monkeypatch.setattr(run, "DRAW", {"steps": 4, "guidance": 3.0})
    out = tmp_path / "out"
    words = ["demo", "--out", str(out), "--steps", "3", "--rank", "2", "--algo", algo]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert float(re.search(r"speed +([\d.]+) steps/s", told)[1]) > 0
    assert int(re.search(r"largest pixel difference (\d+)", told)[1]) <= 2
    assert re.search(r"likeness +-?[\d.]+ before, -?[\d.]+ after", told)
    for kind in ("picture", "kohya file", f"{library} file", "log"):
        assert Path(re.search(rf"{kind} +(\S+)$", told, re.M)[1]).exists()
    assert Image.open(out / "demo.png").width > 3 * 64


def test_a_second_demo_takes_the_next_free_folder(tmp_path):
    first = tmp_path / "lorakern-demo"
    assert run._free(first) == first
    first.mkdir()
    assert run._free(first) == tmp_path / "lorakern-demo-2"
