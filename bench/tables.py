"""The record as Markdown: the tables of README.md, and of bench/results/means.md the means."""

import re

from bench import report
from bench.record import Row
from bench.report import NAMES, TRAINING, Group, Verdict

LAYERS = {"lora_linear": "LoRA", "kron_linear": "LoKr", "hada_linear": "LoHa", "dora": "DoRA"}
# layers of Stable Diffusion, as cases begin
SHAPES = {
    "O1280 I1280 M1024": "1280 → 1280, 1024 rows",
    "O320 I320 M4096": "320 → 320, 4096 rows",
    "O2560 I320 M4096": "320 → 2560, 4096 rows",
    "O320 I768 M77": "768 → 320, 77 rows",
}
MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL"}
ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa"}
MEANS = (
    "# What was measured\n\n"
    "Time of training over the frozen layer's or UNet's (of an op that no frozen layer has, over"
    " its own floor), as a geometric mean over the cases that its bench names; bold is the least."
    " The last column counts cases: apart by less than 2 % or two standard errors is level. Every"
    " row is in the CSV files beside this one; `python -m bench.report --readme` makes it of them."
)


def headlines(found: list[Group]) -> str:
    """Layers by shape, a table a dtype, and whole training steps."""
    trained = [g for g in found if g.direction in TRAINING]
    dtypes = dict.fromkeys(["float32", *(g.dtype for g in trained)])
    blocks = [_layers([g for g in trained if g.dtype == dtype], dtype) for dtype in dtypes]
    return "\n\n".join(filter(None, [*blocks, _steps(trained)]))


def means(found: list[Group]) -> str:
    """A page with a table a device: geometric mean cost in training, by op and arm."""
    blocks = [MEANS]
    for device in dict.fromkeys(g.device for g in found):
        mine = [g for g in found if g.device == device and g.direction in TRAINING and g.verdicts]
        shown = dict.fromkeys(r.backend for g in mine for rows in g.cases.values()
                              for r in report.rivals(rows) if not report.is_floor(r))  # fmt: skip
        arms = ["lorakern", *shown]
        head = ["op", "dtype", "cases", *[NAMES.get(a, a) for a in arms],
                "faster / level / slower than the best"]  # fmt: skip
        lines = []
        # dtypes of an op together, in order of appearance
        ops = list(dict.fromkeys(g.op for g in mine))
        for group in sorted(mine, key=lambda g: ops.index(g.op)):
            costs = {arm: _mean_cost(group, arm) for arm in arms}
            best = min(c for c in costs.values() if c is not None)
            counts = report.count(list(group.verdicts.values())).values()
            cells = [_bold(c, c == best) for c in costs.values()]
            lines.append([f"`{group.op}`", group.dtype, str(len(group.cases)), *cells,
                          " / ".join(map(str, counts))])  # fmt: skip
        rows = [r for g in mine for cases in g.cases.values() for r in cases.values()]
        if rows:
            blocks.append(f"{device}; {report.facts(rows)}:\n\n{_markdown(head, 2, lines)}")
    return "\n\n".join(blocks) + "\n"


def _layers(groups: list[Group], dtype: str) -> str:
    lines = {}
    for group in sorted(groups, key=lambda g: [*LAYERS, g.op].index(g.op)):
        for case, verdict in group.verdicts.items():
            shape = next((s for s in SHAPES if case.startswith(f"{s} ")), None)
            if shape and group.op in LAYERS:
                options = case.removeprefix(shape).removesuffix(" bias").replace(" F", ", factor ")
                name = LAYERS[group.op] + options
                cells = lines.setdefault((name, group.device), dict.fromkeys(SHAPES, ""))
                cells[shape] = _both(verdict)
    # an adapter's devices together
    names = list(dict.fromkeys(name for name, _ in lines))
    ordered = sorted(lines, key=lambda line: names.index(line[0]))
    body = [[line[0], _short(line[1]), *lines[line].values()] for line in ordered]
    return _markdown([f"layer, {dtype}", "device", *SHAPES.values()], 2, body) if body else ""


def _steps(groups: list[Group]) -> str:
    mine = [g for g in groups if g.op == "train_step"]
    arms = [arm for arm in dict.fromkeys(a for g in mine for a in g.arms) if arm != "frozen"]
    body = []
    for case in sorted({case for g in mine for case in g.cases}):
        for group in mine:
            rows = group.cases.get(case, {})
            verdict = group.verdicts.get(case)
            if not verdict:
                continue
            won = verdict.word == "faster"
            cells = [_step_cell(rows.get(a), won and a == "lorakern") for a in arms]
            name = _step_name(case) + f", {group.dtype}" * (group.dtype != "float32")
            ours = verdict.ours
            run = f"{ours.rounds:.0f}, {100 * ours.iqr_us / ours.median_us:.0f} %"
            body.append([name, _short(group.device), run, *cells])
    head = ["step: cost, MiB", "device", "rounds, spread", *[NAMES.get(a, a) for a in arms]]
    return _markdown(head, 3, body) if body else ""


def _step_cell(row: Row | None, won: bool) -> str:
    return f"{_bold(row.cost_over_frozen, won)}, {row.peak_mib:.0f}" if row else ""


def _step_name(case: str) -> str:
    model, size, batch, targets, *rest = case.split()
    algorithm = next((ALGORITHMS[word] for word in rest if word in ALGORITHMS), "LoRA")
    rank = next(word for word in rest if word[0] == "R")
    layers = {"attn": "attention", "attn-mlp": "attention and MLP"}[targets]
    count = "" if batch == "B1" else f", {batch[1:]} images"
    recomputed = ", checkpointing" * ("checkpointing" in rest)
    pixels = 8 * int(size.partition("x")[0])
    base = f"{MODELS.get(model, model)} {pixels} px"
    return f"{base}{count}, {layers}{recomputed}, {algorithm} {rank}"


def _short(device: str) -> str:
    """Without what the numbers of family and model say too."""
    return re.sub(r"\(R\)| Processor| @ \S+", "", device)


def _mean_cost(group: Group, arm: str) -> float | None:
    """None where an arm has not every case, for its mean would be of other cases."""
    if any(arm not in rows for rows in group.cases.values()):
        return None
    return report.geometric_mean([rows[arm].cost_over_frozen for rows in group.cases.values()])


def _both(verdict: Verdict) -> str:
    ours = _bold(verdict.ours.cost_over_frozen, verdict.word == "faster")
    return f"{ours} ({verdict.rival.cost_over_frozen:.2f})"


def _bold(cost: float | None, won: bool) -> str:
    if cost is None:
        return ""
    return f"**{cost:.2f}**" if won else f"{cost:.2f}"


def _markdown(head: list[str], words: int, body: list[list[str]]) -> str:
    """A table whose first columns are words and the others numbers."""
    rule = ["---"] * words + ["--:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
