"""Loss against bytes in one picture: this study's runs, and the points that others have published.

    python benchmarks/frontier.py benchmarks/results/convergence.jsonl --out docs/images/frontier.png

Filled: measured here, the gap to the best baseline of the same steps and seeds (the mean of several models is
none), with the 95 % confidence interval of the mean of paired differences (Student's t). Hollow: as their
authors state them, at other sizes and with other baselines, each with what it lacks; a point without a stated
gap stands at 0.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergence import HALF_NORMUON, HALF_PERCENT, KEPT, KEPT_FAST, KEPT_NORMUON, OURS, lowered

from curvadion.cli import HelpFormatter
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


COMPUTED = "4 bits; bytes computed, collective simulated"
PUBLISHED = (
    Published("MuLoCo 150M, K = 16", 0.0083, 0.098, COMPUTED, "arXiv:2505.23725v2"),
    Published("MuLoCo 3.1B, K = 16", 0.0083, 0.037, COMPUTED, "arXiv:2505.23725v2"),
    Published("MuLoCo 220M, K = 8", 0.0042, None, "no number for the gap", "arXiv:2505.23725v1"),
    Published("CurvaDion's paper", 0.01, 0.0, "replicas were not local", "arXiv:2512.13728"),
    Published("Covenant 72B", 0.0005, None, "no dense baseline, no code", "arXiv:2603.08163"),
)


def interval(gaps: list[float]) -> float:
    """Return half of the 95 % confidence interval of the mean; NaN for a single value."""
    if len(gaps) < 2:
        return math.nan
    return STUDENT[len(gaps) - 1] * statistics.stdev(gaps) / math.sqrt(len(gaps))


def points(cell: Cell, names: Sequence[str]) -> list[tuple[Setting, float, float, float]]:
    """Return the settings of these names: share of dense bytes, mean gap, half of its confidence interval."""
    found, best = [], cell.best
    for setting in cell.settings:
        gap = setting.gap(best) if best and setting.runs and setting.name in names else None
        if gap is not None and setting.share is not None:
            found.append((setting, setting.share.mean, gap.mean, interval(list(gap.values))))
    return sorted(found, key=lambda point: point[1])


def draw(cells: Sequence[Cell], names: Sequence[str], out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for cell, marker in zip(cells, "osD^v", strict=False):
        _, x, y, e = zip(*points(cell, names), strict=True)
        label = (
            f"measured: {cell.parameters / 1e6:.2g}M parameters, K = {cell.replicas}, {cell.steps:,} steps"
        )
        label += ", unseen text" if cell.held_out else ", the text that was tuned on"
        best = cell.best
        label += f"; gap to {best.name.split(',')[0]}" if best else ""
        bars = [0.0 if math.isnan(one) else one for one in e]
        axes.errorbar([100 * one for one in x], y, bars, fmt=marker, capsize=3, label=label)
    for k, point in enumerate(PUBLISHED):
        x, y = 100 * point.share, 0.0 if point.gap is None else point.gap
        axes.plot(x, y, "o", mfc="none", color="0.4")
        side = "right" if x > 0.6 else "left"
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": side}
        words = f"{point.name}: {point.lacks}"
        axes.annotate(words, (x, y), (-7 if side == "right" else 7, 5 - 14 * (k % 2) * (y == 0)), **style)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.03, 2)
    axes.set_xlabel("bytes that leave a replica, % of bf16 gradients averaged on every step")
    axes.set_ylabel("gap to the synchronous baseline, nats")
    figure.legend(fontsize=8, loc="outside upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of benchmarks/convergence.py")
    parser.add_argument("--out", type=Path, default=Path("docs/images/frontier.png"), help="the picture")
    args = parser.parse_args()
    best = lowered(KEPT_NORMUON, 0.02, 0.5)
    ours = OURS, KEPT, KEPT_FAST, KEPT_NORMUON, best, HALF_PERCENT, HALF_NORMUON
    names = [setting.name for setting in ours]
    alike = [c for c in read_studies(args.files) if (c.replicas, c.batch, c.parts) == (4, 16, False)]
    cells = [c for c in alike if c.held_out or c.steps == 1800]
    for cell in cells:
        print(cell.name)
        for setting, share, gap, half in points(cell, names):
            print(f"  {setting.name}: {share:.2%}, {gap:+.4f} ± {half:.4f} ({len(setting.runs)} seeds)")
    draw(cells, names, args.out)


if __name__ == "__main__":
    main()
