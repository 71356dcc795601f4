"""What README.md and docs/results.md say of the study, against its runs: their tables, and the headline."""

from __future__ import annotations

import re
import statistics
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the study shows its progress with rich: install the [report] extra")


from curvadion.report.studies import Cell, Setting, Spread, read_studies

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md")
HEAD = "| setting | seeds | loss | gap | bytes | synchronized steps |"
OURS = "1 bit every 8 steps"
Row = list[str]


@cache
def cells() -> list[Cell]:
    """Return the cells of the conditions that the tables are for; they differ in their steps alone."""
    found = read_studies([ROOT / "benchmarks" / "results" / "convergence.jsonl"])
    conditions = (4, 16, 64, 133_440, False, "simulation", "")
    keys = ("replicas", "batch", "seq", "parameters", "parts", "backend", "held_out")
    found = [c for c in found if tuple(getattr(c, key) for key in keys) == conditions]
    assert len({cell.steps for cell in found}) == len(found) > 1
    return found


def tables(text: str) -> list[list[Row]]:
    """Return the rows of every table that has the head."""
    found = []
    for part in text.split(f"\n{HEAD}\n")[1:]:
        rule, *lines = part.splitlines()
        assert re.fullmatch(r"\|(-+\|){6}", rule)
        end = next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))
        found.append([[word.strip() for word in line.strip("|").split("|")] for line in lines[:end]])
    assert len(found) == text.count(HEAD), "each table stands by itself"
    return found


def setting_of(cell: Cell, name: str) -> Setting | None:
    return next((setting for setting in cell.settings if setting.name == name and setting.runs), None)


def synchronized(cell: Cell, name: str) -> str:
    """Return the synchronized steps of a setting as they are printed, "" where the cell has no run of it."""
    setting = setting_of(cell, name)
    return f"{statistics.fmean(run['synchronized'] for run in setting.runs):.0f}" if setting else ""


def cell_of(rows: list[Row]) -> Cell:
    """Return the one cell in which every setting of the table has synchronized as often as the table says."""
    fitting = [cell for cell in cells() if all(synchronized(cell, row[0]) == row[-1] for row in rows)]
    assert len(fitting) == 1, f"the table of {rows[0][0]}, ... fits {[cell.name for cell in fitting]}"
    return fitting[0]


def printed(spread: Spread, form: str) -> str:
    """Return a mean as the tables have it, from three seeds on with its standard deviation."""
    words = format(spread.mean, form)
    return words if spread.deviation is None else f"{words} ± {spread.deviation:.3f}"


def expected(cell: Cell, name: str) -> Row:
    """Return a row from the runs; the gap of the best baseline is left empty."""
    setting, best = setting_of(cell, name), cell.best
    assert setting is not None and best is not None and setting.share is not None
    gap = setting.gap(best)
    assert gap is not None, "no seed is common with the baseline"
    words = "" if setting is best else printed(gap, "+.3f")
    share = f"{100 * setting.share.mean:.2f} %"
    seeds, loss = f"{len(setting.runs)}", printed(setting.loss, ".3f")
    return [name, seeds, loss, words, share, synchronized(cell, name)]


def check(text: str) -> int:
    """Check all tables of a page, and return how many there are."""
    found = tables(text)
    for rows in found:
        cell = cell_of(rows)
        assert rows == [expected(cell, row[0]) for row in rows]
    return len(found)


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/results.md", 15)])
def test_tables_say_what_was_measured(page: str, count: int) -> None:
    assert check((ROOT / page).read_text()) == count, "what has another head is not checked: count it here"


def test_tables_of_the_headline_name_the_baseline() -> None:
    for page in PAGES:
        rows = tables((ROOT / page).read_text())[0]
        best = cell_of(rows).best
        assert best is not None and [row[0] for row in rows if not row[3]] == [best.name]


def test_a_figure_that_is_off_by_its_last_digit_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    _, seeds, loss, gap, share, steps = next(row for row in tables(text)[0] if row[0] == OURS)
    for old in (f"| {seeds} |", loss[:5], gap[:6], share, f"| {steps} |"):
        at = text.index(old, text.index(f"| {OURS} |"))
        digit = max(k for k in range(len(old)) if old[k].isdigit())
        new = f"{old[:digit]}{(int(old[digit]) + 1) % 10}{old[digit + 1 :]}"
        with pytest.raises(AssertionError):
            check(text[:at] + new + text[at + len(old) :])


def rows_under(head: str) -> list[Row]:
    """Return the rows of the one table of docs/results.md that has another head than HEAD."""
    _, rest = (ROOT / "docs" / "results.md").read_text().split(f"{head}\n")
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


UNSEEN = "on text and seeds that nothing was tuned on"
SECOND = "on a second text"
STUDENT = {2: 12.706, 3: 4.303}  # two-sided 95 % quantiles for so many seeds


