"""Read and aggregate files of JSON lines: studies, a line for each finished run, and slow-link benchmarks, a
line for each case."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from curvadion.report.runs import Record, Table, number, provenance, read_lines, readable, require
from curvadion.sharding.ledger import words_of

STUDY_KEYS = (
    "study",
    "setting",
    "label",
    "seed",
    "replicas",
    "batch",
    "seq",
    "steps",
    "parameters",
    "loss",
    "wire",
    "dense_wire",
)
LINK_KEYS = ("label", "sites", "mbit", "delay_ms", "setting", "seconds_per_step")


@dataclass(frozen=True)
class Spread:
    """Values of several seeds: mean, extremes, and from three values on the (n - 1) standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) >= 3 else None

    @property
    def bar(self) -> tuple[float, float]:
        """Return the ends of an error bar: a standard deviation to either side where there is one, the
        extremes otherwise."""
        if self.deviation is None:
            return min(self.values), max(self.values)
        return self.mean - self.deviation, self.mean + self.deviation

    def text(self, form: str) -> str:
        words = format(self.mean, form)
        if self.deviation is not None:
            words += f" ± {format(self.deviation, form.replace('+', ''))}"
        if len(self.values) > 1:
            words += f" ({format(min(self.values), form)} to {format(max(self.values), form)})"
        return words


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, a seed each, in one cell of a study; `index` is its place in the whole
    study."""

    name: str
    index: int
    baseline: bool
    runs: tuple[Record, ...]
    left_out: int = 0

    def values(self, key: str) -> dict[Any, float]:
        """Return a number of every run, by seed."""
        return {run["seed"]: number(run[key]) for run in self.runs}

    @property
    def loss(self) -> Spread:
        return Spread(tuple(self.values("loss").values()))

    @property
    def share(self) -> Spread | None:
        """Return what one replica sent, relative to dense bf16 gradients; None where there is nothing to send
        to."""
        shares = [number(run["wire"]) / run["dense_wire"] for run in self.runs if run["dense_wire"]]
        shares = [share for share in shares if math.isfinite(share)]
        return Spread(tuple(shares)) if shares else None

    def gap(self, other: "Setting") -> Spread | None:
        """Return the loss minus that of another setting, seed by seed; None without a common seed."""
        mine, theirs = self.values("loss"), other.values("loss")
        return (
            Spread(tuple(mine[seed] - theirs[seed] for seed in mine if seed in theirs))
            if mine.keys() & theirs.keys()
            else None
        )


@dataclass
class Cell:
    """What may be compared: settings of one study, of one label, with equal model, text, replicas, batch and
    steps."""

    study: str
    label: str
    replicas: int
    batch: int
    seq: int
    steps: int
    parameters: int
    text: str
    parts: bool  # each replica has a part of the text of its own
    backend: str
    held_out: str = ""  # the text that the loss is of, if it is not a part of the first
    settings: list[Setting] = field(default_factory=list)

    @property
    def name(self) -> str:
        model = f"{self.parameters / 1e6:.3g}M parameters"
        parts = ", a part of the text each" if self.parts else ""
        how = f", by {self.backend}" if self.backend == "processes" else ""
        how += f", loss on {self.held_out}" if self.held_out else ""
        size = f"batch {self.batch}, {self.steps:,} steps, {model}"
        return f"{self.study}: {self.replicas} replicas{parts}, {size}{how}"

    @property
    def best(self) -> Setting | None:
        """Return the baseline with the lowest mean loss, among those with the most seeds."""
        return next(iter(self.baselines.values()), None)

    @property
    def baselines(self) -> dict[str, Setting]:
        """Return the baselines by name, the best first: most seeds, then lowest mean loss."""
        baselines = [setting for setting in self.settings if setting.baseline]
        return {s.name: s for s in sorted(baselines, key=lambda s: (-len(s.runs), s.loss.mean))}

    @property
    def runs(self) -> list[Record]:
        return [run for setting in self.settings for run in setting.runs]

    @property
    def provenance(self) -> str:
        return provenance(self.label, self.runs)


def kind(file: Path) -> str:
    """Return "study" or "link" by the keys of the first line."""
    records = read_lines(file)
    if records and "study" in records[0]:
        return "study"
    if records and {"sites", "delay_ms"} <= records[0].keys():
        return "link"
    got = f"its first line has {', '.join(list(records[0])[:6])}, ..." if records else "it is empty"
    raise SystemExit(
        f"{file} must hold lines of a study (with a key `study`) or of a slow-link benchmark (with `sites` "
        f"and `delay_ms`); {got}; for a single training run give its folder"
    )


def is_valid(run: Record) -> bool:
    return bool(run.get("valid", True)) and math.isfinite(number(run["loss"]))


def is_baseline(run: Record) -> bool:
    """Say whether others may be compared with a run: it was synchronized in every step, and its loss is that
    of its own last model, not of the mean of several."""
    return bool(run.get("baseline")) and not run.get("options", {}).get("averaged")


def aggregate(records: Iterable[Record]) -> list[Cell]:
    """Sort runs into cells and settings. Of runs with the same seed the last one counts; invalid ones are
    only counted."""
    cells: dict[tuple[Any, ...], dict[str, dict[Any, Record]]] = {}
    order: dict[str, dict[str, int]] = {}
    for run in records:
        key = tuple(
            run[name] for name in ("study", "label", "replicas", "batch", "seq", "steps", "parameters")
        )
        key += (run.get("text", ""), bool(run.get("parts")), run.get("backend", ""), run.get("held_out", ""))
        cells.setdefault(key, {}).setdefault(run["setting"], {})[run["seed"]] = run
        places = order.setdefault(run["study"], {})
        places.setdefault(run["setting"], len(places))
    found = []
    for key, settings in cells.items():
        cell = Cell(*key)
        for name, by_seed in settings.items():
            runs = tuple(run for _, run in sorted(by_seed.items()) if is_valid(run))
            baseline = any(map(is_baseline, runs))
            cell.settings.append(
                Setting(name, order[cell.study][name], baseline, runs, len(by_seed) - len(runs))
            )
        found.append(cell)
    return found


def read_studies(files: Sequence[Path]) -> list[Cell]:
    """Read study files, and aggregate them together."""
    records = []
    for file in files:
        lines = read_lines(file)
        require(lines, STUDY_KEYS, file, "a study file has a line for every finished run")
        records += lines
    return aggregate(records)


# Options of a setting that are numbers, with their names in a picture; and what a cell has.
OPTIONS = {
    "lr": "lr",
    "momentum": "momentum",
    "rank_fraction": "rank fraction",
    "interval": "steps per synchronization",
    "bits": "bits",
    "outer_lr": "outer lr",
    "outer_momentum": "outer momentum",
    "fragments": "fragments",
    "delay": "steps under way",
    "tau": "tau",
}
CONDITIONS = {
    "replicas": "replicas",
    "batch": "sequences per replica and step",
    "steps": "steps of training",
    "parameters": "parameters",
}


def sensitivity(cells: Sequence[Cell]) -> tuple[str, dict[str, list[tuple[float, Spread]]]]:
    """Return a setting's name, and its gap to the best baseline when one thing alone changes, by what it is:
    pairs of its value and the gap, over the seeds that all of its values have.

    The setting is the one that most cells have, of those the one with the smallest gap.
    Where cells are compared, the baseline is one that all of them have: a cell in which a better one was
    tried as well would stand out for that alone.
    """
    main = max(cells, key=lambda cell: len(cell.settings))
    candidates = [s for s in main.settings if s.runs and not s.baseline and main.best and s.gap(main.best)]
    if not candidates or main.best is None:
        return "", {}
    best, names = main.best, [s.name for cell in cells for s in cell.settings if s.runs]
    middle = min(
        candidates, key=lambda s: (-names.count(s.name), gap.mean if (gap := s.gap(best)) else math.inf)
    )
    options = middle.runs[0].get("options", {})

    varied: dict[str, list[tuple[float, Setting, Setting]]] = {}
    for setting in candidates:
        theirs = setting.runs[0].get("options", {})
        changed = [key for key in options if theirs.get(key, options[key]) != options[key]]
        if len(changed) == 1 and changed[0] in OPTIONS:
            points = varied.setdefault(OPTIONS[changed[0]], [(number(options[changed[0]]), middle, best)])
            points.append((number(theirs[changed[0]]), setting, best))
    for key, name in CONDITIONS.items():
        same = [k for k in (*CONDITIONS, "text", "parts", "backend", "held_out") if k != key]
        alike = [cell for cell in cells if all(getattr(cell, k) == getattr(main, k) for k in same)]
        found = [
            (getattr(cell, key), s, cell.baselines)
            for cell in alike
            for s in cell.settings
            if s.name == middle.name and s.runs and cell.baselines
        ]
        shared = [name for name in main.baselines if all(name in baselines for _, _, baselines in found)]
        varied[name] = [(x, s, baselines[shared[0]]) for x, s, baselines in found] if shared else []

    result = {}
    for name, points in varied.items():
        finite = [
            (x, s.values("loss"), reference.values("loss")) for x, s, reference in points if math.isfinite(x)
        ]
        seeds = (
            set.intersection(*(set(mine) & set(theirs) for _, mine, theirs in finite)) if finite else set()
        )
        if seeds and len(finite) > 1:
            gaps = [
                (x, Spread(tuple(mine[seed] - theirs[seed] for seed in seeds))) for x, mine, theirs in finite
            ]
            result[name] = sorted(gaps, key=lambda point: point[0])
    return middle.name, result


def study_table(cells: Sequence[Cell]) -> Table:
    """Return loss, gap and bytes of every setting, for cells of one study and one label."""
    head = ["setting", "seeds", "final loss", "gap", "of dense bytes", "synchronized", "seconds"]
    several = len(cells) > 1
    odd = {cell.text for cell in cells} if len({cell.text for cell in cells}) > 1 else set()
    rows = []
    for cell in cells:
        for setting in sorted(cell.settings, key=lambda s: s.loss.mean if s.runs else math.inf):
            row = [
                setting.name,
                f"{len(setting.runs)}" + (f", {setting.left_out} left out" if setting.left_out else ""),
            ]
            row += outcome(setting, cell.best) if setting.runs else [""] * 5
            if several:
                what = (
                    [cell.text] * (cell.text in odd)
                    + ["in parts"] * cell.parts
                    + [cell.backend] * (cell.backend == "processes")
                    + [f"loss on {cell.held_out}"] * bool(cell.held_out)
                )
                row[0] += f" ({', '.join(what)})" if what else ""
                row[1:1] = [
                    f"{cell.replicas}",
                    f"{cell.batch}",
                    f"{cell.steps:,}",
                    f"{cell.parameters / 1e6:.3g}M",
                ]
            rows.append(row)
    if several:
        head[1:1] = ["replicas", "batch", "steps", "parameters"]
    caption = (
        "Mean over seeds, ± standard deviation from three seeds on, extremes in brackets. Gap: to the best "
        "baseline of the same replicas, batch, steps and model, seed by seed. Of dense bytes: what leaves "
        "one replica, relative to bf16 gradients averaged every step. "
    )
    runs = [run for cell in cells for run in cell.runs]
    return Table(
        cells[0].study if several else cells[0].name, head, rows, caption + provenance(cells[0].label, runs)
    )


def outcome(setting: Setting, best: Setting | None) -> list[str]:
    """Return a setting's cells: final loss, gap, share of dense bytes, synchronized steps, seconds."""
    gap = setting.gap(best) if best else None
    counts = [
        [run[key] for run in setting.runs if run.get(key) is not None] for key in ("synchronized", "seconds")
    ]
    return [
        setting.loss.text(".4f"),
        "best baseline" if setting is best else gap.text("+.4f") if gap else "",
        f"{100 * setting.share.mean:.3g}%" if setting.share else "",
        *(f"{statistics.fmean(values):,.0f}" if values else "" for values in counts),
    ]


