"""The command `lorakern`: each sub-command is a function, and imports what it needs when run."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

ABOUT = {
    "demo": "teach the model that ships a new subject, and show before and after",
    "train": "train an adapter on a folder of images",
    "plan": "say what train would do: images, steps, parameters, memory",
    "sample": "draw pictures with a model and adapters",
    "merge": "write a model with adapters merged into its weights",
    "convert": "rewrite an adapter file in another format",
    "inspect": "say what an adapter file holds",
    "why": "say which kernels run on this machine, and why others do not",
}


def main(words: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0, 2 for bad input, 128 + n for signal n."""
    words = sys.argv[1:] if words is None else list(words)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        import lorakern

        print(f"lorakern {lorakern.__version__}")
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"lorakern: no command {name!r}{f'; did you mean {near[0]}?' if near else ''}"
              f" There are {', '.join(COMMANDS)}.", file=sys.stderr)  # fmt: skip
        return 2
    if "--traceback" in words:
        words.remove("--traceback")
        return COMMANDS[name](words[1:])
    return _told(name, words[1:])


def _told(name: str, words: list[str]) -> int:
    """The command, with expected errors as one line on stderr."""
    try:
        code = COMMANDS[name](words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader of stdout has gone, as head does; nor is the rest of it for anyone at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "lorakern":
            raise
        reason = f"needs {package}, which is not installed: pip install 'lorakern[train]'"
    except (ValueError, OSError, _diverged()) as error:
        reason = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"lorakern {name}: {reason}", file=sys.stderr)
    return 2


def _diverged() -> type[BaseException]:
    # only a run that imported the trainer can raise it
    train = sys.modules.get("lorakern.train")
    return train.Diverged if train else ValueError


def demo(words: list[str]) -> int:
    from lorakern.demo.run import main as run

    return run(words)


def train(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(_config_help("train"))
        return 0
    from lorakern.train import train

    result = train(_config(words))
    for path in result.paths:
        print(path)
    note = f", {result.skipped} of them skipped" if result.skipped else ""
    print(
        f"{len(result.losses)} steps{note}, {result.steps_per_second:.2f} a second,"
        f" {result.peak_memory / 2**20:,.0f} MiB at the peak"
    )
    if result.stopped is not None:
        print(f"stopped at step {result.step} by a signal; go on with --resume", file=sys.stderr)
        return 128 + result.stopped
    return 0


def plan(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(_config_help("plan"))
        return 0
    from lorakern.plan import plan

    print(plan(_config(words)))
    return 0


def sample(words: list[str]) -> int:
    parser = _parser("sample")
    _model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="one column; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--rows", type=_positive, default=1, help="seeds a prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first row (0)")
    parser.add_argument("--steps", type=_positive, default=25, help="of denoising (25)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free (5.0)")
    parser.add_argument("--size", type=_size, help="512 or WIDTHxHEIGHT; default: the model's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="image prompt of an IP-Adapter, one for all prompts or one each; repeatable",
    )  # fmt: skip
    parser.add_argument("--image-encoder", type=Path, help="folder; default: the model's own")
    parser.add_argument("--embeddings", type=Path, help="of images, which --image then names")
    given = parser.parse_args(words)
    from lorakern import models
    from lorakern.devices import bf16, device_of

    device = device_of(given.device)
    base, more = _with_image_prompts(given)
    with models.quiet_libraries():
        base.pipe.to(device)
    rows = [
        models.draw(
            base, given.prompt, seed=given.seed + row, steps=given.steps,
            guidance=given.guidance, size=given.size, bf16=bf16(given.precision, device),
            more=more,
        )
        for row in range(given.rows)
    ]  # fmt: skip
    models.write_image(models.grid(rows), given.out)
    print(given.out)
    return 0


def merge(words: list[str]) -> int:
    parser = _parser("merge")
    _model_arguments(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="of the weights written; sums are float32 (float32)",
    )  # fmt: skip
    given = parser.parse_args(words)
    if given.out.exists():
        raise ValueError(f"{given.out} exists; merge writes a new folder")
    import torch

    from lorakern import models

    models.save_merged(_with_adapters(given), given.out, getattr(torch, given.dtype))
    print(given.out)
    return 0


def convert(words: list[str]) -> int:
    parser = _parser("convert")
    parser.add_argument("src", type=Path, help="adapter file or PEFT folder")
    parser.add_argument("dst", type=Path, help="file or folder to write")
    parser.add_argument("--format", required=True, help="kohya, diffusers or peft")
    parser.add_argument("--model", help="the model it is for, where names alone do not tell")
    given = parser.parse_args(words)
    from lorakern import formats

    pipe = None
    if given.model:
        from lorakern import models

        pipe = models.skeleton(given.model).pipe
    print(formats.convert(given.src, given.dst, given.format, pipe))
    return 0


def inspect(words: list[str]) -> int:
    parser = _parser("inspect")
    parser.add_argument("file", type=Path, help="adapter file or PEFT folder")
    given = parser.parse_args(words)
    from lorakern import formats
    from lorakern.conditioning.ip_files import is_ip_adapter

    if is_ip_adapter(given.file):
        from lorakern.methods import ip_sample

        _tell(*ip_sample.summary(given.file))
        return 0
    found = formats.inspect(given.file)

    def counted(values: dict) -> str:
        return ", ".join(f"{value} ({count})" for value, count in values.items()) or "-"

    _tell(
        ("format", found.format or "unknown"),
        ("algorithm", found.algo),
        ("layers", counted(found.components)),
        ("rank", counted(found.ranks)),
        ("alpha", counted(found.alphas)),
        ("dtype", counted(found.dtypes)),
        ("size", f"{found.size / 2**20:.2f} MiB"),
        *found.metadata.items(),
    )
    return 0


def _tell(*about: tuple[str, str]) -> None:
    for name, text in about:
        text = " ".join(str(text).split())
        print(f"{name:>12}  {text[:200]}{' ...' if len(text) > 200 else ''}")


def why(words: list[str]) -> int:
    parser = _parser("why")
    parser.add_argument("op", nargs="?", help="one op or the start of its name; default: all")
    given = parser.parse_args(words)
    import importlib.metadata
    import platform

    import torch

    from lorakern import __version__, backend

    ops = {name: op for name, op in backend.OPS.items() if name.startswith(given.op or "")}
    if not ops:
        raise ValueError(f"no op {given.op!r}; there are {', '.join(backend.OPS)}")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"lorakern {__version__}, torch {torch.__version__}, triton {triton}")
    print(f"cpu      {cpu}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.is_available()
    print(f"gpu      {torch.cuda.get_device_name() if gpu else 'none'}")
    for name, op in ops.items():
        print(name)
        for kernel in (*op.kernels, "reference"):
            print(f"  {kernel:<10} {_state(op, kernel, gpu)}")
    return 0


def _state(op, kernel: str, gpu: bool) -> str:
    """Whether a backend of an op can run here at all; the tensors decide the rest."""
    try:
        op.load(kernel)
    except ImportError as missing:
        return str(missing)
    if kernel in ("triton", "cuda") and not gpu:
        return "wants a GPU"
    return "ok"


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "plan": plan,
    "sample": sample,
    "merge": merge,
    "convert": convert,
    "inspect": inspect,
    "why": why,
}


