r"""How the gap goes with length, size, replicas and batch: a power law through the study's runs.

    python benchmarks/law.py benchmarks/results/convergence.jsonl --out docs/images/law.png

The gap is that of a setting to "Muon every step, Nesterov", of the same seeds and conditions; T steps, N
parameters, K replicas, each with B sequences in a step:

    gap = c (T / 600)^t (N / 133,440)^n (K / 4)^k (B / 16)^b

fitted by least squares on its logarithm, one value for each condition: the mean over its seeds. An exponent's
error is the jackknife's over conditions, and "off" is by what factor a condition is missed, at most, when it
is left out of the fit. What lies outside of the measured ranges is extrapolated, and printed as that.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from convergence import BEST, OURS

from curvadion.cli import HelpFormatter
from curvadion.report.studies import Cell, read_studies

BASE = {"steps": 600, "parameters": 133_440, "replicas": 4, "batch": 16}


@dataclass(frozen=True)
class Point:
    """The gap of a setting under one condition; `at` has the keys of BASE."""

    at: tuple[float, ...]
    gap: float
    seeds: int


@dataclass(frozen=True)
class Law:
    """c, and the exponents in the order of BASE, each with its standard error; the worst factor of a
    condition that was left out."""

    c: float
    exponents: tuple[float, ...]
    errors: tuple[float, ...]
    off: float

    def gap(self, at: Sequence[float]) -> float:
        factors = [(x / x0) ** e for x, x0, e in zip(at, BASE.values(), self.exponents, strict=True)]
        return self.c * math.prod(factors)


def conditions(files: Sequence[Path]) -> list[Cell]:
    """Return the study's cells that differ in BASE alone."""
    cells = [c for c in read_studies(files) if not (c.held_out or c.parts)]
    return [c for c in cells if c.seq == 64 and c.backend == "simulation"]


def points(cells: Sequence[Cell], name: str) -> list[Point]:
    """Return a setting's gaps, a condition each, where BEST has the same seeds."""
    found = []
    for cell in cells:
        named = {setting.name: setting for setting in cell.settings if setting.runs}
        gap = named[name].gap(named[BEST.name]) if {name, BEST.name} <= named.keys() else None
        if gap is not None:
            at = tuple(float(getattr(cell, key)) for key in BASE)
            found.append(Point(at, statistics.fmean(gap.values), len(gap.values)))
    return sorted(found, key=lambda point: point.at)


def solve(points: Sequence[Point]) -> np.ndarray:
    """Return log c and the exponents by least squares. Raises ValueError where the conditions do not tell
    them apart, or a gap has no logarithm."""
    if min(point.gap for point in points) <= 0:
        raise ValueError("a gap that is not positive has no logarithm: leave its condition out")
    rows = np.log([[x / x0 for x, x0 in zip(p.at, BASE.values(), strict=True)] for p in points])
    left = np.column_stack([np.ones(len(rows)), rows])
    found, _, rank, _ = np.linalg.lstsq(left, np.log([p.gap for p in points]), rcond=None)
    if rank < left.shape[1]:
        raise ValueError(f"{left.shape[1]} numbers need conditions that vary in each of {list(BASE)}")
    return found


def fit(points: Sequence[Point]) -> Law:
    """Fit the law. Each of BASE must differ from it in two points at least, or one could not be left out:
    ValueError."""
    found, count = solve(points), len(points)
    without = [solve([*points[:i], *points[i + 1 :]]) for i in range(count)]
    spread = np.array(without) - np.mean(without, 0)
    errors = np.sqrt((count - 1) / count * (spread**2).sum(0))
    laws = [Law(math.exp(one[0]), tuple(one[1:]), (), 0.0) for one in without]
    missed = [abs(math.log(law.gap(p.at) / p.gap)) for law, p in zip(laws, points, strict=True)]
    return Law(math.exp(found[0]), tuple(found[1:]), tuple(errors[1:]), math.exp(max(missed)))


def draw(settings: dict[str, tuple[list[Point], Law]], out: Path) -> None:
    """Draw one panel for each of BASE: the points that differ from it in that alone, and the law there."""
    from matplotlib import pyplot

    count = len(BASE)
    figure, panels = pyplot.subplots(1, count, figsize=(3.4 * count, 3.6), layout="constrained", sharey=True)
    words = ("steps", "parameters", "replicas K", "sequences in a replica's step")
    base = tuple(float(x) for x in BASE.values())
    for i, (axes, label) in enumerate(zip(panels, words, strict=True)):
        for k, (name, (found, law)) in enumerate(settings.items()):
            shown = [p for p in found if all(p.at[j] == base[j] for j in range(count) if j != i)]
            axes.plot(
                [p.at[i] for p in shown], [p.gap for p in shown], "osD^v"[k % 5], color=f"C{k}", label=name
            )
            x = np.geomspace(min(p.at[i] for p in found), max(p.at[i] for p in found), 20)
            axes.plot(x, [law.gap((*base[:i], one, *base[i + 1 :])) for one in x], color=f"C{k}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        values = sorted({p.at[i] for found, _ in settings.values() for p in found})
        axes.set_xticks(values, [f"{x:,.0f}" for x in values])
        axes.minorticks_off()
        axes.set_xlabel(label)
    panels[0].set_ylabel("gap to Muon every step, nats")
    panels[0].set_yticks([0.01, 0.02, 0.04, 0.08], ["0.01", "0.02", "0.04", "0.08"])
    panels[0].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="of benchmarks/convergence.py")
    add("--settings", nargs="+", default=[OURS.name], metavar="NAME", help="of the study")
    add("--out", type=Path, default=Path("docs/images/law.png"), help="the picture")
    for key, value in (BASE | {"steps": 20_000, "parameters": 160_000_000}).items():
        add(f"--{key}", type=float, default=value, help="to extrapolate to")
    args = parser.parse_args()
    cells = conditions(args.files)
    settings = {}
    for name in args.settings:
        found = points(cells, name)
        law = fit(found)
        settings[name] = found, law
        print(f"{name}: {law.c:.4f} nats at {BASE}; off by a factor of {law.off:.2f} at most")
        for key, e, error in zip(BASE, law.exponents, law.errors, strict=True):
            print(f"  {key}^({e:+.2f} ± {error:.2f})")
        for p in found:
            at = ", ".join(f"{key} {x:,.0f}" for key, x in zip(BASE, p.at, strict=True))
            print(f"  {at}: {p.gap:+.4f} measured ({p.seeds} seeds), {law.gap(p.at):+.4f} by the law")
        there = tuple(getattr(args, key) for key in BASE)
        words = ", ".join(f"{key} {x:,.0f}" for key, x in zip(BASE, there, strict=True))
        print(f"  extrapolated, {words}: {law.gap(there):+.4f}")
    draw(settings, args.out)


if __name__ == "__main__":
    main()
