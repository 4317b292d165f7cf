"""One denoising call of a Stable Diffusion UNet with image prompts (IP-Adapters).

    python -m bench.unet_call --model sd15 --size 64 --images 4 16 --record

diffusers' own processors, and lorakern's without and with what they keep from call to call, take
turns on one set of random weights. Nothing is timed before all of them predict the same.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lorakern
from bench import check, record, timing, train_step, usage
from lorakern import conditioning

FLOOR = "diffusers"
ARMS = (FLOOR, "lorakern uncached", "lorakern")
# how far, of its norm, a prediction may be from diffusers'
CLOSE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
SCALE = 0.8


@dataclass(frozen=True)
class Images:
    """Tokens of each IP-Adapter (4: base, 16: Plus), and the images that each is given."""

    tokens: tuple[int, ...]
    images: int = 1
    masked: bool = False


IMAGES = {
    "4": Images((4,)),
    "16": Images((16,)),
    "16+16": Images((16, 16)),
    "4+4+4 masked": Images((4,), 3, masked=True),
}
# features of CLIP's image, its patches and their features, width of Plus' projection
ENCODERS = {
    "tiny": (24, 9, 24, 64),
    "sd15": (1024, 257, 1280, 768),
    "sdxl": (1280, 257, 1280, 1280),
}


@dataclass
class Arm:
    """A UNet with processors of its own, on weights that all arms share."""

    unet: nn.Module
    inputs: dict

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.unet(**self.inputs).sample


def main(argv: list[str] | None = None) -> None:
    """Print a table a kind of images, and with --record append its rows."""
    from diffusers import UNet2DConditionModel

    options = _parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    with device:
        unet = UNet2DConditionModel(**train_step.MODELS[options.model])
    unet = nn.Module.to(unet, getattr(torch, options.dtype)).eval().requires_grad_(False)
    for name in options.images:
        rows, layer_calls = measure(unet, name, options, device)
        print(table(rows, layer_calls), flush=True)
        if options.record:
            record.append(rows, record.results_file(device, options.results))


def measure(
    unet: nn.Module, name: str, options: argparse.Namespace, device: torch.device
) -> tuple[list[record.Row], list[int]]:
    """One row an arm, diffusers' first; and the operators that one cross-attention calls.

    Args:
        unet: without image prompts; it is left as it is.
        name: one of IMAGES.

    Raises:
        AssertionError: an arm predicts something else than diffusers, or images change nothing.
    """
    stock = _shared(unet)
    _add_images(stock, IMAGES[name], ENCODERS[options.model])
    inputs = _inputs(stock, IMAGES[name], options)
    arms, first_s = {}, {}
    for arm in ARMS:
        arms[arm] = Arm(_shared(stock), inputs)
        if arm != FLOOR:
            lorakern.accelerate(arms[arm].unet)
            conditioning.cache_ip_adapter(arms[arm].unet, on=arm == "lorakern")
        start = time.perf_counter()
        arms[arm]()
        first_s[arm] = time.perf_counter() - start
    _check(arms, CLOSE[options.dtype])

    used = {
        arm: {"peak_mib": usage.peak_mib(call, device), "aten_calls": usage.aten_calls(call)}
        for arm, call in arms.items()
    }
    layer_calls = [usage.aten_calls(_one_layer(call), idle=False) for call in arms.values()]
    taken = timing.interleave(arms, device, seconds=options.seconds, rounds=options.rounds)
    rows = [
        record.Row(
            op="unet_call",
            case=f"{options.model} {options.size}x{options.size} B{options.batch} T77+{name}",
            dtype=options.dtype,
            backend=arm,
            direction="infer",
            median_us=times.median * 1e6,
            iqr_us=times.iqr * 1e6,
            gb_s="",
            cost_over_frozen=times.over(taken[FLOOR]),
            cost_of_medians=times.median / taken[FLOOR].median,
            # there are no gradients
            saved_bytes=0,
            first_s=first_s[arm],
            rounds=len(times.seconds),
            **used[arm],
            **record.environment(device),
        )
        for arm, times in taken.items()
    ]
    return rows, layer_calls


def table(rows: list[record.Row], layer_calls: list[int]) -> str:
    """The rows as text; a * marks the fastest and the leanest arm."""
    first = rows[0]
    fastest = min(rows, key=lambda r: r.cost_over_frozen)
    leanest = min(rows, key=lambda r: r.peak_mib)
    lines = [
        f"unet_call {first.case} {first.dtype}, {first.device}, {first.threads} threads,"
        f" commit {first.commit}, {first.rounds} rounds",
        f"  {'':20}{'call ms':>10}{'IQR':>8}{'/' + FLOOR:>11}  {'peak MiB':>9} {'calls':>8}"
        f"{'a layer':>9}{'first s':>9}",
    ]
    for row, calls in zip(rows, layer_calls, strict=True):
        lines.append(
            f"  {row.backend:20}{row.median_us / 1e3:10.1f}{row.iqr_us / 1e3:8.1f}"
            f"{row.cost_over_frozen:11.3f}{'*' if row is fastest else ' '} "
            f"{row.peak_mib:9.1f}{'*' if row is leanest else ' '}{row.aten_calls:>8}{calls:>9}"
            f"{row.first_s:9.2f}"
        )
    return "\n".join(lines) + "\n"


def _shared(unet: nn.Module) -> nn.Module:
    """A copy with modules of its own, on the same tensors."""
    return copy.deepcopy(unet, {id(t): t for t in (*unet.parameters(), *unet.buffers())})


def _add_images(unet: nn.Module, images: Images, encoder: tuple[int, ...]) -> None:
    """Random IP-Adapters, as diffusers has them once it has read their files."""
    from diffusers.models import embeddings
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    features, _, patch_features, width = encoder
    text = unet.config.cross_attention_dim
    processors = dict(unet.attn_processors)
    for name in processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(
                attention.inner_dim, text, images.tokens, [SCALE] * len(images.tokens)
            )
    unet.set_attn_processor(processors)
    layers = [
        embeddings.ImageProjection(features, text, tokens)
        if tokens == 4
        else embeddings.IPAdapterPlusImageProjection(
            patch_features, text, width, heads=width // 64, num_queries=tokens
        )
        for tokens in images.tokens
    ]
    unet.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection(layers)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    nn.Module.to(unet, unet.device, unet.dtype).eval().requires_grad_(False)


def _inputs(unet: nn.Module, images: Images, options: argparse.Namespace) -> dict:
    config, like = unet.config, {"dtype": unet.dtype, "device": unet.device}
    features, patches, patch_features, _ = ENCODERS[options.model]
    batch, size = options.batch, options.size

    def given(tokens: int) -> Tensor:
        shape = (features,) if tokens == 4 else (patches, patch_features)
        return torch.randn(batch, images.images, *shape, **like)

    added = {"image_embeds": [given(tokens) for tokens in images.tokens]}
    if config.addition_embed_type == "text_time":
        added["text_embeds"] = torch.randn(batch, 1280, **like)
        added["time_ids"] = torch.full((batch, 6), 8.0 * size, **like)
    inputs = {
        "sample": torch.randn(batch, config.in_channels, size, size, **like),
        "timestep": torch.full((batch,), 500, device=unet.device),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, **like),
        "added_cond_kwargs": added,
    }
    if images.masked:
        masks = torch.rand(1, images.images, 8 * size, 8 * size, device=unet.device)
        inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [masks]}
    return inputs


@check.in_full()
def _check(arms: dict[str, Arm], close: float) -> None:
    """Every arm predicts as diffusers does, from what it kept too; and images are seen."""
    want = arms[FLOOR]()
    for name, arm in arms.items():
        for _ in range(2):
            off = train_step.distance(arm(), want)
            assert off <= close, f"{name} predicts {off:.2e} beside diffusers, want {close:.0e}"
    _set_scale(arms[FLOOR].unet, 0.0)
    moved = train_step.distance(arms[FLOOR](), want)
    _set_scale(arms[FLOOR].unet, SCALE)
    assert moved > 0, "the images change nothing"


def _set_scale(unet: nn.Module, scale: float) -> None:
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale[:] = [scale] * len(processor.scale)


def _one_layer(arm: Arm) -> Callable[[], Tensor]:
    """The last cross-attention of a call, alone, on what it was given."""
    given = []
    layer = [m for n, m in arm.unet.named_modules() if n.endswith("attn2")][-1]
    hook = layer.register_forward_pre_hook(
        lambda _, args, more: given.append((args, more)), with_kwargs=True
    )
    arm()
    hook.remove()
    args, more = given[-1]
    return torch.no_grad()(lambda: layer(*args, **more))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.unet_call", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=train_step.MODELS, default="sd15")
    parser.add_argument("--size", type=int, default=16, help="side of the latents: pixels / 8")
    parser.add_argument("--batch", type=int, default=2, help="2: with and without the prompt")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--dtype", choices=CLOSE, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timed rounds of each")
    parser.add_argument("--rounds", type=int, help="fixed number of rounds")
    parser.add_argument("--record", action="store_true", help="append rows to results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="another folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
