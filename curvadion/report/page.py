"""Put tables and figures into one HTML page that needs no network, and no script but for sorting tables; the
figures lie beside it as PNG files too."""

import csv
import io
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table as ConsoleTable
    from rich.text import Text
except ImportError as error:
    raise SystemExit(
        f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'"
    ) from None

from curvadion.report import drawing, run_figures, study_figures
from curvadion.report.files import replace_file
from curvadion.report.runs import Record, Run, Table, provenance, read_runs, run_provenance, run_tables
from curvadion.report.studies import (
    Cell,
    Link,
    kind,
    link_table,
    purpose_table,
    read_links,
    read_studies,
    study_table,
)

SMOOTHED = (
    "Lines: training loss of one replica, as it is (pale) and smoothed. Points: held-out loss of the "
    "replicas' average."
)
RUN_FIGURES = {
    run_figures.loss_against_bytes: (
        f"{SMOOTHED} Dashed: what dense bf16 gradients would have sent in the whole run."
    ),
    run_figures.loss_against_tokens: SMOOTHED,
    run_figures.loss_against_time: f"{SMOOTHED} Evaluations and checkpoints are not in the time.",
    run_figures.bytes_so_far: (
        "What one replica sent to the others on training steps, and what dense bf16 gradients would have."
    ),
    run_figures.rmmc_timeline: (
        "Relative maximum momentum change of every step, and which steps were synchronized."
    ),
    run_figures.rmmc_heat_maps: "RMMC of every matrix on replica 0, on the steps that it was read on.",
    run_figures.drift: "Relative distance of the replicas, just before each synchronization.",
}
# Of one run these say most; the others are folded away. Several are compared by all, bytes first.
OF_ONE_RUN = (
    run_figures.loss_against_tokens,
    run_figures.bytes_so_far,
    run_figures.rmmc_timeline,
)
BARS = "Bars: a standard deviation to either side from three seeds on, the extremes of two."
CUT = "An arrowhead at the edge: too far off to show."
STUDY_FIGURES = {
    study_figures.study_scatter: (
        f"A point for each setting, mean over seeds; hollow: baselines. {BARS} Grey band: the best baseline. "
        f"{CUT}"
    ),
    study_figures.study_gaps: (
        "Seed by seed; positive is worse. After a name: bytes, in % of dense ones. Pale dots: seeds. "
        f"{BARS} {CUT}"
    ),
    study_figures.study_curves: (
        "Mean over seeds; bands: extremes. Dashed: baselines. Losses above those after a tenth of the run "
        "are cut off."
    ),
    study_figures.study_drift: (
        "Relative distance of the replicas, just before each synchronization; a line for each seed."
    ),
}
SENSITIVITY = (
    "Gap to the best baseline when one thing alone is changed; each panel with the best baseline, "
    f"and over the seeds, that all its values have. {BARS}"
)
LINK_FIGURE = (
    "Seconds per step, and how many times faster than setting dense on the same link. Where a value is "
    "missing there is a gap."
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #222; --pale: #666; --paper: #fff; --line: #ddd; --code: #f6f6f6; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e4; --pale: #aaa; --paper: #1b1b1b; --line: #444; --code: #2a2a2a; }}
}}
body {{ max-width: 900px; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }}
body {{ color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
figure {{ margin: 1.5rem 0; overflow-x: auto; }}
img {{ width: 100%; height: auto; background: #fff; }}
figcaption, caption {{ font-size: 0.85rem; color: var(--pale); text-align: left; }}
caption {{ caption-side: bottom; padding-top: 0.4rem; }}
h3 {{ font-size: 1rem; margin: 0 0 0.3rem; }} h3 a {{ font-weight: normal; font-size: 0.85rem; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }}
th {{ vertical-align: bottom; }} th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th button {{ all: unset; cursor: pointer; }} th button:focus-visible {{ outline: 2px solid; }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
pre {{ overflow-x: auto; font-size: 0.8rem; background: var(--code); padding: 0.6rem; }}
@media print {{
  :root {{ --ink: #000; --pale: #333; --paper: #fff; --code: #fff; }}
  body {{ max-width: none; }} h2 {{ break-after: avoid; }} figure {{ break-inside: avoid; }}
  h3 a {{ display: none; }} pre {{ white-space: pre-wrap; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""

# Sorts a table by the column whose head is pressed, the first by name, others by size where they are numbers;
# without it the page lacks nothing else.
SCRIPT = """
const byName = new Intl.Collator(undefined, {numeric: true}).compare;
for (const head of document.querySelectorAll("th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending", place = head.cellIndex;
    const value = (row) => {
      const text = row.cells[place].textContent.replace(/,/g, "");
      const unit = {k: 1e3, M: 1e6, G: 1e9}[(/^[-+]?[\\d.]+ ([kMG])B/.exec(text) || [])[1]] || 1;
      const number = parseFloat(text) * unit;
      return place === 0 || Number.isNaN(number) ? text : number;
    };
    const compare = (a, b) =>
      typeof a === "number" && typeof b === "number" ? a - b : byName(String(a), String(b));
    const body = head.closest("table").tBodies[0], rows = [...body.rows];
    rows.sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
    body.append(...rows);
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  };
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
"""


class Page:
    """The page while it grows, and its pictures by file name."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def heading(self, words: str) -> None:
        self.parts.append(f"<h2>{escape(words)}</h2>")

    def table(self, table: Table) -> None:
        """Add a table, and print it."""
        show(table)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
        rows = "\n".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
        )
        body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
        whole = f"<table><caption>{escape(table.caption)}</caption>\n{body}</table>"
        title = f"<h3>{escape(table.title)} {csv_link(table)}</h3>"
        self.parts.append(f"<figure>{title}\n{whole}</figure>")

    def figure(self, figure_of: Callable[[Any], Any], results: Any, caption: str, provenance: str) -> None:
        """Add a figure, unless there is nothing to draw."""
        picture = drawing.draw(figure_of, results, provenance)
        if picture is None:
            return
        name = figure_of.__name__
        count = sum(re.fullmatch(rf"{name}(-\d+)?\.png", other) is not None for other in self.pictures)
        self.pictures[f"{name}-{count + 1}.png" if count else f"{name}.png"] = picture
        source = f"data:image/png;base64,{b64encode(picture).decode()}"
        words = escape(f"{caption} {provenance}")
        image = f'<img alt="{escape(name.replace("_", " "))}" src="{source}">'
        self.parts.append(f"<figure>{image}\n<figcaption>{words}</figcaption></figure>")

    def commands(self, records: Sequence[Record]) -> None:
        """Add the commands that results came from, where they are known."""
        lines = dict.fromkeys(str(record["command"]) for record in records if record.get("command"))
        if lines:
            self.parts.append(
                f"<details><summary>Commands</summary><pre>{escape(chr(10).join(lines))}</pre></details>"
            )

    def runs(self, runs: Sequence[Run]) -> None:
        self.heading("Runs")
        for table in run_tables(runs):
            self.table(table)
        first = OF_ONE_RUN if len(runs) == 1 else tuple(RUN_FIGURES)
        for figure_of in first:
            self.figure(figure_of, runs, RUN_FIGURES[figure_of], run_provenance(runs))
        self.parts.append("<details><summary>More pictures</summary>")
        before = len(self.parts)
        for figure_of in (f for f in RUN_FIGURES if f not in first):
            self.figure(figure_of, runs, RUN_FIGURES[figure_of], run_provenance(runs))
        if len(self.parts) == before:
            self.parts.pop()
        else:
            self.parts.append("</details>")
        self.commands([run.summary for run in runs])

    def study(self, cells: Sequence[Cell]) -> None:
        """Add the cells of one study that have one label."""
        self.heading(f"Study {cells[0].study} ({cells[0].label})")
        self.table(study_table(cells))
        records = [run for cell in cells for run in cell.runs]
        self.figure(study_figures.study_sensitivity, cells, SENSITIVITY, provenance(cells[0].label, records))
        for cell in cells:
            for figure_of, caption in STUDY_FIGURES.items():
                self.figure(figure_of, cell, f"{cell.name}. {caption}", cell.provenance)
            by_purpose = purpose_table(cell)
            if by_purpose:
                self.table(by_purpose)
        self.commands(records)

    def link(self, link: Link) -> None:
        self.heading(f"Slow link ({link.label})")
        self.figure(study_figures.link_speed, link, LINK_FIGURE, link.provenance)
        self.table(link_table(link))
        self.commands(link.cases)

    def write(self, folder: Path, title: str) -> Path:
        """Write index.html and the pictures, and return the page's path."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise SystemExit(f"--out must be a folder, and {folder} is a file; give another one") from None
        for name, picture in self.pictures.items():
            replace_file(folder / name, picture)
        page = folder / "index.html"
        content = PAGE.format(title=escape(title), body="\n".join(self.parts), script=SCRIPT)
        replace_file(page, content)
        return page


def csv_link(table: Table) -> str:
    """Return a link that holds the table as a file of comma-separated values."""
    text = io.StringIO()
    csv.writer(text).writerows([harmless(cell) for cell in row] for row in (table.head, *table.rows))
    name = re.sub(r"\W+", "_", table.title).strip("_").lower()
    encoded = b64encode(text.getvalue().encode()).decode()
    return f'<a download="{name}.csv" href="data:text/csv;base64,{encoded}">CSV</a>'


def harmless(cell: str) -> str:
    """Return a cell such that no spreadsheet takes it for a formula."""
    number = re.fullmatch(r"[-+]?[\d.,]+( ?%| ± [\d.,]+| [kMG]?B)?", cell)
    return f"'{cell}" if cell[:1] in tuple("=+-@\t\r") and not number else cell


def show(table: Table) -> None:
    """Print a table; one that is cut at 80 columns in a log file is worth nothing."""
    shown = ConsoleTable(title=Text(table.title), caption=Text(table.caption), caption_justify="left")
    for position, cell in enumerate(table.head):
        shown.add_column(Text(cell), justify="right" if position else "left")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    Console(highlight=False, width=None if Console().is_terminal else 60 + 30 * len(table.head)).print(shown)


def without_other_folders(paths: Sequence[Path]) -> Sequence[Path]:
    """Leave out, aloud, folders that no run has ended in: `runs/*` finds them beside the others."""
    others = [path for path in paths if path.is_dir() and not (path / "summary.json").exists()]
    if len(others) == len(paths):
        return paths  # reading the first one ends with a sentence
    for folder in others:
        print(f"{folder} is passed over: no training run has ended there, for it has no summary.json")
    return [path for path in paths if path not in others]


def write_report(paths: Sequence[Path], out: Path | None = None) -> None:
    """Print the tables of runs, studies and slow-link files, and write their page, by default beside the
    first of them."""
    files: dict[str, list[Path]] = {"run": [], "study": [], "link": []}
    paths = without_other_folders(paths)
    for path in paths:
        if not path.exists():
            raise SystemExit(
                f"{path} must be the folder of a training run or a .jsonl file, and is not there; check the "
                "path"
            )
        files["run" if path.is_dir() else kind(path)].append(path)
    page = Page()
    if files["run"]:
        page.runs(read_runs(files["run"]))
    studies: dict[tuple[str, str], list[Cell]] = {}
    for cell in read_studies(files["study"]):
        studies.setdefault((cell.study, cell.label), []).append(cell)
    for cells in studies.values():
        page.study(cells)
    for link in read_links(files["link"]):
        page.link(link)
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    print(f"page: {page.write(out or first / 'report', 'CurvaDion report')}")
