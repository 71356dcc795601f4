"""`curvadion report`: what it reads, what it makes of seeds, and that its page stands alone."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="tables are shown with rich: install the [report] extra")
pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib: install the [report] extra")

from curvadion.cli import main
from curvadion.report import drawing, run_figures, study_figures
from curvadion.report.display import live_line
from curvadion.report.page import SCRIPT, harmless
from curvadion.report.runs import Run, provenance, read_lines, run_tables
from curvadion.report.studies import Spread, aggregate, case_name, read_links, sensitivity, study_table

HARDWARE = {"device": "cpu, 2 cores", "torch": "2.13.0", "python": "3.11.7", "commit": "abc1234"}


def write_lines(file: Path, records: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def make_run(folder: Path, *, new: bool, optimizer: str = "curvadion", steps: int = 60) -> Path:
    """Write a run as scripts/train.py does: today, or (not `new`) before it counted wire bytes and read every
    matrix."""
    draw, matrices = (
        random.Random(0),
        [f"layers.{i}.{name}.weight" for i in range(4) for name in ("wq", "wk", "wv", "wo", "w1", "w2")],
    )
    records = []
    for step in range(1, steps + 1):
        synchronized = step <= 5 or step % 7 == 0
        sent, rmmc = (900_000.0 if synchronized else 8.0), draw.lognormvariate(-1.5, 0.6)
        record = {
            "step": step,
            "loss": 1.5 + 4 * 0.93**step + draw.gauss(0, 0.08),
            "lr": 0.01,
            "tokens": 4096,
            "seconds": 0.2,
        }
        record |= {
            "rmmc_matrix": matrices[0],
            "curvadion/rmmc_max": rmmc if step > 1 else None,
            "curvadion/synchronized": float(synchronized),
        }
        record |= {"curvadion/bytes/replicate": sent, "curvadion/dense_bf16_bytes": 800_000.0}
        record |= {"curvadion/bytes/replicate/gate": 8.0, "curvadion/bytes/replicate/factors": sent - 8.0}
        if new:
            record |= {"curvadion/wire/replicate": 1.5 * sent, "curvadion/dense_bf16_wire": 1_200_000.0}
            record["drift"] = 0.01 * draw.random() if synchronized and step > 5 else None
            if step % 5 == 0:
                record["rmmc"] = {name: draw.lognormvariate(-2.5, 0.8) for name in matrices} | {
                    matrices[-1]: None
                }
        records.append(record)
    write_lines(folder / "steps.jsonl", records)
    summary = {
        "arguments": {"optimizer": optimizer, "local_update": "dion", "tau": 0.3, "seed": 0},
        "replicas": 2,
        "shards": 2,
    }
    summary |= {
        "parameters": 400_000,
        "text": "text",
        "hardware": HARDWARE,
        "held_out": [[0, 5.55], [30, 1.9], [60, 1.61]],
    }
    (folder / "summary.json").write_text(json.dumps(summary | ({"date": "2026-11-22"} if new else {})))
    return folder


def study_run(setting: str, seed: int, loss: float | None, **other: object) -> dict:
    run = {
        "study": "local rules",
        "setting": setting,
        "label": "measured",
        "seed": seed,
        "replicas": 4,
        "batch": 8,
        "seq": 64,
        "steps": 600,
    }
    run |= {
        "tokens": 1_228_800,
        "parameters": 133_440,
        "loss": loss,
        "wire": 8e6,
        "dense_wire": 160e6,
        "bytes": {"gate": 9600, "factors": 7e6},
    }
    run |= {
        "synchronized": 60,
        "seconds": 84.3,
        "valid": True,
        "command": "study.py --seed 0",
        "hardware": HARDWARE,
        "date": "2026-11-22",
    }
    return run | {"curve": [], "drift": [], "options": {}, "baseline": False} | other


def make_study() -> list[dict]:
    """Return a study whose numbers are invented: for its layout alone."""
    draw, runs = random.Random(1), []
    settings = [
        ("AdamW, every step", 1.66, 1.0, True),
        ("Muon, every step", 1.58, 1.0, True),
        ("Dion, every step", 1.6, 0.8, True),
    ]
    settings += [(f"local Dion, interval {h}", 1.59 + 0.0018 * h, 1.1 / h, False) for h in (2, 5, 10, 20, 50)]
    settings += [
        (f"RMMC gate, tau {tau}", 1.6 + 0.1 * tau, 0.12 / (10 * tau), False) for tau in (0.1, 0.2, 0.3)
    ]
    settings += [
        ("8-bit outer step, interval 50", 1.62, 0.006, False),
        ("no synchronization", 1.85, 1e-6, False),
    ]
    for name, final, share, baseline in settings:
        for seed in range(3):
            loss = final + draw.gauss(0, 0.006)
            curve = [
                [step, loss + 1.2 * math.exp(-step / 120) - 1.2 * math.exp(-5)] for step in range(0, 601, 50)
            ]
            drift = [] if baseline else [[step, 0.02 * draw.random() + 1e-4] for step in range(20, 600, 20)]
            runs.append(
                study_run(name, seed, loss, wire=160e6 * share, baseline=baseline, curve=curve, drift=drift)
            )
    return runs


def make_links() -> list[dict]:
    cases = []
    for label in ("emulated", "cost model"):
        for sites in (2, 4):
            for mbit in (10, 100, 1000, None):
                for delay in (0, 50):
                    for setting, interval, size in (
                        ("dense", 1, 2e6),
                        ("dion", 1, 5e5),
                        ("local dion", 50, 1e4),
                    ):
                        seconds = (
                            0.5
                            + delay / 1000 * (1 if interval == 1 else 0.02)
                            + (8 * size * sites / 2 / mbit / 1e6 if mbit else 0)
                        )
                        case = {
                            "label": label,
                            "sites": sites,
                            "mbit": mbit,
                            "delay_ms": delay,
                            "setting": setting,
                            "interval": interval,
                        }
                        case |= {
                            "seconds_per_step": None
                            if (mbit, delay, setting) == (10, 50, "dion")
                            else seconds,
                            "parameters": 10**6,
                        }
                        cases.append(case | {"hardware": HARDWARE, "date": "2026-11-22"})
    return cases


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Return the folder of a page with everything on it."""
    folder = tmp_path_factory.mktemp("page")
    runs = [make_run(folder / "new", new=True), make_run(folder / "old", new=False)]
    extra = [
        study_run("<b>bold</b> & $x_1$", 0, 1.7),
        study_run("diverged", 0, None),
        study_run("few", 0, 1.6, label="projected"),
    ]
    study = write_lines(folder / "study.jsonl", make_study() + extra)
    links = write_lines(folder / "links.jsonl", make_links())
    main(["report", *map(str, [*runs, study, links]), "--out", str(folder / "out")])
    return folder / "out"


