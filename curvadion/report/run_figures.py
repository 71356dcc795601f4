"""Pictures of training runs: one function for each, from what was read to a matplotlib figure, or None where
the files hold nothing to draw."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import linear_regression
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvadion.report.drawing import BLUE, COLORS, GREY, MOST_NAMES, ORANGE, drift_axes, log_axis, panels
from curvadion.report.runs import Run, number, sent_keys, sent_words


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with as many neighbours on either side, a thirtieth of all at most; fewer near the
    start, so that a steep one is followed and not trailed. The end, where there are fewer too, follows the
    line of least squares through the last values, not the noise of the very last. Gaps stay gaps, and count
    for nothing."""
    reach = max(2, len(values) // 30)
    sums, counts = [0.0], [0]
    for value in values:
        gap = math.isnan(value)
        sums.append(sums[-1] + (0.0 if gap else value))
        counts.append(counts[-1] + (not gap))
    means = []
    for i, value in enumerate(values):
        side = min(reach, i, len(values) - 1 - i)
        low, high = i - side, i + side + 1
        if math.isnan(value):
            means.append(math.nan)
        else:
            means.append((sums[high] - sums[low]) / (counts[high] - counts[low]))
    last = [(i, value) for i, value in enumerate(values) if math.isfinite(value)][-2 * reach - 1 :]
    if len(last) > 2 * reach and not math.isnan(values[-1]):
        places, ends = zip(*last, strict=True)
        slope, intercept = linear_regression(places, ends)
        means[-1] = min(max(slope * (len(values) - 1) + intercept, min(ends)), max(ends))
    return means


def loss_curves(
    runs: Sequence[Run], columns: Sequence[Sequence[float]], x_label: str, title: str
) -> tuple[Figure, Axes]:
    """Draw training losses and held-out losses against a column of each run, which is 0 before the first
    step."""
    figure, [[axes]] = panels(1, 1, height=3.6 + 0.2 * -(-len(runs) // 2), label="measured")
    for index, (run, column) in enumerate(zip(runs, columns, strict=True)):
        color = COLORS[index % len(COLORS)]
        losses = run.column("loss")
        axes.plot(column, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            column,
            smooth(losses),
            color=color,
            linewidth=1.6,
            label=f"{run.name}: {number(run.summary['held_out'][-1][1]):.3f} held out",
        )
        place = {0.0: 0.0, **dict(zip(run.column("step"), column, strict=True))}
        points = [(place[step], number(loss)) for step, loss in run.summary["held_out"] if step in place]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            "o",
            color=color,
            markersize=6,
            markeredgecolor="white",
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel("loss (nats a byte)")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    return figure, axes


def loss_against_tokens(runs: Sequence[Run]) -> Figure:
    """Draw the loss against the tokens of all replicas."""
    columns = [[total / 1e6 for total in run.sums("tokens")] for run in runs]
    return loss_curves(runs, columns, "million tokens, all replicas", "Loss against tokens")[0]


def loss_against_time(runs: Sequence[Run]) -> Figure:
    """Draw the loss against training time, without evaluations and checkpoints."""
    return loss_curves(
        runs, [run.sums("seconds") for run in runs], "seconds of training", "Loss against wall-clock time"
    )[0]


def loss_against_bytes(runs: Sequence[Run]) -> Figure | None:
    """Draw the loss against what one replica has sent so far."""
    wire = all(run.has_wire for run in runs)
    sent, dense = (f"curvadion/{key}" for key in sent_keys(wire))
    columns = [[total / 1e6 or math.nan for total in run.sums(sent)] for run in runs]
    if all(math.isnan(value) for column in columns for value in column):
        return None
    title = f"Loss against bytes {sent_words(wire)}"
    figure, axes = loss_curves(runs, columns, "MB so far, between replicas", title)
    for total in sorted({run.sums(dense)[-1] / 1e6 for run in runs} - {0.0}):
        axes.axvline(total, color=GREY, linestyle="--", linewidth=1)
        words: dict[str, Any] = {"ha": "right", "va": "top", "rotation": 90, "fontsize": 8.5, "color": GREY}
        axes.annotate("dense bf16 gradients", (total, 0.97), xycoords=axes.get_xaxis_transform(), **words)
    log_axis(axes, "x")
    return figure


def bytes_so_far(runs: Sequence[Run]) -> Figure | None:
    """Draw what one replica has sent so far against steps, and what dense gradients would have been."""
    wire = all(run.has_wire for run in runs)
    sent, dense = (f"curvadion/{key}" for key in sent_keys(wire))
    if not any(run.sums(sent)[-1] for run in runs):
        return None
    figure, [[axes]] = panels(1, 1, height=2.6 + 0.2 * (len(runs) // 2 + 1), label="measured")
    for index, run in enumerate(runs):
        axes.plot(
            run.column("step"),
            [total / 1e6 for total in run.sums(sent)],
            color=COLORS[index % len(COLORS)],
            label=run.name,
        )
    for run in {run.sums(dense)[-1]: run for run in runs}.values():
        axes.plot(run.column("step"), [total / 1e6 for total in run.sums(dense)], "--", color=GREY)
    axes.plot([], [], "--", color=GREY, label="dense bf16 gradients")
    axes.set_xlabel("step")
    axes.set_ylabel("MB")
    axes.set_title(f"Bytes {sent_words(wire)} so far", loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def rmmc_timeline(runs: Sequence[Run]) -> Figure | None:
    """Draw RMMC of every step with tau, and which steps synchronized and why; a panel for each run that has
    matrices."""
    gated = [run for run in runs if run.gated]
    if not gated:
        return None
    figure, axes = panels(len(gated), 1, height=0.7 + 2.1 * len(gated), label="measured", sharex=True)
    for run, [axis] in zip(gated, axes, strict=True):
        columns = [run.column(key) for key in ("step", "curvadion/rmmc_max", "curvadion/synchronized")]
        points = list(zip(*columns, run.taus, strict=True))
        local = [(x, y) for x, y, synchronized, _ in points if not synchronized]
        opened = [(x, y) for x, y, synchronized, tau in points if synchronized and y > tau]
        ruled = [(x, y) for x, y, synchronized, tau in points if synchronized and not y > tau]
        axis.scatter([x for x, _ in local], [y for _, y in local], color=BLUE, marker=".", s=12)
        axis.scatter([x for x, _ in opened], [y for _, y in opened], color=ORANGE, s=22)
        axis.scatter([x for x, _ in ruled], [y for _, y in ruled], facecolors="none", edgecolors=ORANGE, s=18)
        if math.isfinite(run.tau):
            axis.plot(columns[0], run.taus, color=GREY, linestyle="--", linewidth=1)
        log_axis(axis, "y")
        axis.set_ylabel("RMMC")
        steered = " at first" if len(set(run.taus)) > 1 else ""
        tau = f"tau {run.tau:g}{steered}, " if math.isfinite(run.tau) else ""
        count = f"{run.total('synchronized'):.0f} of {len(run.steps)} steps synchronized"
        axis.set_title(f"{run.name}: {tau}{count}", loc="left")
    axes[-1][0].set_xlabel("step")
    figure.legend(handles=_handles(gated), loc="outside lower center", ncols=4)
    return figure


def _handles(runs: Sequence[Run]) -> list[Line2D]:
    """Return the legend's lines: a tau, and what it decides, only where there is one."""
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
    hollow: dict[str, Any] = {"markeredgecolor": ORANGE, "markerfacecolor": "none"}
    local = Line2D([], [], color=BLUE, label="local step", **{**dot, "marker": "."})
    if not any(math.isfinite(run.tau) for run in runs):
        return [local, Line2D([], [], label="synchronized step", **hollow, **dot)]
    return [
        local,
        Line2D([], [], color=ORANGE, label="synchronized: RMMC above tau", **dot),
        Line2D([], [], label="synchronized by another rule", **hollow, **dot),
        Line2D([], [], color=GREY, linestyle="--", label="tau"),
    ]


def rmmc_heat_maps(runs: Sequence[Run]) -> Figure | None:
    """Draw RMMC of every matrix on the steps that it was read on; a panel and a colour scale for each run."""
    mapped = [(run, [record for record in run.steps if record.get("rmmc")]) for run in runs]
    mapped = [(run, records) for run, records in mapped if len(records) > 1]
    if not mapped:
        return None
    names = [
        list(dict.fromkeys(name for record in records for name in record["rmmc"])) for _, records in mapped
    ]
    heights = [0.9 + min(9.0, max(1.5, 0.16 * len(n))) for n in names]
    figure, axes = panels(len(mapped), 1, height=sum(heights), label="measured", height_ratios=heights)
    for (run, records), matrices, [axis] in zip(mapped, names, axes, strict=True):
        rows = [[number(record["rmmc"].get(name)) for record in records] for name in matrices]
        positive = [value for row in rows for value in row if 0 < value < math.inf]
        if not positive:
            axis.set_title(f"{run.name}: RMMC undefined on every step", loc="left")
            continue
        low, high = min(positive), max(positive)
        values = [
            [max(value, low) for value in row] for row in rows
        ]  # where it did not change at all; NaN stays NaN
        steps = [record["step"] for record in records]
        edges = [steps[0] - (steps[1] - steps[0]) / 2, *((a + b) / 2 for a, b in pairwise(steps))]
        edges.append(steps[-1] + (steps[-1] - steps[-2]) / 2)
        places = [row - 0.5 for row in range(len(matrices) + 1)]
        scale = LogNorm(low, high if high > low else 1.01 * low)
        mesh = axis.pcolormesh(edges, places, values, norm=scale, cmap="viridis")
        axis.set_facecolor("#dddddd")
        axis.invert_yaxis()
        axis.grid(False)
        every = -(-len(matrices) // MOST_NAMES)
        axis.set_yticks(range(0, len(matrices), every), matrices[::every], fontsize=7.5)
        axis.set_title(f"{run.name}: RMMC of every matrix", loc="left")
        shown = low < run.tau < high
        label = f"RMMC ({'line: tau; ' * shown}grey: undefined)"
        bar = figure.colorbar(mesh, ax=axis, pad=0.01, aspect=30, label=label)
        log_axis(bar.ax, "y")
        if shown:
            bar.ax.axhline(run.tau, color="black", linewidth=2)
    axes[-1][0].set_xlabel("step")
    return figure


def drift(runs: Sequence[Run]) -> Figure | None:
    """Draw how far the replicas had moved apart just before they synchronized."""
    points = [
        [(x, y) for x, y in zip(run.column("step"), run.column("drift"), strict=True) if y > 0]
        for run in runs
    ]
    if not any(points):
        return None
    figure, [[axes]] = panels(1, 1, height=2.8, label="measured")
    for index, (run, found) in enumerate(zip(runs, points, strict=True)):
        if found:
            axes.plot(
                *zip(*found, strict=True),
                color=COLORS[index % len(COLORS)],
                marker="o",
                markersize=3.5,
                linewidth=1,
                label=run.name,
            )
    drift_axes(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
