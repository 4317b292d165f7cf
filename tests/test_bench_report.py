"""The report: the newest rows count, wins and losses are counted, a wrong file is named."""

import html.parser

import pytest

from bench import page, record, report


def row(backend="lorakern", cost=1.0, **changed):
    given = {
        "op": "lora_linear", "case": "O8", "dtype": "float32", "direction": "fwd+bwd",
        "median_us": 100 * cost, "iqr_us": 1.0, "gb_s": 1.0, "cost_over_frozen": cost,
        "cost_of_medians": cost, "saved_bytes": "" if backend in ("cpp", "reference") else 64,
        "rounds": 100, "threads": 2, "device": "A <GPU>", "torch": "2.13", "commit": "abc",
        "date": "2026-01-02",
    }  # fmt: skip
    return record.Row(backend=backend, **{**given, **changed})


ROWS = [row("frozen"), row("lorakern", 1.2), row("peft", 1.5), row("cpp", 0.9), row("loralib", 1.4)]


def verdict(rows):
    (group,) = report.groups(rows)
    return group.verdicts.get("O8")


def test_the_newest_row_counts_even_if_it_is_worse(tmp_path):
    file = tmp_path / "cpu.csv"
    record.append([*ROWS, row("lorakern", 2.0), row("lorakern", 0.5, date="2025-01-01")], file)
    (found,) = report.groups(report.read(tmp_path))
    assert found.cases["O8"]["lorakern"].cost_over_frozen == 2.0
    assert found.verdicts["O8"].rival.backend == "loralib"
    assert found.verdicts["O8"].word == "slower"


@pytest.mark.parametrize(
    ("ours", "rounds", "word"),
    [(0.9, 100, "faster"), (1.1, 100, "slower"), (1.01, 100, "level"), (0.9, 2, "level")],
)
def test_a_win_is_more_than_noise(ours, rounds, word):
    assert verdict([row("frozen"), row("lorakern", ours), row("peft", rounds=rounds)]).word == word
    wide = row("peft", iqr_us=90.0, rounds=5)
    assert verdict([row("frozen"), row("lorakern", ours), wide]).word == "level"


def test_rivals_are_layers_or_else_plain_torch():
    assert verdict(ROWS).rival.backend == "loralib"
    assert verdict([row("frozen"), row("lorakern"), row("cpp", 0.5)]) is None
    deltas = [row("lorakern", 0.8), row("cpp", 0.5), row("reference")]
    assert verdict(deltas).rival.backend == "reference"
    attention = [row("diffusers"), row("lorakern", 0.8), row("reference", 3.0)]
    assert verdict(attention).ratio == 0.8
    assert verdict([*attention, row("lorakern uncached", 0.7)]).ratio == 0.8


def test_the_page_is_whole_and_alone(tmp_path, capsys):
    step = {"op": "train_step", "direction": "step", "peak_mib": 10.0, "images_s": 2.0}
    more = [row("frozen", **step), row("lorakern", 1.1, **step), row("peft", 1.0, **step)]
    call = {"op": "unet_call", "direction": "infer", "peak_mib": 9.0, "saved_bytes": 0}
    more += [row("diffusers", **call), row("lorakern", 0.9, **call)]
    half = [row("lorakern", dtype="bfloat16", lost_share=0.001), row("new arm", 3.0,
            dtype="bfloat16", lost_share=0.6, saved_bytes=0)]  # fmt: skip
    record.append([*ROWS, *more, *half], tmp_path / "gpu.csv")
    out = tmp_path / "deeper" / "report.html"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    text = out.read_text()
    assert not [word for word in ("http", "<script", "<link", "<GPU>", "nan") if word in text]
    for said in ("A &lt;GPU&gt;", "lora_linear", "train_step", "2026-01-02", "abc", "new arm",
                 "C++ kernel", "10 MiB", "KiB", "share lost"):  # fmt: skip
        assert said in text, said
    assert "over diffusers" in text and "over frozen layer" in text
    # lora_linear in both dtypes, and PEFT's step, which wins; diffusers' call, which does not
    printed = capsys.readouterr().out
    assert "2 faster, 0 level, 1 slower" in printed and "1 faster, 0 level, 0 slower" in printed
    assert [text.count(f"<b>{n}</b>{word}") for n, word in ((3, "faster"), (1, "slower"))] == [1, 1]
    assert unclosed(text) == []