class Loads(HTMLParser):
    """Collect what a browser would load, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(page):
    html = (page / "index.html").read_text()
    loads = Loads(html)
    pictures = [source for source in loads.sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == len(list(page.glob("*.png"))) == len(figures_expected())
    tables = [source for source in loads.sources if source.startswith("data:text/csv;base64,")]
    assert len(pictures) + len(tables) == len(loads.sources)
    assert (
        not loads.tags & {"link", "iframe", "object"}
        and "@import" not in html
        and "url(" not in html
        and re.findall(r"<script[^>]*>", html) == ["<script>"]
    )
    assert not re.search(r"\b(fetch|import|XMLHttpRequest|eval|innerHTML)\b", SCRIPT)


def figures_expected() -> list[str]:
    losses = "loss_against_tokens loss_against_bytes loss_against_time"
    of_runs = f"{losses} bytes_so_far rmmc_timeline rmmc_heat_maps drift".split()
    return [
        *of_runs,
        *"study_scatter study_gaps study_curves study_drift study_scatter-2 link_speed link_speed-2".split(),
    ]


def test_every_figure_is_beside_the_page(page):
    assert {path.stem for path in page.glob("*.png")} == set(figures_expected())
    for path in page.glob("*.png"):
        picture = path.read_bytes()
        assert picture.startswith(b"\x89PNG") and b"commit abc1234" in picture, (
            "a picture says how it came about"
        )


def test_names_are_text(page):
    html = (page / "index.html").read_text()
    assert "<b>bold" not in html and "&lt;b&gt;bold&lt;/b&gt; &amp; $x_1$" in html


HOSTILE = """</td><script>x</script>"'{0}$x_{[/]"""
KEPT = {"label", "date", "identity"}  # words of our own, and what is parsed


