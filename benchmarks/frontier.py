"""Loss against bytes in one picture: this study's runs, and the points that others have published.

    python benchmarks/frontier.py benchmarks/results/convergence.jsonl --out docs/images/frontier.png

Filled: measured here, the gap to the best baseline of the same steps and seeds, with the 95 % confidence
interval of the mean of paired differences (Student's t). Hollow: as their authors state them, at other sizes
and with other baselines, each with what it lacks; a point without a stated gap stands on the lower edge.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from curvadion.report.studies import Cell, Setting, read_studies

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


@dataclass(frozen=True)
class Published:
    """A point as its authors state it; share of bf16 dense bytes, gap in nats per token, None if not
    stated."""

    name: str
    share: float
    gap: float | None
    lacks: str
    source: str


PUBLISHED = (
    Published("MuLoCo 150M, K = 16", 0.0083, 0.098, "bytes computed, collective simulated", "2505.23725v2"),
    Published("MuLoCo 3.1B, K = 16", 0.0083, 0.037, "bytes computed, collective simulated", "2505.23725v2"),
    Published("MuLoCo 220M, K = 8", 0.0042, None, "no number for the gap", "2505.23725v1"),
    Published("Covenant 72B", 0.0005, None, "no dense baseline, no code", "2603.08163"),
    Published("CurvaDion's paper", 0.01, 0.0, "replicas were not local", "2512.13728"),
)


def interval(gaps: list[float]) -> float:
    """Return half of the 95 % confidence interval of the mean; NaN for a single value."""
    if len(gaps) < 2:
        return math.nan
    return STUDENT[len(gaps) - 1] * statistics.stdev(gaps) / math.sqrt(len(gaps))


def points(cell: Cell) -> list[tuple[Setting, float, float, float]]:
    """Return the settings of a cell that send less than everything: share of dense bytes, mean gap and half
    of its confidence interval."""
    best = cell.best
    found = []
    for setting in cell.settings:
        gap = setting.gap(best) if best and setting.runs and not setting.baseline else None
        if best is None or gap is None or setting.share is None or len(gap.values) < len(best.runs):
            continue
        found.append((setting, setting.share.mean, gap.mean, interval(list(gap.values))))
    return sorted(found, key=lambda point: point[1])


def draw(cells: list[Cell], worst: float, out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for cell, marker in zip(sorted(cells, key=lambda c: c.steps), "osD^v", strict=False):
        shown = [p for p in points(cell) if p[2] < worst]
        if not shown:
            continue
        _, x, y, e = zip(*shown, strict=True)
        label = (
            f"measured: {cell.parameters / 1e6:.2g}M parameters, {cell.steps:,} steps, K = {cell.replicas}"
        )
        bars = [0.0 if math.isnan(one) else one for one in e]
        axes.errorbar([100 * one for one in x], y, bars, fmt=marker, capsize=3, label=label)
    for k, point in enumerate(PUBLISHED):
        y = 0.0 if point.gap is None else point.gap
        axes.plot(100 * point.share, y, "o", mfc="none", color="0.4")
        words = f"{point.name}: {point.lacks}"
        axes.annotate(
            words, (100 * point.share, y), (6, 4 + 9 * (k % 2)), textcoords="offset points", fontsize=7
        )
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes that leave a replica, % of bf16 gradients averaged on every step")
    axes.set_ylabel("gap to the best synchronous baseline, nats")
    axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="of benchmarks/convergence.py")
    parser.add_argument("--held-out", default="test.txt", help="only runs whose loss is of this text")
    parser.add_argument("--worst", type=float, default=0.25, help="leave out what has a larger gap")
    parser.add_argument("--out", type=Path, default=Path("docs/images/frontier.png"), help="the picture")
    args = parser.parse_args()
    cells = [cell for cell in read_studies(args.files) if cell.held_out == args.held_out]
    for cell in cells:
        print(cell.name)
        for setting, share, gap, half in points(cell):
            print(f"  {setting.name}: {share:.2%}, {gap:+.4f} ± {half:.4f} ({len(setting.runs)} seeds)")
    draw(cells, args.worst, args.out)


if __name__ == "__main__":
    main()