def _overview() -> str:
    lines = "\n".join(f"  {name:<9}{about}" for name, about in ABOUT.items())
    return (
        f"usage: lorakern COMMAND ...\n\nAdapters for diffusion models on fused kernels.\n\n{lines}"
        "\n\nlorakern COMMAND --help says more; --traceback shows where an error came from."
    )


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"lorakern {command}", description=ABOUT[command])


def _model_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument("--model", required=True, help="a diffusers folder, or a name on the hub")
    parser.add_argument(
        "--adapter", action="append", default=[], required=required, metavar="FILE[:MULTIPLIER]",
        help="adapter of any known format, and its strength (1); repeatable",
    )  # fmt: skip


def _with_adapters(given: argparse.Namespace):
    """The model with its weight adapters; an IP-Adapter among them is an error."""
    base, prompts = _base(given)
    if prompts:
        raise ValueError(f"{prompts[0][0]} is an IP-Adapter, which has no weights to merge")
    return base


def _with_image_prompts(given: argparse.Namespace):
    """The model with all its adapters, and the further arguments of each prompt."""
    base, prompts = _base(given)
    if not prompts and (given.image or given.image_encoder or given.embeddings):
        raise ValueError("image prompts are for an IP-Adapter, and no --adapter is one")
    if not prompts:
        return base, None
    from lorakern.methods.ip_sample import arguments

    more = arguments(
        base, prompts, given.image, len(given.prompt), given.guidance, given.image_encoder,
        given.embeddings,
    )  # fmt: skip
    return base, more


def _base(given: argparse.Namespace):
    """The model with its weight adapters, and the IP-Adapters with their strengths."""
    import lorakern
    from lorakern import models
    from lorakern.conditioning.ip_files import is_ip_adapter

    adapters = [_adapter(text) for text in given.adapter]
    base, prompts = models.load(given.model, complete=True), []
    for i, (path, multiplier) in enumerate(adapters):
        if is_ip_adapter(path):
            prompts.append((path, multiplier))
        else:
            lorakern.load(base.pipe, path, multiplier, name=f"adapter{i}")
    return base, prompts


def _adapter(text: str) -> tuple[Path, float]:
    """FILE[:MULTIPLIER]; a file whose name ends like that wins."""
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return _existing(path), float(number)
        except ValueError as error:
            if "could not convert" not in str(error):
                raise
    return _existing(text), 1.0


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise ValueError(f"no adapter file {path}")
    return Path(path)


def _config(words: list[str]):
    """A TOML file, if the first word is one, and --key value words on top."""
    from lorakern import config

    path = words[0] if words and not words[0].startswith("--") else None
    return config.load(path, words[1:] if path else words)


def _config_help(command: str) -> str:
    from lorakern import config

    lines = []
    for key, field in config.fields().items():
        required = field.is_required()
        default = "required" if required else _toml(field.default)
        lines.append(f"  --{key:<26} {field.description} ({default})")
    return (
        f"usage: lorakern {command} [CONFIG.toml] [--KEY VALUE ...]\n\n{ABOUT[command]}.\n\n"
        "Keys, as in the file (a.b is b in section [a]) or on the command line:\n"
        + "\n".join(lines)
    )


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "not set" if value is None else str(value)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"want at least 1, got {text}")
    return number


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return _positive(width), _positive(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"want 512 or 512x768, got {text}") from None


if __name__ == "__main__":
    sys.exit(main())
