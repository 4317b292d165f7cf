"""The command line: what it is told, what it prints, and how it says no."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training import one_thread  # noqa: F401  a fixture for every test here

from lorakern import cli, config, models
from lorakern import plan as plans
from lorakern.adapters import find


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, pictures, a config file and an adapter trained with it."""
    home = tmp_path_factory.mktemp("home")
    tiny.saved(home)
    tiny.images(home / "data", 3)
    (home / "run.toml").write_text(
        f"""
        model = "{home / "model"}"
        data = "{home / "data"}"
        output = "{home / "out"}"
        resolution = 16
        steps = 6
        [adapter]
        rank = 4
        [optimizer]
        lr = 3e-2
        """
    )
    assert cli.main(["train", str(home / "run.toml"), "--formats", '["kohya", "diffusers"]']) == 0
    return home


def refused(capsys, *words) -> str:
    """The one line that a command says no with."""
    assert cli.main([str(w) for w in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def test_file_and_words_make_a_config(home):
    chosen = config.load(
        home / "run.toml",
        ["--adapter.rank", "8", "--steps=20", "--resume", "--name", "5", "--sample.prompts",
         "a cat", "--optimizer.options", "{betas = [0.9, 0.99]}", "--caption-dropout", "0.5"],
    )  # fmt: skip
    assert chosen.adapter.rank == 8 and chosen.steps == 20 and chosen.resume is True
    assert chosen.name == "5" and chosen.sample.prompts == ["a cat"]
    assert chosen.optimizer.options == {"betas": [0.9, 0.99]} and chosen.optimizer.lr == 3e-2
    assert chosen.caption_dropout == 0.5 and str(chosen.data) == str(home / "data")


def test_every_key_has_a_description_and_can_be_set():
    for key, field in config.fields().items():
        assert field.description, key
    assert "adapter.rank" in config.fields() and "adapter" not in config.fields()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter.rnk", "8"], "unknown key --adapter.rnk; did you mean adapter.rank?"),
        (["--rank", "8"], "did you mean adapter.rank?"),
        (["--batchsize", "8"], "did you mean batch_size?"),
        (["--steps", "many"], "steps: Input should be a valid integer.*'many'"),
        (["--steps", "0"], "steps: Input should be greater than or equal to 1, got 0"),
        (["--steps"], "--steps wants a value"),
        (["steps", "3"], "no config file steps"),
        (["--optimizer.schedule", "cosin"], "optimizer.schedule: Input should be 'constant'"),
        (["--sample.every", "5"], "sample.every is 5, but sample.prompts is empty"),
        (["--name", "a/b"], "name: String should match"),
        (["--steps", "1"], "model is required"),
    ],
)
def test_words_that_do_not_fit_are_named(capsys, words, message):
    import re

    given = [] if "required" in message else ["--model=m", "--data=d", "--output=o"]
    words = words if words[0] == "steps" else [*given, *words]
    assert cli.main(["train", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_keys_of_a_file_that_do_not_exist_are_named(capsys, home, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(
        (home / "run.toml").read_text() + "\n[adaptor]\nrank = 3\n[loss]\nmin_srn = 5\n"
    )
    assert cli.main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    assert "bad.toml: unknown key loss.min_srn; did you mean loss.min_snr?" in said
    assert "unknown key adaptor; did you mean adapter?" in said
    file.write_text("steps = = 3")
    assert "bad.toml" in refused(capsys, "train", file)


def test_train_tells_what_it_did(capsys, home, tmp_path):
    assert (
        cli.main(["train", str(home / "run.toml"), "--output", str(tmp_path), "--steps", "2"]) == 0
    )
    said = capsys.readouterr().out
    assert str(tmp_path / "adapter.safetensors") in said and "2 steps, " in said
    assert "holds the checkpoints" in refused(
        capsys, "train", home / "run.toml", "--output", tmp_path
    )


def test_plan_says_what_train_then_does(capsys, home, tmp_path):
    (home / "data" / "3.png").write_bytes(b"no picture")
    (home / "data" / "3.txt").write_text("x")
    try:
        words = [str(home / "run.toml"), "--output", str(tmp_path / "new"), "--batch_size", "2"]
        assert cli.main(["plan", *words]) == 0
    finally:
        (home / "data" / "3.png").unlink()
        (home / "data" / "3.txt").unlink()
    said = capsys.readouterr().out
    trained = load_file(home / "out" / "adapter.safetensors")
    count = sum(t.numel() for name, t in trained.items() if not name.endswith("alpha"))
    layers = sum(name.endswith("alpha") for name in trained)
    assert f"{layers} layers, {count:,} parameters" in said
    assert "images  3 in" in said and "16x16: 3" in said and "3.png: not an image" in said
    assert "6 of 2 x 1 images (3.0 epochs)" in said
    assert not (tmp_path / "new").exists()


def test_memory_estimate_follows_what_it_should(home, tmp_path):
    def measured(**changes):
        table = {"model": str(home / "model"), "data": home / "data", "output": tmp_path,
                 "resolution": 16, "adapter": {"rank": 4}}  # fmt: skip
        return plans.plan(config.from_dict(table | changes), bar=False)

    one, four = measured(), measured(batch_size=4)
    assert 2 * one.step < four.step < 4 * one.step and one.weights == four.weights
    assert measured(batch_size=4, gradient_checkpointing=True).step < 0.8 * four.step
    dropped = {"dropout": 0.1, "module_dropout": 0.1}
    assert measured(adapter={"rank": 4, "options": dropped}).step == pytest.approx(
        one.step, rel=0.05
    )
    low = measured(batch_size=4, precision="bf16")
    assert low.weights * 2 == one.weights and low.step < 0.8 * four.step
    assert low.factors == one.factors == 4 * one.trained
    base = models.load(str(home / "model"))
    assert one.weights == sum(p.numel() * 4 for p in base.unet.parameters())


def test_measured_step_is_what_tensors_take(home):
    """The count on shapes against the bytes that autograd really saves."""
    with plans._Peak() as peak:
        x = torch.randn(1000, requires_grad=True)
        y = (x * 2).exp()
        del y
        z = torch.ones(500)
    assert z.numel() == 500
    # randn, x * 2 and exp at once; the multiplication's result is not kept
    assert peak.most == 3 * 4000 and peak.now == 4000 + 2000


def test_sample_draws_a_grid_that_the_adapter_changes(capsys, home, tmp_path):
    common = [
        "--model",
        home / "model",
        "--prompt",
        "a red square",
        "--prompt",
        "x",
        "--steps",
        "2",
    ]
    adapter = str(home / "out" / "adapter.safetensors")
    pictures = {}
    for name, more in {
        "plain": [],
        "zero": ["--adapter", f"{adapter}:0"],
        "full": ["--adapter", adapter],
        "half": ["--adapter", f"{adapter}:0.5"],
        "two halves": ["--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5"],
    }.items():
        out = tmp_path / f"{name}.png"
        words = [
            "sample",
            *common,
            "--out",
            out,
            "--rows",
            "2",
            "--steps",
            "2",
            "--size",
            "16x24",
            *more,
        ]
        assert cli.main([str(w) for w in words]) == 0
        pictures[name] = Image.open(out).copy()
        assert pictures[name].size == (2 * 16 + 2, 2 * 24 + 2)
    raw = {name: torch.tensor(list(p.tobytes())).int() for name, p in pictures.items()}
    assert torch.equal(raw["plain"], raw["zero"])
    assert (raw["full"] - raw["plain"]).abs().max() > (raw["half"] - raw["full"]).abs().max() > 0
    assert (raw["two halves"] - raw["full"]).abs().max() <= 1


def test_sample_says_no(capsys, home, tmp_path):
    out = ["--prompt", "x", "--out", tmp_path / "x.png"]
    assert "model nowhere: no such folder" in refused(capsys, "sample", "--model=nowhere", *out)
    model = ["--model", home / "model"]
    said = refused(capsys, "sample", *model, *out, "--adapter", tmp_path / "no.safetensors:0.5")
    assert "no adapter file" in said and said.endswith("no.safetensors")
    wrong = tmp_path / "wrong.safetensors"
    save_file({"some.weight": torch.ones(2, 2)}, wrong)
    assert "some.weight" in refused(capsys, "sample", *model, *out, "--adapter", wrong)
    wrong.write_bytes(b"\xff" * 100)
    assert "wrong.safetensors" in refused(capsys, "sample", *model, *out, "--adapter", wrong)
    assert not (tmp_path / "x.png").exists()


def test_merge_writes_a_plain_model(capsys, home, tmp_path):
    adapter, merged = home / "out" / "adapter.safetensors", tmp_path / "merged"
    words = ["merge", "--model", home / "model", "--adapter", adapter, "--out", merged]
    assert cli.main([str(w) for w in words]) == 0
    options = {"seed": 0, "steps": 2, "guidance": 3.0, "size": (16, 16)}
    plain = models.load(str(merged))
    assert not find(plain.unet)
    from lorakern import load

    beside = models.load(str(home / "model"))
    load(beside.pipe, adapter)
    one, other = (models.draw(b, ["a red square"], **options)[0] for b in (plain, beside))
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert "exists" in refused(capsys, *words)
    before = load_file(home / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(merged / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_convert_and_inspect(capsys, home, tmp_path):
    adapter = home / "out" / "adapter.safetensors"
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    model = ["--model", home / "model"]
    for src, dst, form in ((adapter, there, "diffusers"), (there, back, "kohya")):
        words = ["convert", src, dst, "--format", form, *model]
        assert cli.main([str(w) for w in words]) == 0
    first, last = load_file(adapter), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    capsys.readouterr()
    assert cli.main(["inspect", str(there)]) == 0
    said = capsys.readouterr().out
    assert "format  diffusers" in said and "rank  4 (32)" in said and "unet (32)" in said
    assert "no format" in refused(capsys, "convert", adapter, back, "--format", "kohia", *model)
    assert "no such file" in refused(capsys, "inspect", tmp_path / "none.safetensors")


def test_every_command_takes_lokr_with_dora(capsys, home, tmp_path):
    out, merged, there = tmp_path / "out", tmp_path / "merged", tmp_path / "there.safetensors"
    options = ["--adapter.algo", "lokr", "--adapter.options", "{dora = true, factor = 4}"]
    words = ["train", home / "run.toml", "--output", out, "--steps", "2", *options]
    assert cli.main([str(w) for w in words]) == 0
    adapter = out / "adapter.safetensors"
    capsys.readouterr()
    assert cli.main(["inspect", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert "algorithm  lokr, DoRA" in said and "lycoris.kohya" in said and "unet (32)" in said
    words = ["convert", adapter, there, "--format", "kohya", "--model", home / "model"]
    assert cli.main([str(w) for w in words]) == 0
    first, again = load_file(adapter), load_file(there)
    assert first.keys() == again.keys() and all(again[n].equal(t) for n, t in first.items())
    words = ["merge", "--model", home / "model", "--adapter", adapter, "--out", merged]
    assert cli.main([str(w) for w in words]) == 0
    from lorakern import load

    beside, plain = models.load(str(home / "model")), models.load(str(merged))
    bare = {name: t.clone() for name, t in beside.unet.named_parameters()}
    moved = 0.0
    for name, one in load(beside.pipe, adapter).items():
        path = name.removeprefix("unet.")
        one.merge()
        weight = plain.unet.get_submodule(path).weight
        assert weight.equal(one.root.weight)
        moved = max(moved, (weight - bare[f"{path}.weight"]).abs().max().item())
    assert moved > 1e-4


def test_why_names_every_backend(capsys):
    assert cli.main(["why", "lora_linear"]) == 0
    said = capsys.readouterr().out
    for word in ("lora_linear_fwd", "lora_linear_bwd", "reference", torch.__version__, "triton"):
        assert word in said
    assert "no op 'nope'" in refused(capsys, "why", "nope")


def test_commands_and_help(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in overview and cli.ABOUT[command] in overview
    assert cli.main(["--version"]) == 0 and "lorakern" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    assert "--adapter.rank" in capsys.readouterr().out
    assert "did you mean train?" in refused(capsys, "trian")


def test_traceback_shows_where(home):
    with pytest.raises(ValueError, match="no config file"):
        cli.main(["train", "nope.toml", "--traceback"])


def test_start_is_quick_and_missing_packages_are_named(tmp_path):
    """`why` and --help import neither the model libraries nor the config's."""
    for name in ("diffusers", "transformers", "pydantic", "PIL", "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})")
    code = "import sys; from lorakern import cli; sys.exit(max(map(cli.main, {!r})))"

    def run(*commands):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        words = [sys.executable, "-c", code.format(list(commands))]
        return subprocess.run(words, env=env, capture_output=True, text=True)

    done = run(["why"], ["--help"])
    assert done.returncode == 0, done.stderr
    done = run(["train", "--model", "m"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("not installed: pip install 'lorakern[train]'")


def test_a_reader_that_has_gone_is_no_error():
    words = [sys.executable, "-c", "import sys; from lorakern.cli import main; sys.exit(main())"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*words, "why"], text=True, **pipes) as run:
        run.stdout.close()
        said = run.stderr.read()
    assert (said, run.returncode) == ("", 141)