def spoiled(value: Any, key: str = "") -> Any:
    """A record with hostile words behind every string, and behind every name of a matrix or purpose."""
    if isinstance(value, dict):
        names = key in ("rmmc", "bytes", "options")
        return {k + HOSTILE if names else k: spoiled(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(v, key) for v in value]
    return value + HOSTILE if isinstance(value, str) and key not in KEPT else value


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # names are long
def test_nothing_that_a_file_says_becomes_markup(tmp_path: Path, page: Path) -> None:
    """Names of matrices, settings, texts, devices, options, commands, purposes, folders and files."""
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), new=True, steps=20)
    for file in (run / "steps.jsonl", run / "summary.json"):
        lines = [json.dumps(spoiled(json.loads(line))) for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines))
    name = HOSTILE.replace("/", "|")
    study = write_lines(tmp_path / f"{name}.jsonl", [spoiled(record) for record in make_study()[:6]])
    links = write_lines(tmp_path / f"{name}2.jsonl", [spoiled(record) for record in make_links()[:6]])
    main(["report", str(run), str(study), str(links), "--out", str(tmp_path / "out")])
    html = (tmp_path / "out" / "index.html").read_text()
    loads, innocent = Loads(html), Loads((page / "index.html").read_text())
    assert loads.tags <= innocent.tags
    assert all(re.match(r"data:(image/png|text/csv);base64,[\w+/=]*$", source) for source in loads.sources)
    assert html.count("<script") == (page / "index.html").read_text().count("<script"), "the page's own"
    assert loads.text.count("<script>x</script>") > 20, "shown as it is, in every place"


