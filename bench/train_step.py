"""One whole training step of a Stable Diffusion UNet: forward, loss, backward, AdamW.

    python -m bench.train_step --model sd15 --size 16 --record
    python -m bench.train_step --algo loha --rank 8 --size 32

The frozen UNet, lorakern and the peers take turns on one set of random base weights: before its
step an arm's layers are put into the UNet, lorakern's with the frozen ones that its trainer
accelerates. Nothing is timed before all arms have given the prediction and the factor gradients of
the merged weights.
"""

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakern
from bench import check, peers, record, timing, usage
from bench.ops import hada_linear, kron_linear
from lorakern.adapters import lokr_shapes
from lorakern.devices import keep_freed_memory

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
MODELS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}
# how far, of its norm, a prediction may be from merged weights', and a gradient between arms
CLOSE = {"float32": 1e-3, "bfloat16": 0.2}


@dataclass(frozen=True)
class Batch:
    """Inputs of the UNet, and the noise that it should predict."""

    inputs: dict
    noise: Tensor


@dataclass
class Arm:
    """The layers that an arm puts into the UNet, by path, and the factors that it trains.

    compiled: the UNet under torch.compile, for an arm that calls it so.
    frozen: layers of its own in the place of others that train nothing.
    """

    places: dict[str, nn.Module]
    factors: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None
    compiled: Callable | None = None
    frozen: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self):
        if self.factors and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.factors, fused=True)


