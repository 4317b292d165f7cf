"""The record as one page of HTML: no script, no network; charts are SVG strips in tables."""

import html
import math
from dataclasses import dataclass
from pathlib import Path

from bench import report
from bench.record import Row
from bench.report import TRAINING, Group, Verdict

STYLE = Path(__file__).with_suffix(".css")
# by name, so that an arm has one colour in every chart; kernels are drawn hollow
COLOURS = {
    "lorakern": "ours", "peft": "blue", "peft 16-bit": "sky", "peft compiled": "gold",
    "peft 16-bit compiled": "gold", "lycoris": "purple", "lycoris bypass": "pink",
    "loralib": "green", "diffusers": "blue", "frozen": "grey", "reference": "grey",
    "cpp": "ours", "triton": "blue", "cuda": "green",
}  # fmt: skip
DIRECTIONS = {
    "fwd+bwd": "forward and backward",
    "fwd": "forward, recorded for backward",
    "infer": "forward without gradients",
    "step": "whole training step",
}
# ops that are a whole model
WHOLE = ("train_step", "unet_call")
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis over these values, 0 at its left end; or a linear one of shares."""

    values: list[float]
    shares: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        positive = [v for v in self.values if v > 0] or [1.0]
        return min(positive) / 1.08, max(positive) * 1.08

    def place(self, value: float) -> float:
        """Percent of the width."""
        if self.shares:
            return 1.5 + 97 * min(max(value, 0.0), 1.0)
        low, high = self.ends
        return 1.5 + 97 * max(0.0, math.log(value / low) / math.log(high / low) if value else 0)

    @property
    def ticks(self) -> list[float]:
        """Few round numbers."""
        if self.shares:
            return [0.0, 0.25, 0.5, 0.75, 1.0]
        low, high = self.ends
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
                      (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):  # fmt: skip
            found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
            if len(found) <= 7:
                break
        return found


def render(found: list[Group]) -> str:
    """The whole page."""
    devices: dict[str, list[Group]] = {}
    for group in found:
        devices.setdefault(group.device, []).append(group)
    body = [_summary(device, groups) for device, groups in devices.items()]
    body += [_details(device, groups) for device, groups in devices.items()]
    return _PAGE.format(style=STYLE.read_text(encoding="utf-8"), body="\n".join(body))


def _summary(device: str, groups: list[Group]) -> str:
    rows = [r for g in groups for case in g.cases.values() for r in case.values()]
    trained = [v for g in groups if g.direction in TRAINING for v in g.verdicts.values()]
    judged = [v for g in groups for v in g.verdicts.values()]
    parts = [f"<section><h2>{_text(device)}</h2><p class=facts>{_text(report.facts(rows))}</p>"]
    if not judged:
        return f"{parts[0]}<p>No case has both lorakern and a rival.</p></section>"
    tiles = ""
    if trained:
        mean = report.geometric_mean([v.ratio for v in trained])
        said = f"of the best rival’s time in training, mean of {len(trained)}"
        tiles += _tile(f"{mean:.2f}×", said, "big")
    tiles += "".join(_tile(str(n), word, word) for word, n in report.count(judged).items())
    parts.append(f"<div class=tiles>{tiles}</div>")

    axis = Axis([1.0, *[v.ratio for v in judged]])
    lines = []
    for op, dtype in sorted({(g.op, g.dtype) for g in groups if g.verdicts}, key=_steps_first):
        mine = [g for g in groups if (g.op, g.dtype) == (op, dtype)]
        pairs = [(c, v, g.direction) for g in mine for c, v in g.verdicts.items()]
        # training last, so that it lies on top
        pairs.sort(key=lambda p: p[2] in TRAINING)
        first = [v for _, v, direction in pairs if direction in TRAINING] or [p[1] for p in pairs]
        mean = report.geometric_mean([v.ratio for v in first])
        marks = "".join(_judged(axis, *pair) for pair in pairs)
        marks += _bar(axis.place(mean), "mean")
        counts = report.count([v for _, v, _ in pairs])
        cells = "".join(f"<td class='n {w}'>{n or '·'}</td>" for w, n in counts.items())
        lines.append(
            f"<tr><th><a href='#{_anchor(device, op)}'>{_text(op)}</a></th><td>{_text(dtype)}</td>"
            f"<td class=strip>{_strip(axis, marks)}</td><td class=n>{mean:.2f}</td>{cells}</tr>"
        )
    heads = "".join(f"<th class=n>{head}" for head in ("mean", "faster", "level", "slower"))
    parts.append(
        "<table class='chart brief'><thead><tr><th>op<th class=short>dtype<th class=strip>time of"
        f" lorakern over the best rival’s, a dot a case{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}{_scale(axis, 2, 4)}</tbody></table></section>"
    )
    return "".join(parts)


def _details(device: str, groups: list[Group]) -> str:
    parts = [f"<section><h2>{_text(device)}, op by op</h2>"]
    for op in sorted({g.op for g in groups}, key=_steps_first):
        mine = [g for g in groups if g.op == op]
        mine.sort(key=lambda g: g.direction not in TRAINING)
        rows = [r for g in mine for case in g.cases.values() for r in case.values()]
        parts.append(f"<article id='{_anchor(device, op)}'><h3>{_text(op)}</h3>")
        if op in WHOLE:
            parts += map(_steps, mine)
        else:
            parts += [_legend(rows), _kernels(mine)]
            parts += map(_costs, mine)
            parts.append(_fold("Saved for backward, beyond parameters and input", _saved(mine)))
            parts.append(_fold("Exactness: share of a small update that is lost", _lost(mine)))
        parts.append(_fold(f"All {len(rows)} rows", _rows(mine)) + "</article>")
    return "".join(parts) + "</section>"


def _costs(group: Group) -> str:
    """Cost over the floor: a line a case, a dot an arm, and the gap to the best rival."""
    rows = [r for case in group.cases.values() for r in case.values()]
    axis, lines = Axis([1.0, *[r.cost_over_frozen for r in rows]]), []
    for case, arms in group.cases.items():
        marks, words = "", "<td></td><td></td>"
        if verdict := group.verdicts.get(case):
            ours, rival = verdict.ours.cost_over_frozen, verdict.rival.cost_over_frozen
            marks = _gap(axis.place(ours), axis.place(rival), verdict.word)
            words = (
                f"<td class=n><b>{ours:.2f}</b></td><td><span class={verdict.word}>{verdict.word}"
                f"</span> {rival:.2f} {_text(_name(verdict.rival.backend))}</td>"
            )
        # lorakern last, so that it lies on top
        for row in sorted(arms.values(), key=lambda r: r.backend == "lorakern"):
            said = f"{_name(row.backend)} {row.cost_over_frozen:.3f}×, {_number(row.median_us)} µs"
            said += f" (IQR {_number(row.iqr_us)})"
            marks += _dot(axis.place(row.cost_over_frozen), row, said)
        strip = _strip(axis, marks)
        lines.append(f"<tr><th>{_text(case)}</th><td class=strip>{strip}</td>{words}</tr>")
    floor = next((_name(r.backend) for r in rows if report.is_floor(r)), "floor")
    chart = (
        f"<table class=chart><thead><tr><th><th class=strip>time over that of "
        f"the {_text(floor)}<th class=n>lorakern<th class=words>beside the best rival</tr></thead>"
        f"<tbody>{''.join(lines)}{_scale(axis, 1, 2)}</tbody></table>"
    )
    said = f"{DIRECTIONS.get(group.direction, group.direction)}, {group.dtype}"
    if group.direction in TRAINING and len(group.cases) <= 20:
        return f"<h4>{_text(said)}</h4>{chart}"
    return _fold(said, chart)


def _steps(group: Group) -> str:
    """Bars of a whole step or call: time, and peak memory beside it."""
    parts = []
    for case, arms in group.cases.items():
        slowest = max(r.median_us for r in arms.values())
        peaks = [r.peak_mib for r in arms.values() if r.peak_mib != ""]
        verdict, lines = group.verdicts.get(case), []
        for row in sorted(arms.values(), key=lambda r: r.cost_over_frozen):
            colour = COLOURS.get(row.backend, "grey")
            time = _filled(row.median_us / slowest, colour, f"{row.median_us / 1e3:,.1f} ms")
            peak = images = saved = ""
            if row.peak_mib != "":
                peak = _filled(row.peak_mib / max(peaks), colour, f"{row.peak_mib:,.0f} MiB")
            if row.images_s != "":
                images = f"{row.images_s:.3g}"
            if row.saved_bytes != "":
                saved = f"{row.saved_bytes / MIB:,.0f}"
            lines.append(
                f"<tr class={'mine' if row.backend == 'lorakern' else 'other'}><th>"
                f"{_text(_name(row.backend))}</th><td class=bar>{time}</td>"
                f"<td class=n>{row.cost_over_frozen:.3f}</td><td class=n>{images}</td>"
                f"<td class=bar>{peak}</td><td class=n>{saved}</td></tr>"
            )
        said = f"{case}, {group.dtype}"
        if verdict:
            said += f": {verdict.ratio:.3f}× the time of {_name(verdict.rival.backend)}"
        word = verdict.word if verdict else ""
        floor = next((_name(r.backend) for r in arms.values() if report.is_floor(r)), "floor")
        parts.append(
            f"<h4>{_text(said)} <span class='{word}'>{word}</span></h4>"
            f"<table class=chart><thead><tr><th><th class=bar>time<th class=n>over {_text(floor)}"
            "<th class=n>images/s<th class=bar>peak memory<th class=n>saved MiB</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
        )
    return "".join(parts)


def _saved(groups: list[Group]) -> str:
    """Bytes that each layer keeps for backward; all directions keep the same."""
    return "".join(_plain_chart(g, "saved_bytes") for g in groups if g.direction in TRAINING)


def _lost(groups: list[Group]) -> str:
    """Where rounding to 16 bits loses it; what an output gains by luck is drawn at 0."""
    half = [g for g in groups if g.dtype in ("bfloat16", "float16")]
    return "".join(_plain_chart(g, "lost_share") for g in half if g.direction in TRAINING)


def _plain_chart(group: Group, column: str) -> str:
    """One figure of every arm that has it, with no verdict."""
    shares = column == "lost_share"
    unit, size = ("share lost", 1) if shares else ("KiB", KIB)
    found = {
        case: [(r, getattr(r, column) / size) for r in arms.values() if getattr(r, column) != ""]
        for case, arms in group.cases.items()
    }
    values = [value for pairs in found.values() for _, value in pairs]
    if not values:
        return ""
    axis, lines = Axis(values, shares), []
    for case, pairs in found.items():
        marks = ours = ""
        for row, value in sorted(pairs, key=lambda p: p[0].backend == "lorakern"):
            said = f"{value:.3f}" if shares else _number(value)
            marks += _dot(axis.place(value), row, f"{_name(row.backend)} {said} {unit}")
            ours = said if row.backend == "lorakern" else ours
        strip = _strip(axis, marks)
        lines.append(f"<tr><th>{_text(case)}</th><td class=strip>{strip}</td>"
                     f"<td class=n><b>{ours}</b></td></tr>")  # fmt: skip
    return (
        f"<table class=chart><thead><tr><th>{_text(group.dtype)}<th class=strip>{unit}"
        f"<th class=n>lorakern</tr></thead><tbody>{''.join(lines)}{_scale(axis, 1, 1)}</tbody>"
        "</table>"
    )


def _kernels(groups: list[Group]) -> str:
    """How often each kernel, called by itself, is faster than the spec in plain torch."""
    pairs = [
        (row.backend, row.median_us < arms["reference"].median_us)
        for g in groups for arms in g.cases.values() for row in arms.values()
        if report.is_kernel(row) and "reference" in arms and row.backend != "reference"
    ]  # fmt: skip
    counts = [
        f"{_text(_name(kernel))} {sum(won for k, won in pairs if k == kernel)} of "
        f"{sum(k == kernel for k, _ in pairs)}"
        for kernel in dict.fromkeys(k for k, _ in pairs)
    ]
    said = f"<p class=facts>Faster than plain torch: {', '.join(counts)}.</p>"
    return said if counts else ""


def _rows(groups: list[Group]) -> str:
    """The numbers; what is not the fastest of its kind says by how much."""
    lines = []
    for group in groups:
        for case, arms in group.cases.items():
            for row in arms.values():
                kind = [r for r in arms.values() if report.is_kernel(r) == report.is_kernel(row)]
                kind = [r for r in kind if r.backend != "frozen" or len(kind) == 1]
                behind = row.median_us / min(r.median_us for r in kind) - 1
                mark = "fastest" if behind == 0 else f"+{behind:.0%}"
                mark = "floor" if row.backend == "frozen" else mark
                gb_s = "" if row.gb_s == "" else _number(row.gb_s)
                lines.append(
                    f"<tr><th>{_text(case)}</th><td>{_text(group.dtype)}</td>"
                    f"<td>{_text(group.direction)}</td><td>{_text(_name(row.backend))}</td>"
                    f"<td class=n>{_number(row.median_us)}</td>"
                    f"<td class=n>{_number(row.iqr_us)}</td>"
                    f"<td class=n>{row.cost_over_frozen:.3f}</td><td class=n>{gb_s}</td>"
                    f"<td class=n>{mark}</td><td>{_text(row.commit)}</td>"
                    f"<td>{_text(row.date)}</td></tr>"
                )
    heads = ("case", "dtype", "direction", "arm", "median µs", "IQR", "over floor", "GB/s",
             "of its kind", "commit", "date")  # fmt: skip
    head = "".join(f"<th>{h}" for h in heads)
    return (
        f"<table class=rows><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _legend(rows: list[Row]) -> str:
    """Each arm once, layers before kernels."""
    arms = {r.backend: r for r in rows}
    shown = sorted(arms.values(), key=report.is_kernel)
    items = "".join(
        f"<span><svg width=12 height=12>{_dot(50, r, '')}</svg>{_text(_name(r.backend))}</span>"
        for r in shown
    )
    return f"<p class=legend>{items}</p>"


def _strip(axis: Axis, marks: str) -> str:
    lines = "".join(_bar(axis.place(t), "one" if t == 1 else "tick") for t in axis.ticks)
    return f"<svg width='100%' height=22>{lines}{marks}</svg>"


def _scale(axis: Axis, before: int, after: int) -> str:
    numbers = "".join(f"<text x='{axis.place(t):.2f}%' y=12>{t:,g}</text>" for t in axis.ticks)
    return (
        f"<tr class=scale><td colspan={before}></td><td class=strip><svg width='100%' height=16>"
        f"{numbers}</svg></td><td colspan={after}></td></tr>"
    )


def _judged(axis: Axis, case: str, verdict: Verdict, direction: str) -> str:
    said = f"{case}, {direction}: {verdict.ratio:.2f}× {_name(verdict.rival.backend)}"
    at, size = axis.place(verdict.ratio), 4.5 if direction in TRAINING else 3
    look = verdict.word if direction in TRAINING else f"{verdict.word} hollow"
    return f"<circle class='{look}' cx='{at:.2f}%' cy=11 r={size}>{_title(said)}</circle>"


def _dot(at: float, row: Row, said: str) -> str:
    colour, size = COLOURS.get(row.backend, "grey"), 5.5 if row.backend == "lorakern" else 4
    look = f"{colour} hollow" if report.is_kernel(row) else colour
    return f"<circle class='{look}' cx='{at:.2f}%' cy='50%' r={size}>{_title(said)}</circle>"


def _gap(ours: float, rival: float, word: str) -> str:
    left, width = min(ours, rival), abs(ours - rival)
    return f"<rect class='{word} gap' x='{left:.2f}%' y=7 width='{width:.2f}%' height=8 />"


def _bar(at: float, look: str) -> str:
    return f"<line class={look} x1='{at:.2f}%' x2='{at:.2f}%' y1=0 y2=22 />"


def _filled(share: float, colour: str, said: str) -> str:
    return f"<div class='fill {colour}' style='--share:{share:.4f}'></div><i>{said}</i>"


def _tile(value: str, said: str, look: str) -> str:
    return f"<div class='tile {look}'><b>{value}</b>{said}</div>"


def _fold(said: str, inside: str) -> str:
    return inside and f"<details><summary>{_text(said)}</summary>{inside}</details>"


def _title(said: str) -> str:
    return said and f"<title>{_text(said)}</title>"


def _name(arm: str) -> str:
    return report.NAMES.get(arm, arm)


def _steps_first(key: str | tuple[str, str]) -> tuple:
    return (key if isinstance(key, str) else key[0]) not in WHOLE, key


def _number(value: float) -> str:
    """Three digits or more, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _anchor(device: str, op: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{device} {op}".lower())


def _text(text: str) -> str:
    return html.escape(str(text))


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>lorakern, measured</title><style>
{style}</style></head><body><main>
<header><h1>lorakern, measured</h1>
<p>Every library’s layer in one process, on one frozen weight, timed in turns after all of them were
checked. A cost is the time over that of the frozen layer in the same round: 1 is free.</p></header>
{body}
<footer><p>Only measured rows, the newest of each device, op, case, dtype, direction and arm. Means
are geometric, over training (forward and backward, or a step). Filled dots are training, hollow
ones a forward alone; in the charts of an op, hollow dots are kernels called by themselves.
<b>Level</b> is apart by less than 2 %, or than two standard errors of the medians, or in fewer
than three rounds. The rival is the fastest layer of another library; an op that no library has is
beside plain torch.</p></footer>
</main></body></html>
"""