@pytest.mark.parametrize("cell", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1"])
def test_no_spreadsheet_takes_a_name_for_a_formula(cell: str) -> None:
    assert harmless(cell) == f"'{cell}"
    for number in ("-0.012", "+3", "1,000", "-1.5 %", "-0.01 ± 0.02", "layers.0.wq", ""):
        assert harmless(number) == number


def test_captions_say_how_results_came_about(page):
    html = (page / "index.html").read_text()
    for words in re.findall(r"<(?:figcaption|caption)>(.*?)</", html, re.DOTALL):
        assert re.search(r"(Measured|Emulated|Cost model|Projected); ", words), words
        assert "cpu, 2 cores; torch 2.13.0; python 3.11.7; commit abc1234" in words
    assert "Measured; seeds 0, 1, 2; cpu" in html
    assert "study.py --seed 0" in Loads(html).text


def test_old_runs_are_counted_in_buffers_and_new_ones_on_the_wire(tmp_path):
    old, new = Run(make_run(tmp_path / "old", new=False)), Run(make_run(tmp_path / "new", new=True))
    buffers = 13 * 900_000 + 47 * 8
    assert old.cells(wire=False)["sent between replicas"] == f"{buffers / 1e6:.1f} MB"
    assert new.cells(wire=True)["sent between replicas"] == f"{1.5 * buffers / 1e6:.1f} MB"
    assert new.cells(wire=True)["against dense"] == old.cells(wire=False)["against dense"] == "75.6% fewer"
    assert "buffers" in run_tables([new, old])[0].caption, "never both on one axis"
    assert "leaving one replica" in run_tables([new])[0].caption
    for draw in (run_figures.drift, run_figures.rmmc_heat_maps):
        assert draw([old]) is None and draw([new]) is not None


def test_a_resumed_run_counts_every_step_once(tmp_path):
    folder = make_run(tmp_path, new=True, steps=8)
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text(
        "".join([*lines[:5], *lines[3:], '{"step": 9, "lo'])
    )  # and it still goes on
    assert Run(folder).column("step") == list(range(1, 9))


def test_a_run_that_sent_nothing_has_no_figures_of_it(tmp_path):
    folder = make_run(tmp_path, new=True, steps=4)
    nothing = {
        "curvadion/wire/replicate": 0.0,
        "curvadion/dense_bf16_wire": 0.0,
        "curvadion/rmmc_max": None,
        "loss": None,
    }
    write_lines(folder / "steps.jsonl", [record | nothing for record in read_lines(folder / "steps.jsonl")])
    run = Run(folder)
    assert run.cells(wire=True)["against dense"] == "none"
    assert (
        run_figures.bytes_so_far([run])
        is run_figures.loss_against_bytes([run])
        is run_figures.rmmc_timeline([run])
        is None
    )
    assert run_figures.loss_against_tokens([run]) is not None, "losses that are missing are gaps"


def test_what_is_not_finite_is_a_gap(tmp_path):
    folder = make_run(tmp_path, new=True, steps=10)
    rmmc = {"rmmc": {"a": math.nan, "b": None, "c": 0.0, "d": 0.1}}
    write_lines(
        folder / "steps.jsonl",
        [record | rmmc | {"loss": math.nan} for record in read_lines(folder / "steps.jsonl")],
    )
    pictures = [
        drawing.draw(draw, [Run(folder)], "")
        for draw in (run_figures.rmmc_heat_maps, run_figures.loss_against_tokens)
    ]
    (cell,) = aggregate(
        [
            study_run(
                "a",
                0,
                1.5,
                curve=[[0, None], [300, math.nan], [500, 1.6], [600, 1.5]],
                drift=[[9, None], [20, 0.1]],
            )
        ]
    )
    pictures += [
        drawing.draw(draw, cell, "") for draw in (study_figures.study_curves, study_figures.study_drift)
    ]
    assert all(pictures)
    assert study_figures.study_gaps(cell) is None, "there is no baseline"


def test_spread():
    two, three = Spread((1.5, 1.25)), Spread((1.0, 2.0, 4.5))
    assert (two.mean, two.deviation, two.bar) == (1.375, None, (1.25, 1.5))
    assert three.deviation == pytest.approx(
        math.sqrt(((1 - 2.5) ** 2 + (2 - 2.5) ** 2 + (4.5 - 2.5) ** 2) / 2)
    )
    assert three.bar == pytest.approx(
        (2.5 - statistics.stdev(three.values), 2.5 + statistics.stdev(three.values))
    )
    assert three.text(".1f") == "2.5 ± 1.8 (1.0 to 4.5)"
    assert Spread((0.5,)).text("+.2f") == "+0.50"


def test_gaps_are_paired_by_seed():
    losses = {"good": [1.50, 1.60, 1.90], "bad": [2.0, 2.0, 2.0], "lucky": [1.0], "local": [1.53, 1.62, 1.98]}
    records = [
        study_run(name, seed, loss, baseline=name != "local", wire=1e6 * (seed + 1), dense_wire=1e7)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    (cell,) = aggregate(records)
    assert cell.best is not None and cell.best.name == "good", (
        "the lowest mean among baselines with the most seeds"
    )
    local = next(setting for setting in cell.settings if setting.name == "local")
    gap, gaps = local.gap(cell.best), [0.03, 0.02, 0.08]
    assert gap is not None
    assert gap.values == pytest.approx(gaps)
    assert (gap.mean, gap.deviation) == pytest.approx((statistics.fmean(gaps), statistics.stdev(gaps)))
    assert local.share is not None and local.share.mean == pytest.approx(0.2)
    row = next(row for row in study_table([cell]).rows if row[0] == "local")
    assert row[1:5] == [
        "3",
        "1.7100 ± 0.2381 (1.5300 to 1.9800)",
        "+0.0433 ± 0.0321 (+0.0200 to +0.0800)",
        "20%",
    ]


def test_the_mean_of_several_models_is_no_baseline() -> None:
    """Others are compared with one that could be deployed as it was trained; it is shown beside them."""
    mean = {"averaged": 8}
    records = [study_run("plain", 0, 1.6, baseline=True), study_run("ours", 0, 1.7, wire=1e6)]
    records += [study_run("mean of 8", seed, 1.5, baseline=True, options=mean) for seed in (0, 1)]
    (cell,) = aggregate(records)
    assert cell.best is not None and cell.best.name == "plain" and list(cell.baselines) == ["plain"]
    assert {row[0]: row[3] for row in study_table([cell]).rows} == {
        "plain": "best baseline",
        "mean of 8": "-0.1000",
        "ours": "+0.1000",
    }


def test_what_changes_alone_is_compared_over_common_seeds() -> None:
    def run(name: str, seed: int, loss: float, options: dict, **other: object) -> dict:
        return study_run(name, seed, loss, options=options, **other)

    ours = {"lr": 0.1, "bits": 1, "gate": "interval"}
    records = [study_run("best", seed, 1.0, baseline=True) for seed in (0, 1)]
    records += [run("ours", 0, 1.25, ours), run("ours", 1, 1.75, ours)]
    records += [
        run("larger lr", 0, 1.5, ours | {"lr": 0.2}),
        run("both", 0, 1.1, ours | {"lr": 0.3, "bits": 2}),
    ]
    records += [
        run("another gate", 0, 1.1, ours | {"gate": "rmmc"}),
        run("never", 0, 1.1, ours | {"bits": math.inf}),
    ]
    for other in ({"replicas": 8}, {"replicas": 8, "batch": 16}, {"replicas": 2, "parts": True}):
        records += [study_run("best", 1, 1.0, baseline=True, **other), run("ours", 1, 2.0, ours, **other)]
    setting, found = sensitivity(aggregate(records))
    assert setting == "ours"
    gaps = {name: [(x, gap.values) for x, gap in points] for name, points in found.items()}
    assert gaps == {"lr": [(0.1, (0.25,)), (0.2, (0.5,))], "replicas": [(4, (0.75,)), (8, (1.0,))]}


def test_cells_are_compared_with_a_baseline_that_all_of_them_have() -> None:
    records = [study_run("ours", 0, 1.5, options={"lr": 0.1}), study_run("ours", 0, 1.75, replicas=8)]
    records += [study_run("old", 0, 1.25, baseline=True, replicas=replicas) for replicas in (4, 8)]
    records += [study_run("better", 0, 1.0, baseline=True)]
    records += [study_run("worse", 0, 2.0, baseline=True, replicas=8)]
    main, other = aggregate(records)
    assert main.best is not None and main.best.name == "better"
    assert other.best is not None and other.best.name == "old"
    _, found = sensitivity([main, other])
    assert [(x, gap.values) for x, gap in found["replicas"]] == [(4, (0.25,)), (8, (0.5,))]


def test_runs_on_parts_of_the_text_are_not_mixed_with_others() -> None:
    cells = aggregate(
        [
            study_run("a", 0, 1.5),
            study_run("a", 0, 2.5, parts=True),
            study_run("a", 0, 3.5, backend="processes"),
        ]
    )
    assert [cell.runs[0]["loss"] for cell in cells] == [1.5, 2.5, 3.5]
    assert "a part of the text each" in cells[1].name and "by processes" in cells[2].name
    assert [row[0] for row in study_table(cells).rows] == ["a", "a (in parts)", "a (processes)"]


def test_only_like_is_compared_with_like():
    other = [
        {"replicas": 2},
        {"batch": 4},
        {"steps": 300},
        {"study": "other"},
        {"label": "projected"},
        {"parameters": 10**6},
    ]
    cells = aggregate(
        [study_run("dense", 0, 1.5, baseline=True), *(study_run("local", 0, 1.6, **o) for o in other)]
    )
    assert len(cells) == 1 + len(other)
    assert [cell.best is not None for cell in cells] == [True] + [False] * len(other)


def test_invalid_runs_are_counted_and_a_repeated_one_replaces_the_first():
    records = [
        study_run("a", 0, 1.0),
        study_run("a", 1, 9.0, valid=False),
        study_run("a", 2, math.nan),
        study_run("a", 0, 1.25),
    ]
    (cell,) = aggregate(records)
    assert cell.settings[0].loss.values == (1.25,) and cell.settings[0].left_out == 2
    assert study_table([cell]).rows[0][1] == "1, 2 left out"


def test_links_compare_with_dense_on_the_same_link(tmp_path):
    emulated, model = read_links([write_lines(tmp_path / "links.jsonl", make_links())])
    assert (emulated.label, model.label) == ("emulated", "cost model"), "measured and computed are never one"
    assert emulated.rates == [10, 100, 1000, math.inf]
    seconds = {name: emulated.seconds(name, sites=2, delay=50) for name in emulated.names}
    assert math.isnan(seconds["dion"][10]), "null is a gap"
    faster = emulated.speed_up("local dion, every 50 steps", sites=2, delay=50)
    assert faster[100] == pytest.approx(seconds["dense"][100] / seconds["local dion, every 50 steps"][100])
    assert (
        case_name({"setting": "dion", "interval": None})
        == case_name({"setting": "dion", "interval": 1})
        == "dion"
    )


def test_provenance_names_what_differs():
    runs = [
        {"seed": 1, "hardware": HARDWARE, "date": "2026-11-23"},
        {"seed": 0, "hardware": HARDWARE | {"commit": "def"}},
    ]
    words = (
        "Measured; seeds 0, 1; cpu, 2 cores; torch 2.13.0; python 3.11.7; commit abc1234 / def; 2026-11-23."
    )
    assert provenance("measured", runs) == words
    assert provenance("cost model", [{}]) == "Cost model."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x.jsonl .* is not there; check the path"),
        ("", r"x.jsonl must hold lines of a study .* it is empty"),
        (
            '{"a": 1}\n',
            r"x.jsonl must hold lines of a study .* has a, \.\.\.; for a single training run give its folder",
        ),
        ('{"a": 1}\nno\n', r"x.jsonl, line 2, must be a JSON object"),
        ("[1]\n", r"x.jsonl, line 1, must be a JSON object"),
        (
            '{"study": "s"}\n',
            r"x.jsonl, record 1, must have setting, label, .*, and does not; a study file has a line",
        ),
        ('{"sites": 2, "delay_ms": 1}\n', r"x.jsonl, record 1, must have label, mbit, setting"),
    ],
)
def test_errors_name_the_file_and_what_to_try(tmp_path, content, message):
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(["report", str(file)])