def purpose_table(cell: Cell) -> Table | None:
    """Return a cell's mean bytes on the wire by purpose; None where the runs did not count them."""
    counted = {
        setting.name: [run["bytes"] for run in setting.runs if run.get("bytes")] for setting in cell.settings
    }
    counted = {name: runs for name, runs in counted.items() if runs}
    keys = list(
        dict.fromkeys(key for runs in counted.values() for run in runs for key, count in run.items() if count)
    )
    if not keys:
        return None
    rows = []
    for name, runs in counted.items():
        means = [statistics.fmean(number(run.get(key, 0)) for run in runs) for key in keys]
        rows.append([name, *map(readable, means), readable(sum(means))])
    caption = f"Bytes leaving one replica in a whole run, mean over seeds. {cell.provenance}"
    return Table(
        f"Bytes by purpose, {cell.name}", ["setting", *(words_of(key) for key in keys), "all"], rows, caption
    )


@dataclass
class Link:
    """Cases of a slow-link benchmark that have one label, the last of each."""

    label: str
    cases: list[Record]

    @property
    def sites(self) -> list[int]:
        return sorted({case["sites"] for case in self.cases})

    @property
    def delays(self) -> list[float]:
        return sorted({case["delay_ms"] for case in self.cases})

    @property
    def rates(self) -> list[float]:
        """Return the link rates in Mbit/s, inf for an unlimited one."""
        return sorted({rate(case) for case in self.cases})

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(map(case_name, self.cases)))

    @property
    def provenance(self) -> str:
        return provenance(self.label, self.cases)

    def seconds(self, name: str, *, sites: int, delay: float) -> dict[float, float]:
        """Return the seconds per step of a setting by link rate; what was not measured is NaN."""
        cases = [
            case
            for case in self.cases
            if (case_name(case), case["sites"], case["delay_ms"]) == (name, sites, delay)
        ]
        return {rate(case): number(case["seconds_per_step"]) for case in sorted(cases, key=rate)}

    def speed_up(self, name: str, *, sites: int, delay: float) -> dict[float, float]:
        """Return how many times faster than setting "dense" a step is, by link rate; NaN where either is
        missing."""
        dense = self.seconds("dense", sites=sites, delay=delay)
        return {
            x: dense.get(x, math.nan) / y if y else math.nan
            for x, y in self.seconds(name, sites=sites, delay=delay).items()
        }