def main(argv: list[str] | None = None) -> None:
    """Print a table of all arms, and with --record append its rows."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    # as lorakern's trainer does; it serves every arm
    keep_freed_memory(device)
    for gone in record.missing():
        print(f"not timed, for it is not installed: {gone}")
    rows = measure(options, device)
    print(table(rows), flush=True)
    if options.record:
        record.append(rows, record.results_file(device, options.results))


def measure(options: argparse.Namespace, device: torch.device) -> list[record.Row]:
    """One row an arm; the frozen UNet first.

    Raises:
        AssertionError: an arm predicts something else than the UNet with merged weights.
    """
    from diffusers import UNet2DConditionModel

    dtype = getattr(torch, options.dtype)
    # not the model's own `to`, which warns of modules to keep in float32: it has none
    with device:
        unet = nn.Module.to(UNet2DConditionModel(**MODELS[options.model]), dtype).train()
    unet.requires_grad_(False)
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    found = lorakern.inject(unet, rank=1, targets=options.targets)
    lorakern.eject(unet)
    paths = list(found)
    batch = _batch(unet, options.size, options.batch)
    arms, first_s = {"frozen": Arm({}, [])}, {"frozen": ""}
    _step(unet, arms["frozen"], batch)
    linear = all(isinstance(unet.get_submodule(path), nn.Linear) for path in paths)
    for name in _names(options, linear=linear):
        start = time.perf_counter()
        arms[name] = _build(name, unet, paths, options.algo, options.rank)
        _step(unet, arms[name], batch)
        first_s[name] = time.perf_counter() - start
    _check(unet, arms, batch, options)

    steps = {name: lambda arm=arm: _step(unet, arm, batch) for name, arm in arms.items()}
    used = {name: _usage(unet, arm, batch) for name, arm in arms.items()}
    taken = timing.interleave(steps, device, seconds=options.seconds, rounds=options.rounds)
    case = f"{options.model} {options.size}x{options.size} B{options.batch} {options.targets}"
    case += f" {options.algo}" * (options.algo != "lora") + f" R{options.rank}"
    case += " checkpointing" * options.checkpointing
    return [
        record.Row(
            op="train_step",
            case=case,
            dtype=options.dtype,
            backend=name,
            direction="step",
            median_us=times.median * 1e6,
            iqr_us=times.iqr * 1e6,
            gb_s="",
            cost_over_frozen=times.over(taken["frozen"]),
            cost_of_medians=times.median / taken["frozen"].median,
            images_s=options.batch / times.median,
            first_s=first_s[name],
            rounds=len(times.seconds),
            **used[name],
            **record.environment(device),
        )
        for name, times in taken.items()
    ]


def table(rows: list[record.Row]) -> str:
    """The rows as text; a * marks the fastest and the leanest adapter."""
    first, adapters = rows[0], rows[1:]
    fastest = min(adapters, key=lambda r: r.cost_over_frozen)
    leanest = min(adapters, key=lambda r: r.peak_mib)
    lines = [
        f"train_step {first.case} {first.dtype}, {first.device}, {first.threads} threads,"
        f" commit {first.commit}, {first.rounds} rounds",
        f"  {'':20}{'step ms':>10}{'IQR':>8}{'images/s':>10}{'/frozen':>9}  {'peak MiB':>9}"
        f"  {'saved MiB':>10}{'calls':>8}{'first s':>9}",
    ]
    for row in rows:
        lines.append(
            f"  {row.backend:20}{row.median_us / 1e3:10.1f}{row.iqr_us / 1e3:8.1f}"
            f"{row.images_s:10.3f}{row.cost_over_frozen:9.3f}{'*' if row is fastest else ' '} "
            f"{row.peak_mib:9.1f}{'*' if row is leanest else ' '} "
            f"{row.saved_bytes / usage.MIB:10.1f}{row.aten_calls:>8}"
            f"{'' if row.first_s == '' else f'{row.first_s:.2f}':>9}"
        )
    return "\n".join(lines) + "\n"


def _names(options: argparse.Namespace, *, linear: bool) -> list[str]:
    gone = record.missing()
    names = ["lorakern"]
    if "peft" not in gone:
        names += ["peft"] if options.dtype == "float32" else ["peft", "peft 16-bit"]
        names += [f"{names[-1]} compiled"] * options.compile
    if "lycoris-lora" not in gone:
        names += ["lycoris", "lycoris bypass"]
    # its convolutions have another formula
    if "loralib" not in gone and linear and options.algo == "lora":
        names.append("loralib")
    return [n for n in names if not options.arms or n in options.arms]


def _build(name: str, unet: nn.Module, paths: list[str], algo: str, rank: int) -> Arm:
    # each arm gets layers of its own around the same weights, so that the arms do not stack
    plain = {path: copy.copy(unet.get_submodule(path)) for path in paths}
    chosen = {path: _algorithm(algo, layer, rank) for path, layer in plain.items()}
    if name.startswith(("lycoris", "loralib")):
        made = {
            path: peers.loralib(layer, rank, rank)
            if name == "loralib"
            else peers.lycoris(
                layer, rank, rank, bypass=name == "lycoris bypass", algorithm=chosen[path]
            )
            for path, layer in plain.items()
        }
        places = {path: layer.call for path, layer in made.items()}
        return Arm(places, [f for layer in made.values() for f in layer.factors])
    frozen = peers.accelerated(unet, paths)
    with _placed(unet, plain):
        which, options = 0 if name == "lorakern" else 1, next(iter(chosen.values())).options
        if name == "lorakern":
            lorakern.inject(unet, algo, rank=rank, targets=paths, **options[0])
        else:
            keep_dtype = name.startswith("peft 16-bit")
            _add_peft(unet, paths, algo, rank, options[1], keep_dtype=keep_dtype)
        places = {path: unet.get_submodule(path) for path in paths}
    factors = [
        layer.get_parameter(factor)
        for path, layer in places.items()
        for factor in chosen[path].factors[which]
    ]
    optimizer = lorakern.FlatAdamW(factors) if name == "lorakern" else None
    compiled = torch.compile(unet.forward) if name.endswith("compiled") else None
    return Arm(places, factors, optimizer, compiled, frozen if name == "lorakern" else {})


def _algorithm(algo: str, layer: nn.Module, rank: int) -> peers.Algorithm:
    if algo == "lokr":
        # -1 is all the libraries' default; D is whole where two factors of it were larger
        (_, P), (_, Q) = (lokr_shapes.split(n, -1) for n in layer.weight.shape[:2])
        return kron_linear.lokr(-1, whole=max(P, Q) <= 2 * rank)
    return {"lora": peers.LORA, "loha": hada_linear.LOHA}[algo]


def _add_peft(
    unet: nn.Module, paths: list[str], algo: str, rank: int, options: dict, *, keep_dtype: bool
) -> None:
    import peft
    from diffusers.training_utils import cast_training_params

    alphas = {"lora_alpha" if algo == "lora" else "alpha": rank}
    kind = getattr(peft, _algorithm(algo, unet.get_submodule(paths[0]), rank).names[1])
    unet.add_adapter(kind(r=rank, target_modules=paths, **alphas, **options))
    if not keep_dtype:
        cast_training_params(unet, torch.float32)
    # the UNet takes another such adapter only when it does not know of this one
    unet._hf_peft_config_loaded = False
    del unet.peft_config


@contextlib.contextmanager
def _placed(unet: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    before = {path: unet.get_submodule(path) for path in layers}
    _put(unet, layers)
    try:
        yield
    finally:
        _put(unet, before)


def _put(unet: nn.Module, layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        unet.get_submodule(parent)._modules[child] = layer


def _batch(unet: nn.Module, size: int, images: int) -> Batch:
    config, like = unet.config, {"dtype": unet.dtype, "device": unet.device}
    shape = (images, config.in_channels, size, size)
    inputs = {
        # it asks for a gradient, so that the frozen UNet has a backward of the same depth
        "sample": torch.randn(shape, **like).requires_grad_(),
        "timestep": torch.full((images,), 500, device=unet.device),
        "encoder_hidden_states": torch.randn(images, 77, config.cross_attention_dim, **like),
    }
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(images, 1280, **like),
            "time_ids": torch.full((images, 6), 8.0 * size, **like),
        }
    return Batch(inputs, torch.randn(shape, device=unet.device))


def _loss(unet: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
    prediction = unet(**batch.inputs).sample
    return F.mse_loss(prediction.float(), batch.noise), prediction


def _step(unet: nn.Module, arm: Arm, batch: Batch) -> None:
    with _placed(unet, arm.places | arm.frozen):
        _loss(arm.compiled or unet, batch)[0].backward()
    if arm.optimizer:
        arm.optimizer.step()
        arm.optimizer.zero_grad()
    batch.inputs["sample"].grad = None


@check.in_full()
def _check(
    unet: nn.Module, arms: dict[str, Arm], batch: Batch, options: argparse.Namespace
) -> None:
    """On the same factors every arm predicts as merged weights do, with equal gradients."""
    seed, first = torch.Generator().manual_seed(0), next(a for a in arms.values() if a.places)
    close, left, values, merged = CLOSE[options.dtype], iter(first.factors), [], {}
    for path in first.places:
        layer = unet.get_submodule(path)
        names = _algorithm(options.algo, layer, options.rank).factors[0]
        own = _values(options.algo, [next(left) for _ in names], seed)
        merged[path] = _merged(layer, _delta(options.algo, own))
        values += own
    with _placed(unet, merged), torch.no_grad():
        want = _loss(unet, batch)[1]
    expected: list[Tensor] = []
    for name, arm in arms.items():
        if name == "frozen":
            continue
        for factor, value in zip(arm.factors, values, strict=True):
            factor.data.copy_(value)
        with _placed(unet, arm.places | arm.frozen):
            loss, prediction = _loss(arm.compiled or unet, batch)
            loss.backward()
        off = distance(prediction, want)
        assert off <= close, f"{name} predicts {off:.2e} beside merged weights, want {close:.0e}"
        grads = [f.grad for f in arm.factors]
        expected = expected or grads
        off = max(map(distance, grads, expected))
        assert off <= close, f"{name}: gradients are {off:.2e} beside the first arm's"
        arm.optimizer.zero_grad()
    batch.inputs["sample"].grad = None


def _values(algo: str, factors: list[Tensor], seed: torch.Generator) -> list[Tensor]:
    """Factors of an update that is a tenth of a usual weight."""
    stds = [f.shape[1] ** -0.5 for f in factors]
    # Hadamard: of the two products the first has entries of about 1
    stds[0] = 1.0 if algo == "loha" else stds[0]
    stds[-1] *= 0.1
    return [
        std * torch.randn(f.shape, generator=seed) for f, std in zip(factors, stds, strict=True)
    ]


def _delta(algo: str, values: list[Tensor]) -> Tensor:
    first, second, *rest = (v.flatten(1) for v in values)
    if algo == "lokr":
        return torch.kron(first, second @ rest[0] if rest else second)
    return (second @ first) * (rest[1] @ rest[0] if rest else 1)


def _merged(layer: nn.Module, delta: Tensor) -> nn.Module:
    merged = copy.copy(layer)
    weight = layer.weight + delta.view_as(layer.weight).to(layer.weight)
    weight = nn.Parameter(weight, requires_grad=False)
    merged._parameters = {**layer._parameters, "weight": weight}
    return merged


def distance(got: Tensor, want: Tensor) -> float:
    """How far got is from want, of want's norm; no unit."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def _usage(unet: nn.Module, arm: Arm, batch: Batch) -> dict[str, float | int]:
    def step() -> None:
        _step(unet, arm, batch)

    with _placed(unet, arm.places | arm.frozen):
        known = [*unet.parameters(), *unet.buffers(), *arm.factors]
        saved = usage.saved_bytes(lambda: _loss(arm.compiled or unet, batch), known)
    return {
        "saved_bytes": saved,
        "peak_mib": usage.peak_mib(step, unet.device),
        # what is compiled has no operators
        "aten_calls": "" if arm.compiled else usage.aten_calls(step),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--size", type=int, default=16, help="side of the latents: pixels / 8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--targets", choices=("attn", "attn-mlp"), default="attn")
    parser.add_argument("--algo", choices=("lora", "loha", "lokr"), default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=CLOSE, default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute in backward")
    parser.add_argument("--arms", nargs="+", help="lorakern peft lycoris ...; all when left out")
    parser.add_argument("--compile", action="store_true", help="PEFT under torch.compile too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the timed rounds")
    parser.add_argument("--rounds", type=int, help="fixed number of rounds")
    parser.add_argument("--record", action="store_true", help="append rows to results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="another folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