def test_errors_name_the_folder_and_what_to_try(tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"must be the folder of a training run, and has no summary.json; give the --out folder",
    ):
        main(["report", str(tmp_path)])
    folder = make_run(tmp_path / "run", new=True, steps=2)
    (folder / "report").write_text("in the way")
    with pytest.raises(SystemExit, match=r"--out must be a folder, and .*report is a file; give another one"):
        main(["report", str(folder)])
    (folder / "steps.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"steps.jsonl must have a line for each step, and has none"):
        main(["report", str(folder)])


def test_folders_beside_runs_are_passed_over_aloud(tmp_path, capsys):
    make_run(tmp_path / "run", new=True, steps=2)
    (tmp_path / "a_site").mkdir()
    main(["report", *map(str, sorted(tmp_path.iterdir()))])
    assert "a_site is passed over: no training run has ended there" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "index.html").exists()
    with pytest.raises(SystemExit, match="has no summary.json"):
        main(["report", str(tmp_path / "a_site"), str(tmp_path / "a_site")])


def test_the_command_says_what_it_can_do(capsys):
    for arguments, words in (
        (["--help"], "report"),
        (["report", "--help"], "--out FOLDER"),
        ([], "COMMAND"),
        (["nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        output = capsys.readouterr()
        assert words in output.out + output.err


def test_a_smoothed_curve_follows_a_steep_start_and_averages_noise() -> None:
    line = [5.0 - 0.25 * i for i in range(40)]
    assert run_figures.smooth(line) == pytest.approx(line), "an exponential mean is 2 above it"
    noise = [(-1.0) ** i for i in range(301)]
    assert max(abs(v) for v in run_figures.smooth(noise)[10:-10]) <= 1 / 20
    assert run_figures.smooth([1.0, math.nan, 3.0, 5.0, 7.0])[2] == pytest.approx(4.0)
    assert math.isnan(run_figures.smooth([1.0, math.nan, 3.0])[1])
    spike = [1.0] * 300 + [3.0]
    assert run_figures.smooth(spike)[-1] < 1.5, "the last value alone is no trend"
    assert run_figures.smooth([5.0, 0.1, 0.1, 0.1, 0.1])[-1] >= 0.1, "nor is a steep start"
    assert len(run_figures.smooth([1.0, 2.0, 3.0, 4.0, 5.0, math.inf])) == 6


def without_tau(folder: Path) -> Path:
    run = make_run(folder, new=True)
    summary = json.loads((run / "summary.json").read_text())
    summary["arguments"]["tau"] = math.inf
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_where_there_is_no_tau_no_picture_speaks_of_one(tmp_path: Path) -> None:
    runs = [Run(without_tau(tmp_path / "run"))]
    for figure in (run_figures.rmmc_timeline(runs), run_figures.rmmc_heat_maps(runs)):
        words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert words and not any("tau" in text for text in words), words
    with_tau = run_figures.rmmc_timeline([Run(make_run(tmp_path / "gated", new=True))])
    assert "tau" in {text.get_text() for text in with_tau.legends[0].texts}


def test_one_run_shows_three_pictures_and_folds_the_others_away_and_several_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, new=True) for name in ("a", "b")]
    for chosen, shown in ((runs[:1], 3), (runs, 7)):
        main(["report", *map(str, chosen), "--out", str(tmp_path / "page")])
        first, *folded = (tmp_path / "page" / "index.html").read_text().split("<summary>More pictures")
        assert (first.count("<img"), "".join(folded).count("<img")) == (shown, 7 - shown)
    assert first.index("loss against bytes") < first.index("loss against tokens")


def test_each_table_can_be_taken_along(tmp_path: Path) -> None:
    from base64 import b64decode

    main(["report", str(make_run(tmp_path / "run", new=True)), "--out", str(tmp_path / "page")])
    html = (tmp_path / "page" / "index.html").read_text()
    runs, purposes = re.findall(r'download="(\w+)\.csv" href="data:text/csv;base64,([^"]+)"', html)
    assert (runs[0], purposes[0]) == ("runs", "bytes_by_purpose")
    lines = b64decode(runs[1]).decode().splitlines()
    assert "processes,2 x 2" in lines and 'parameters,"400,000"' in lines


def test_ticks_are_short() -> None:
    """Two that are neighbours on a narrow panel must not run into each other."""
    said = [drawing.plain(value) for value in (5e-5, 0.02, 1.0, 5_000.0, 50_000.0, 2e5, 1e6, 2e9)]
    assert said == ["0.00005", "0.02", "1", "5,000", "50,000", "200k", "1M", "2,000M"]


@pytest.mark.parametrize(("tau", "shown"), [(math.inf, "RMMC 0.100 sync"), (0.3, "RMMC 0.100/0.3 sync")])
def test_the_live_line_names_tau_where_there_is_one(tau: float, shown: str) -> None:
    record = {"loss": 1.0, "tokens": 1000, "seconds": 1.0, "curvadion/rmmc_max": 0.1}
    record |= {"curvadion/synchronized": 1.0, "curvadion/sync_rate": 0.125}
    assert shown in live_line(record, tau, "99.1% fewer")
