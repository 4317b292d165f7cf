"""Turns the record into one HTML page that needs nothing else, and into the tables of README.

    python -m bench.report --out report.html --readme

Of each (device, op, case, dtype, direction, arm) the newest row counts, whether it is flattering
or not.
"""

import argparse
import csv
import dataclasses
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench import record
from bench.record import Row

BEGIN, END = "<!-- bench tables: python -m bench.report --readme -->", "<!-- end of tables -->"
TRAINING = ("fwd+bwd", "step")
# less than this between two arms is no win, however many rounds there were
LEVEL = 0.02
NAMES = {
    "peft": "PEFT",
    "peft 16-bit": "PEFT 16-bit",
    "peft compiled": "PEFT compiled",
    "peft 16-bit compiled": "PEFT 16-bit compiled",
    "lycoris": "LyCORIS",
    "lycoris bypass": "LyCORIS bypass",
    "diffusers": "diffusers",
    "frozen": "frozen layer",
    "cpp": "C++ kernel",
    "triton": "Triton kernel",
    "cuda": "CUDA kernel",
    "reference": "plain torch",
}


@dataclass(frozen=True)
class Verdict:
    """lorakern beside the fastest rival on the same case."""

    ours: Row
    rival: Row

    @property
    def ratio(self) -> float:
        """Time of lorakern over the rival's, each over its own floor; below 1 lorakern wins."""
        return self.ours.cost_over_frozen / self.rival.cost_over_frozen

    @property
    def word(self) -> str:
        """faster, level or slower; level is apart by less than 2 % or two standard errors."""
        apart = math.log(self.ratio)
        if abs(apart) <= max(LEVEL, 2 * math.hypot(_error(self.ours), _error(self.rival))):
            return "level"
        return "faster" if apart < 0 else "slower"


@dataclass(frozen=True)
class Group:
    """What was measured of one op on one device in one dtype and direction, by case and arm."""

    device: str
    op: str
    dtype: str
    direction: str
    cases: dict[str, dict[str, Row]]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for rows in self.cases.values() for arm in rows))

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By case, where there is lorakern and a rival."""
        found = {}
        for case, rows in self.cases.items():
            fastest = min(rivals(rows), key=lambda r: r.cost_over_frozen, default=None)
            if fastest and "lorakern" in rows:
                found[case] = Verdict(rows["lorakern"], fastest)
        return found


def main(argv: list[str] | None = None) -> None:
    """Write the page, and with --readme the tables."""
    from bench import page, tables

    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of CSV files")
    parser.add_argument("--out", type=Path, default=record.ROOT / "build" / "report.html")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=record.ROOT / "README.md",
        help="rewrite the tables in this file too, and the means beside the CSV files",
    )
    options = parser.parse_args(argv)
    try:
        found = groups(read(options.results))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page.render(found), encoding="utf-8")
        print(f"{options.out}: {summary(found)}")
        if options.readme:
            old = options.readme.read_text(encoding="utf-8")
            options.readme.write_text(between(old, tables.headlines(found)), encoding="utf-8")
            (options.results / "means.md").write_text(tables.means(found), encoding="utf-8")
    except ValueError as wrong:
        raise SystemExit(f"bench.report: {wrong}") from None


def read(folder: Path) -> list[Row]:
    """Every row of every CSV file of a folder, in order.

    Raises:
        ValueError: there are none, a file has none or lacks a column, or a row is not whole.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"no CSV file in {folder}; python -m bench.run lora_linear --record")
    return [row for file in files for row in read_file(file)]