def unclosed(text):
    """Tags that must be closed, and are not."""
    stack, wrong = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("section", "article", "table", "tbody", "details", "svg", "div", "span"):
                stack.append(tag)

        def handle_endtag(self, tag):
            if stack and tag == stack[-1]:
                stack.pop()
            elif tag in stack:
                wrong.append(tag)

    Parser().feed(text)
    return stack + wrong


def test_axes():
    axis = page.Axis([0.5, 2.0])
    assert axis.place(0.5) < axis.place(1.0) < axis.place(2.0) <= 100
    assert axis.place(1.0) == pytest.approx(50, abs=1)
    assert 1 in axis.ticks and 3 <= len(axis.ticks) <= 7
    assert page.Axis([0.0, 0.0]).place(0.0) == axis.place(0.0) < axis.place(0.5)


def test_the_means_beside_the_files_and_the_tables_of_the_readme(tmp_path):
    shape = {"case": "O320 I320 M4096 R16 bias", "device": "Intel(R) X(R) Processor @ 2.5GHz 6 85"}
    step = {"op": "train_step", "direction": "step", "case": "sd15 16x16 B4 attn-mlp lokr R8"}
    steps = [row("frozen", **step), row("lorakern", 1.1, peak_mib=160.4, **step),
             row("peft", 1.4, peak_mib=392.0, **step)]  # fmt: skip
    record.append([*ROWS, row("lorakern", 0.3, case="O9"), row("peft", 1.2, case="O9"), *steps,
                   row("lorakern", 1.24, **shape), row("peft", 1.5, **shape),
                   row("lycoris", 1.496, **shape)], tmp_path / "gpu.csv")  # fmt: skip
    readme = tmp_path / "README.md"
    command = ["--results", str(tmp_path), "--out", str(tmp_path / "a.html")]
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.main([*command, "--readme", str(readme)])
        text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text and text.count(report.BEGIN) == 1
    # of the layers only known shapes; the best rival in brackets
    assert "| LoRA R16 | Intel X 6 85 |  | **1.24** (1.50) |  |  |" in text
    assert text.count("| LoRA ") == 1
    name = "SD 1.5 128 px, 4 images, attention and MLP, LoKr R8"
    assert f"| {name} | A <GPU> | 100, 1 % | **1.10**, 160 | 1.40, 392 |" in text
    # the means of 1.2, 0.3 and of 1.5, 1.2; loralib was not measured on both cases
    means = (tmp_path / "means.md").read_text()
    assert "| `lora_linear` | float32 | 2 | **0.60** | 1.34 |  | 2 / 0 / 0 |" in means
    for wrong in ("no markers", f"{report.END}{report.BEGIN}", report.BEGIN):
        readme.write_text(wrong)
        with pytest.raises(SystemExit, match="README"):
            report.main([*command, "--readme", str(readme)])
        assert readme.read_text() == wrong


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    def message():
        with pytest.raises(SystemExit) as raised:
            report.main(["--results", str(tmp_path), "--out", str(tmp_path / "a.html")])
        return str(raised.value)

    assert "no CSV file" in message()
    file = tmp_path / "gpu.csv"
    file.write_text("")
    assert "gpu.csv lacks columns: op, case" in message()
    header = ",".join(record.COLUMNS)
    file.write_text(header.replace("commit,", "") + "\n")
    assert message().endswith("gpu.csv lacks columns: commit")
    file.write_text(header + "\n")
    assert message().endswith("gpu.csv has no rows")
    record.append(ROWS, file)
    good = file.read_text()
    file.write_text(good + "lora_linear,O8,float32")
    assert "gpu.csv, line 7: the row ends before backend" in message()
    file.write_text(good.replace(",1.5,1.5,", ",fast,1.5,"))
    assert "gpu.csv, line 4: cost_over_frozen is 'fast', want a number" in message()
    assert not (tmp_path / "a.html").exists()
