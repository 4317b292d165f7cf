"""Checks, then times every kernel of an op and the layer of every library, side by side.

    python -m bench.run lora_linear --case O320 --dtype float32 --record

A kernel, a lorakern layer or a peer that computes something wrong stops the run before anything
of its case is timed.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench import check, peers, record, timing, usage
from bench.peers import Layer
from lorakern import backend
from lorakern.testing import tensors

OPS = sorted(p.stem for p in (Path(__file__).parent / "ops").glob("[!_]*.py"))
DTYPES = ("float32", "bfloat16", "float16")
Step = Callable[[], object]


def main(argv: list[str] | None = None) -> None:
    """Print a table of each case and dtype, and with --record append its rows."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    bench = importlib.import_module(f"bench.ops.{options.op}")
    cases = [c for c in bench.CASES if not options.case or any(w in str(c) for w in options.case)]
    if not cases:
        raise SystemExit(f"no case has {options.case}: {'; '.join(map(str, bench.CASES))}")
    for gone in record.missing():
        print(f"not timed, for it is not installed: {gone}")
    for case in cases:
        for dtype in options.dtype:
            rows = measure(bench, case, getattr(torch, dtype), device, options)
            print(table(rows, bench.FLOOR), flush=True)
            if options.record:
                record.append(rows, record.results_file(device, options.results))


def measure(
    bench: ModuleType, case: object, dtype: torch.dtype, device: torch.device, options
) -> list[record.Row]:
    """Rows of one case, every arm in every direction.

    Args:
        bench: a module of bench.ops; case: one of its CASES.
        options: those of `main`; backends, seconds, rounds and busy are read.

    Raises:
        AssertionError: a kernel, the lorakern layer or a peer is wrong on this very case.
    """
    args = bench.inputs(case, dtype, device)
    layers = bench.layers(args)
    if options.compile:
        layers |= peers.compiled(layers)
    backward_args = check.check(bench, args, layers)
    dy, trained = check.dy_of(bench, backward_args), layers["lorakern"].factors
    lost, where = check.lost_shares(bench, args), record.environment(device)
    rows = []
    for direction in bench.DIRECTIONS:
        steps = _layer_steps(layers, args[0], dy, direction)
        steps |= _kernel_steps(bench, args, backward_args, direction)
        if options.backends:
            steps = {n: s for n, s in steps.items() if n in (*options.backends, bench.FLOOR)}
        taken = timing.interleave(
            steps,
            device,
            seconds=options.seconds,
            rounds=options.rounds,
            clock=time.thread_time if options.busy else time.perf_counter,
        )
        for name, times in taken.items():
            rows.append(
                record.Row(
                    op=bench.__name__.rpartition(".")[2],
                    case=str(case),
                    dtype=str(dtype).removeprefix("torch."),
                    backend=name,
                    direction=direction,
                    median_us=times.median * 1e6,
                    iqr_us=times.iqr * 1e6,
                    gb_s=_traffic(args, dy, direction, trained) / times.median / 1e9,
                    cost_over_frozen=times.over(taken[bench.FLOOR]),
                    cost_of_medians=times.median / taken[bench.FLOOR].median,
                    saved_bytes=_saved(layers[name], args) if name in layers else "",
                    lost_share=lost.get(name, ""),
                    rounds=len(times.seconds),
                    **where,
                )
            )
    return rows