def newest(rows: list[Row]) -> list[Row]:
    """Of each (device, op, case, dtype, direction, arm) the row of the latest date; last wins."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        key = (row.device, row.op, row.case, row.dtype, row.direction, row.backend)
        if key not in kept or row.date >= kept[key].date:
            kept[key] = row
    return list(kept.values())


def groups(rows: list[Row]) -> list[Group]:
    """The newest rows, put together by device, op, dtype and direction."""
    found: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in newest(rows):
        cases = found.setdefault((row.device, row.op, row.dtype, row.direction), {})
        cases.setdefault(row.case, {})[row.backend] = row
    return [Group(*key, cases) for key, cases in found.items()]


def is_kernel(row: Row) -> bool:
    """A kernel called by itself, and not a layer with autograd around it."""
    return row.saved_bytes == ""


def is_floor(row: Row) -> bool:
    """What every cost of its case was divided by."""
    return row.cost_over_frozen == row.cost_of_medians == 1


def rivals(rows: dict[str, Row]) -> list[Row]:
    """Other libraries' layers; where no library has one, the floor, which is plain torch.

    "lorakern uncached" and the like are no rivals.
    """
    layers = [r for r in rows.values() if not is_kernel(r) and r.backend != "frozen"]
    others = [r for r in layers if not r.backend.startswith("lorakern")]
    return others or [r for r in rows.values() if r.backend == "reference" and is_floor(r)]


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm: 2x and 0.5x are 1x."""
    return math.exp(statistics.fmean(map(math.log, values)))


def count(verdicts: list[Verdict]) -> dict[str, int]:
    """How often lorakern is faster, level and slower."""
    words = Counter(v.word for v in verdicts)
    return {word: words[word] for word in ("faster", "level", "slower")}


def summary(found: list[Group]) -> str:
    """One line a device: ratio to the best rival in training, and all wins and losses."""
    lines = []
    for device in dict.fromkeys(g.device for g in found):
        mine = [g for g in found if g.device == device]
        trained = [v for g in mine if g.direction in TRAINING for v in g.verdicts.values()]
        others = [v for g in mine if g.direction not in TRAINING for v in g.verdicts.values()]
        line = f"{device}:"
        for what, verdicts in (("training", trained), ("forward alone", others)):
            if verdicts:
                mean = geometric_mean([v.ratio for v in verdicts])
                counts = ", ".join(f"{n} {word}" for word, n in count(verdicts).items())
                line += f" {what} {mean:.2f}x the best rival's time ({counts});"
        lines.append(line.rstrip(";") if line[-1] == ";" else f"{line} no case with a rival")
    return "\n".join(lines)


def facts(rows: list[Row]) -> str:
    """Threads, versions, commits and dates of rows, each once."""
    first, last = min(r.date for r in rows), max(r.date for r in rows)
    each = {
        "threads": {f"{r.threads:.0f}" for r in rows if r.threads != ""},
        "torch": {r.torch for r in rows},
        "triton": {r.triton for r in rows},
        "": {v.replace("=", " ") for r in rows for v in r.versions.split()},
        "commit": {r.commit for r in rows},
    }
    parts = [f"{name} {', '.join(sorted(v - {''}))}".strip() for name, v in each.items() if v]
    return " · ".join([*filter(None, parts), first if first == last else f"{first} to {last}"])


def between(readme: str, made: str) -> str:
    """The text with what is between its markers made anew.

    Raises:
        ValueError: the text has not both markers, in order, once.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"want {BEGIN!r} and then {END!r}, once, in the README")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def read_file(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text)
        lacking = [c for c in record.COLUMNS if c not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{file} lacks columns: {', '.join(lacking)}")
        rows = []
        for line in reader:
            try:
                rows.append(Row(**{f.name: _value(f, line) for f in dataclasses.fields(Row)}))
            except ValueError as wrong:
                raise ValueError(f"{file}, line {reader.line_num}: {wrong}") from None
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _value(field: dataclasses.Field, line: dict) -> float | str:
    text = line[field.name]
    if text is None:
        raise ValueError(f"the row ends before {field.name}")
    # the annotations: str alone, a number, or a number that may be missing
    if field.type is str or (text == "" and field.type is not float):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{field.name} is {text!r}, want a number") from None


def _error(row: Row) -> float:
    # of a median, for normal noise: 1.253 σ/√n with σ = IQR/1.349; two rounds do not tell σ
    if row.rounds == "" or row.rounds < 3:
        return math.inf
    return 0.93 * row.iqr_us / row.median_us / math.sqrt(row.rounds)


if __name__ == "__main__":
    main()