@pytest.mark.parametrize(
    ("table", "file", "held_out"), [(UNSEEN, "convergence", "test.txt"), (SECOND, "novels", "")]
)
def test_tables_of_text_that_no_tuning_saw_say_what_was_measured(
    table: str, file: str, held_out: str
) -> None:
    found = read_studies([ROOT / "benchmarks" / "results" / f"{file}.jsonl"])
    [cell] = [c for c in found if c.held_out == held_out]
    best = cell.best
    rows = rows_under(f"| {table} | seeds | loss | gap, 95 % interval | bytes | synchronized steps |")
    assert best is not None and len(rows) == len(cell.settings) > 5
    for row in rows:
        name, seeds, loss, gap, share, steps = row
        setting = setting_of(cell, name)
        assert setting is not None and setting.share is not None
        assert (seeds, loss) == (f"{len(setting.runs)}", f"{setting.loss.mean:.3f}")
        assert (share, steps) == (f"{100 * setting.share.mean:.2f} %", synchronized(cell, name))
        values = setting.gap(best).values  # type: ignore[union-attr]
        expected_gap = f"{statistics.fmean(values):+.3f}"
        if len(values) > 1:
            half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
            expected_gap += f" ± {half:.3f}"
        assert gap == ("" if setting is best else expected_gap)


WHERE = "| where the gap comes from | seeds | loss | gap | bytes | synchronized steps |"


def test_the_table_of_where_the_gap_comes_from_says_what_was_measured() -> None:
    [cell] = read_studies([ROOT / "benchmarks" / "results" / "where.jsonl"])
    rows = rows_under(WHERE)
    assert cell.best is not None and cell.best.name == TRIALS[0]
    assert rows == [expected(cell, row[0]) for row in rows]
    assert {row[0] for row in rows} == {setting.name for setting in cell.settings if setting.runs}


AGAIN = "| conditions | NorMuon every step | tuned again | 1 bit, NorMuon | tuned again | gap | tuned again |"
TRIALS = ("NorMuon every step, trial 2.4", "1 bit, NorMuon, trial 2.0")


def conditions_of(words: str) -> tuple[int, int, int, str]:
    """Return K, sequences in a batch, steps and millions of parameters, of the first column of a table."""

    def number(pattern: str, otherwise: str) -> str:
        found = re.search(pattern, words)
        return found[1].replace(",", "") if found else otherwise

    counts = (number(r"K = (\d+)", "4"), number(r"(\d+) x 64", "16"), number(r"([\d,]+) steps", "600"))
    return *map(int, counts), number(r"(\S+)M parameters", "0.13")  # type: ignore[return-value]


def test_the_table_of_what_was_tuned_again_says_what_was_measured() -> None:
    found = [
        cell
        for cell in read_studies([ROOT / "benchmarks" / "results" / "convergence.jsonl"])
        if not cell.parts and not cell.held_out and cell.backend == "simulation"
    ]
    rows = rows_under(AGAIN)
    for row in rows:
        words, *numbers = row
        wanted = conditions_of(words)
        [cell] = [c for c in found if (c.replicas, c.batch, c.steps, f"{c.parameters / 1e6:.2f}") == wanted]
        known, again = [], []
        for trial in TRIALS:
            side = trial.rsplit(", ", 1)[0]
            losses = [s.runs[0]["loss"] for s in cell.settings if s.name.startswith(f"{side}, again ")]
            setting = setting_of(cell, trial)
            assert setting is not None and len(losses) == 4
            known.append(setting.runs[0]["loss"])
            again.append(min(known[-1], *losses))
        pairs = [f"{loss:.3f}" for pair in zip(known, again, strict=True) for loss in pair]
        assert numbers == [*pairs, *(f"{ours - best:+.3f}" for best, ours in (known, again))]
    assert len(rows) > 3


COST = r"saves (\S+) % of the bytes and costs (\S+) nats in a short run, (\S+) in one three times as\s"
FIRST = (
    r"\| \*\*Muon steps on each replica.*?\| (\S+ ± \S+) \| \*\*\+(\S+ ± \S+)\*\* \| (\S+ ± \S+) "
    r"\| \*\*\+(\S+ ± \S+)\*\* \|"
)
CLAIM = r"\*\*(\S+) nats at (\S+) %\*\*, by Muon steps, one bit, every eighth step; (\S+) after three times"
BULLET = r"\*\*Three times as many steps take the gap from (\S+) to (\S+)\*\*"


def test_sentences_say_what_the_tables_do() -> None:
    of = {cell.steps: cell for cell in cells()}
    short, long = expected(of[600], OURS), expected(of[1800], OURS)
    gaps = [row[3].lstrip("+") for row in (short, long)]
    first, second = (gap.split()[0] for gap in gaps)
    share = short[4].split()[0]
    readme, results = (" ".join((ROOT / page).read_text().split()) for page in PAGES)
    assert re.findall(COST, readme) == [(f"{100 - float(share):.1f}", first, second)]
    assert re.findall(FIRST, results) == [(short[2], gaps[0], long[2], gaps[1])]
    assert re.findall(CLAIM, results) == [(first, share, second)]
    assert re.findall(BULLET, results) == [(first, second)]
    assert f"gap +{gaps[1]} at {long[4]}" in readme