def table(rows: list[record.Row], floor: str) -> str:
    """Rows of one case as text; a * marks the layer and the kernel of the lowest cost."""
    first = rows[0]
    directions = list(dict.fromkeys(r.direction for r in rows))
    by = {(r.backend, r.direction): r for r in rows}
    names = list(dict.fromkeys(r.backend for r in rows))
    kernels = [n for n in names if by[n, directions[0]].saved_bytes == ""]
    best = set()
    for direction in directions:
        for group in (set(names) - set(kernels) - {floor}, kernels):
            if group:
                best.add(min((by[n, direction].cost_over_frozen, n, direction) for n in group)[1:])

    lines = [
        f"{first.op} {first.case} {first.dtype}, {first.device}, {first.threads} threads,"
        f" commit {first.commit}",
        f"  {'':20}"
        + "".join(f"{d + ' us':>12}{'IQR':>11}{'/' + floor:>11}  " for d in directions)
        + f"{'saved KiB':>11}{'lost':>7}",
    ]
    for name in names:
        line = f"  {name:20}"
        for direction in directions:
            row = by[name, direction]
            star = "*" if (name, direction) in best else " "
            line += f"{row.median_us:12.1f}{row.iqr_us:11.1f}{row.cost_over_frozen:11.2f}{star} "
        line += f"{'' if name in kernels else f'{row.saved_bytes / 1024:.1f}':>11}"
        lines.append(line + f"{'' if row.lost_share == '' else f'{row.lost_share:.2f}':>7}")
    return "\n".join(lines) + "\n"


def _layer_steps(
    layers: dict[str, Layer], x: Tensor, dy: Tensor | list[Tensor], direction: str
) -> dict[str, Step]:
    x = x.detach().requires_grad_()

    def step(layer: Layer) -> Step:
        call, wanted = layer.call, (x, *layer.factors)
        if direction == "infer":
            return torch.no_grad()(lambda: call(x))
        if direction == "fwd":
            return lambda: call(x)
        return lambda: torch.autograd.grad(call(x), wanted, dy)

    return {name: step(layer) for name, layer in layers.items()}


def _kernel_steps(
    bench: ModuleType, args: tuple, backward_args: tuple, direction: str
) -> dict[str, Step]:
    def step(name: str) -> Step:
        forward = backend.OPS[bench.FORWARD].load(name)
        if direction != "fwd+bwd":
            return lambda: forward(*args)
        backward = backend.OPS[bench.BACKWARD].load(name)
        return lambda: (forward(*args), backward(*backward_args))

    able = check.able(bench.FORWARD, args)
    if direction == "fwd+bwd":
        also = check.able(bench.BACKWARD, backward_args)
        able = [name for name in able if name in also]
    if args[0].device.type == "cpu" and "triton" in able:
        # the time of its interpreter says nothing
        able.remove("triton")
    return {name: step(name) for name in able}


def _saved(layer: Layer, args: tuple) -> int:
    x = args[0].detach().requires_grad_()
    known = [x, *layer.factors, *tensors(args)]
    return usage.saved_bytes(lambda: layer.call(x), known)


def _traffic(args: tuple, dy: Tensor | list[Tensor], direction: str, trained: tuple) -> int:
    """Bytes of the inputs and results, each once; backward reads dy, gives dx and the trained."""
    given, outputs = tensors(args), tensors((dy,))
    forward = _bytes(given) + _bytes(outputs)
    if direction != "fwd+bwd":
        return forward
    return forward + _bytes([*outputs, *given]) + _bytes([args[0], *trained])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--case", action="append", help="part of a case's name; may be repeated")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        help="float16 takes minutes a case where the CPU has no such arithmetic",
    )
    parser.add_argument("--backends", nargs="+", help="kernels, layers: cpp lorakern peft ...")
    parser.add_argument("--compile", action="store_true", help="PEFT under torch.compile too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="a direction of a case")
    parser.add_argument("--rounds", type=int, help="fixed number of rounds a direction")
    parser.add_argument(
        "--record", action="store_true", help="append to bench/results/<device>.csv"
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="another folder")
    parser.add_argument(
        "--busy", action="store_true", help="CPU time of one thread, on a machine with other work"
    )
    options = parser.parse_args(argv)
    if options.busy and (options.record or options.threads != 1 or options.device != "cpu"):
        parser.error("--busy is a look with --threads 1 on a CPU, not a record")
    return options


if __name__ == "__main__":
    main()