def rate(case: Record) -> float:
    return math.inf if case["mbit"] is None else float(case["mbit"])


def case_name(case: Record) -> str:
    """Return the setting with its interval, which "dense" does not have."""
    interval = case.get("interval")
    return (
        case["setting"]
        if case["setting"] == "dense" or interval in (None, 1)
        else f"{case['setting']}, every {interval:g} steps"
    )


def read_links(files: Sequence[Path]) -> list[Link]:
    """Read slow-link files; measured, emulated and computed cases never share a `Link`."""
    newest: dict[tuple[Any, ...], Record] = {}
    for file in files:
        lines = read_lines(file)
        require(
            lines,
            LINK_KEYS,
            file,
            "a slow-link file has a line for each setting, number of sites, link rate and delay",
        )
        for case in lines:
            newest[case["label"], case_name(case), case["sites"], rate(case), case["delay_ms"]] = case
    labels = list(dict.fromkeys(label for label, *_ in newest))
    return [Link(label, [case for key, case in newest.items() if key[0] == label]) for label in labels]


def link_table(link: Link) -> Table:
    """Return seconds per step by link rate, and in brackets the speed-up over dense."""
    rows = []
    for sites, delay, name in product(link.sites, link.delays, link.names):
        seconds, ratios = (points(name, sites=sites, delay=delay) for points in (link.seconds, link.speed_up))
        words = {
            x: f"{y:.3g} ({ratios[x]:.2f}x)" if ratios[x] > 0 else f"{y:.3g}"
            for x, y in seconds.items()
            if not math.isnan(y)
        }
        if seconds:
            rows.append([name, f"{sites}", f"{delay:g}", *(words.get(x, "") for x in link.rates)])
    rates = ["no limit" if math.isinf(x) else f"{x:g} Mbit/s" for x in link.rates]
    caption = (
        f"Seconds per step, in brackets how many times faster than dense on the same link. {link.provenance}"
    )
    return Table(f"Slow link, {link.label}", ["setting", "sites", "delay, ms", *rates], rows, caption)
