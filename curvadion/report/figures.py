"""Draw: one function for each figure, from what was read to a matplotlib figure, or None where the files hold
nothing to draw."""

import io
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise SystemExit(
        f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'"
    ) from None

from curvadion.report.runs import Run, number, sent_keys, sent_words
from curvadion.report.studies import Cell, Link, Setting, sensitivity

BLUE, ORANGE, GREY = "#2f6db3", "#e0762a", "#8a8a8a"
COLORS = (BLUE, ORANGE, "#3a9a5b", "#8d5fb0", "#b5475d", "#7a6a53", "#2199a8", "#b8961f")
MARKERS = "osD^vP"
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
WIDTH = 9.0  # inches; at 100 points an inch a column of 900
MOST_NAMES = 44  # that can be read along the side of a heat map
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names are text
}


def draw(figure_of: Callable[[Any], Figure | None], results: Any, provenance: str) -> bytes | None:
    """Return a figure as a PNG file, which says how its results came about; None where there is nothing to
    draw."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(results)
        if figure is None:
            return None
        file = io.BytesIO()
        figure.savefig(
            file, format="png", dpi=140, metadata={"Description": provenance, "Software": "curvadion report"}
        )
    return file.getvalue()


def panels(
    rows: int, columns: int, *, height: float, label: str, **shared: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its axes; the label of its results stands in its corner."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    axes[0, -1].set_title(label, loc="right", fontsize=9, color=GREY)
    return figure, axes.tolist()


def plain(value: float) -> str:
    return f"{value:,.10g}" if value >= 1e-4 else f"{value:.10f}".rstrip("0").rstrip(".")


def log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain numbers; two and five are named too where there are few
    decades."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    decades = math.log10(high / low) if low > 0 else 1
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10)))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of a setting, different for the first 48."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index // len(COLORS) % len(MARKERS)]}


def smooth(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Average exponentially, without a bias to the first value; gaps stay gaps."""
    total = weight = 0.0
    means = []
    for value in values:
        if not math.isnan(value):
            total, weight = memory * total + value, memory * weight + 1
        means.append(math.nan if math.isnan(value) else total / weight)
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
        tau = f"tau {run.tau:g}{steered}" if math.isfinite(run.tau) else "no tau"
        count = f"{run.total('synchronized'):.0f} of {len(run.steps)} steps synchronized"
        axis.set_title(f"{run.name}: {tau}, {count}", loc="left")
    axes[-1][0].set_xlabel("step")
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
    handles = [
        Line2D([], [], color=BLUE, label="local step", **{**dot, "marker": "."}),
        Line2D([], [], color=ORANGE, label="synchronized: RMMC above tau", **dot),
        Line2D(
            [],
            [],
            markeredgecolor=ORANGE,
            markerfacecolor="none",
            label="synchronized by another rule",
            **dot,
        ),
        Line2D([], [], color=GREY, linestyle="--", label="tau"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


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
        bar = figure.colorbar(mesh, ax=axis, pad=0.01, aspect=30, label="RMMC (line: tau; grey: undefined)")
        log_axis(bar.ax, "y")
        if low < run.tau < high:
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
    log_axis(axes, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("relative distance")
    axes.set_title("Drift of replicas just before each synchronization", loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def shown(cell: Cell) -> list[Setting]:
    """Return the settings that have a valid run."""
    return [setting for setting in cell.settings if setting.runs]


def ceiling(values: Sequence[float]) -> float:
    """Return where to cut an axis off, so that a few bad settings do not press all others together: inf where
    nothing stands out."""
    ordered = sorted(values)
    limit = ordered[0] + 3 * (ordered[(3 * len(ordered) - 1) // 4] - ordered[0])
    return limit if ordered[0] < limit < ordered[-1] else math.inf


def study_scatter(cell: Cell) -> Figure | None:
    """Draw final loss against the share of dense bytes, a point for each setting, and the best baseline as a
    band."""
    points = [(setting, setting.share) for setting in shown(cell)]
    drawn = sorted(
        ((s, share) for s, share in points if share and share.mean > 0), key=lambda pair: -pair[1].mean
    )
    if not drawn:
        return None
    figure, [[axes]] = panels(1, 1, height=max(4.2, 0.9 + 0.21 * len(drawn)), label=cell.label)
    handles, top, best = [], ceiling([setting.loss.mean for setting, _ in drawn]), cell.best
    if best:
        handles.append(
            axes.axhline(
                best.loss.mean, color=GREY, linestyle="--", linewidth=1, label=f"best baseline: {best.name}"
            )
        )
        axes.axhspan(*best.loss.bar, color=GREY, alpha=0.18, linewidth=0)
    axes.axvline(100, color=GREY, linewidth=1, alpha=0.6)
    for setting, share in drawn:
        style = {
            "linestyle": "none",
            "markersize": 7,
            "markerfacecolor": "white" if setting.baseline else None,
            **look(setting.index),
        }
        handles.append(Line2D([], [], label=setting.name, **style))
        x, y = 100 * share.mean, setting.loss.mean
        if y > top:
            axes.plot(x, top, **{**style, "marker": 6})
            axes.annotate(
                f"{y:.3g}", (x, top), (8, -5), textcoords="offset points", fontsize=8.5, color=style["color"]
            )
            continue
        (left, right), (low, high) = share.bar, setting.loss.bar
        axes.hlines(y, max(100 * left, x / 10), 100 * right, color=style["color"], linewidth=1)
        axes.vlines(x, low, high, color=style["color"], linewidth=1)
        axes.plot(x, y, **style)
    log_axis(axes, "x")
    axes.set_xlabel("bytes leaving one replica, in % of bf16 gradients averaged every step")
    axes.set_ylabel("final loss")
    axes.set_title("Final loss against bytes", loc="left")
    figure.legend(handles=handles, loc="outside right center", fontsize=8.5)
    return figure


def study_gaps(cell: Cell) -> Figure | None:
    """Draw every setting's loss over the best baseline's: seeds as dots, their mean and spread."""
    best = cell.best
    gaps = [(s, s.gap(best)) for s in shown(cell) if s is not best] if best else []
    found = sorted(((s, gap) for s, gap in gaps if gap), key=lambda pair: pair[1].mean)
    if not found or best is None:
        return None
    figure, [[axes]] = panels(1, 1, height=1.1 + 0.27 * len(found), label=cell.label)
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    end = ceiling([0.0, *(gap.mean for _, gap in found)])
    for row, (setting, gap) in enumerate(found):
        style = {
            "markersize": 7,
            "markerfacecolor": "white" if setting.baseline else None,
            **look(setting.index),
        }
        words = f"{gap.mean:+.4f}" + (f" ± {gap.deviation:.4f}" if gap.deviation is not None else "")
        axes.annotate(words, (1.02, row), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        if gap.mean > end:
            axes.plot(end, row, **{**style, "marker": 5})
            continue
        axes.plot(gap.values, [row] * len(gap.values), "o", color=style["color"], alpha=0.4, markersize=4)
        axes.plot(gap.bar, [row, row], color=style["color"], linewidth=1.6)
        axes.plot(gap.mean, row, **style)
    shares = [f"   {plain(float(f'{100 * s.share.mean:.2g}'))}%" if s.share else "" for s, _ in found]
    axes.set_yticks(
        range(len(found)), [s.name + share for (s, _), share in zip(found, shares, strict=True)], fontsize=9
    )
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(f"final loss minus that of {best.name}")
    axes.set_title("Gap to the best baseline", loc="left")
    return figure


def study_sensitivity(cells: Sequence[Cell]) -> Figure | None:
    """Draw the gap to a baseline that all values have against what was changed alone, a panel each."""
    setting, found = sensitivity(cells)
    if not found:
        return None
    columns = 3
    rows = -(-len(found) // columns)
    figure, axes = panels(rows, columns, height=0.6 + 2.2 * rows, label=cells[0].label, sharey=True)
    places = [place for row in axes for place in row]
    top = ceiling([gap.mean for points in found.values() for _, gap in points])
    for place, (name, points) in zip(places, found.items(), strict=False):
        x, y = [x for x, _ in points], [gap.mean for _, gap in points]
        place.plot(x, [min(value, top) for value in y], color=BLUE, linewidth=1, marker="o", markersize=4)
        place.vlines(
            x,
            *zip(*((min(end, top) for end in gap.bar) for _, gap in points), strict=True),
            color=BLUE,
            linewidth=1.5,
        )
        for at, value in zip(x, y, strict=True):
            if value > top:
                place.annotate(
                    f"{value:.2g}", (at, top), (4, -4), textcoords="offset points", fontsize=7.5, color=ORANGE
                )
        if min(x) > 0 and max(x) >= 4 * min(x):
            log_axis(place, "x")
        place.axhline(0, color=GREY, linestyle="--", linewidth=1)
        place.set_title(name, loc="left", fontsize=9)
    for place in places[len(found) :]:
        place.set_visible(False)
    for row in axes:
        row[0].set_ylabel("gap")
    title = f"Gap to the best baseline that all values of a panel have, one change to: {setting}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def study_curves(cell: Cell) -> Figure | None:
    """Draw losses against tokens: mean over seeds, and their extremes as a band; the first tenth may be cut
    off above."""
    curves = []
    for setting in shown(cell):
        by_seed = [
            {step: y for step, y in run.get("curve") or [] if math.isfinite(number(y))}
            for run in setting.runs
        ]
        steps = sorted(set.intersection(*map(set, by_seed)))
        if steps:
            curves.append((setting, steps, [[losses[step] for losses in by_seed] for step in steps]))
    if not curves:
        return None
    figure, [[axes]] = panels(1, 1, height=4.2, label=cell.label)
    for setting, steps, losses in curves:
        scale = (setting.runs[0].get("tokens") or 0) / cell.steps / 1e6 or 1
        x = [step * scale for step in steps]
        style = look(setting.index) | {
            "linestyle": "--" if setting.baseline else "-",
            "markevery": max(1, len(x) // 8),
        }
        axes.plot(
            x,
            [statistics.fmean(values) for values in losses],
            label=setting.name,
            linewidth=1.5,
            markersize=4,
            **style,
        )
        axes.fill_between(
            x,
            [min(v) for v in losses],
            [max(v) for v in losses],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    late = [
        y
        for _, steps, losses in curves
        for step, values in zip(steps, losses, strict=True)
        for y in values
        if step >= cell.steps / 10
    ]
    if late and max(late) > min(late):
        room = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)
    tokens = any(setting.runs[0].get("tokens") for setting, *_ in curves)
    axes.set_xlabel("million tokens, all replicas" if tokens else "step")
    axes.set_ylabel("loss")
    axes.set_title("Loss against tokens", loc="left")
    figure.legend(loc="outside right center", fontsize=8.5)
    return figure


def study_drift(cell: Cell) -> Figure | None:
    """Draw how far the replicas had moved apart before each synchronization, a line for each seed."""
    lines = [(s, [(x, y) for x, y in run.get("drift") or [] if y]) for s in shown(cell) for run in s.runs]
    lines = [(setting, points) for setting, points in lines if points]
    if not lines:
        return None
    figure, [[axes]] = panels(1, 1, height=3.4, label=cell.label)
    named: set[str] = set()
    for setting, points in lines:
        label = None if setting.name in named else setting.name
        named.add(setting.name)
        axes.plot(
            *zip(*points, strict=True),
            markersize=2.5,
            linewidth=0.7,
            alpha=0.7,
            label=label,
            **look(setting.index),
        )
    log_axis(axes, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("relative distance")
    axes.set_title("Drift of replicas just before each synchronization", loc="left")
    figure.legend(loc="outside right center", fontsize=8.5)
    return figure


def link_speed(link: Link) -> Figure | None:
    """Draw seconds per step and speed-up over dense gradients against the link's rate; a column for each
    number of sites."""
    finite = [x for x in link.rates if math.isfinite(x)]
    if not finite:
        return None
    unlimited = 4 * finite[-1]  # where an unlimited link stands on the axis
    figure, axes = panels(2, len(link.sites), height=5.6, label=link.label, sharex=True, sharey="row")
    for column, sites in enumerate(link.sites):
        for index, name in enumerate(link.names):
            color = COLORS[index % len(COLORS)]
            for delay, dashes in zip(link.delays, DASHES * len(link.delays), strict=False):
                for row, points in enumerate((link.seconds, link.speed_up)):
                    found = points(name, sites=sites, delay=delay)
                    if not found or (row and name == "dense"):
                        continue
                    x = [min(rate, unlimited) for rate in found]
                    axes[row][column].plot(
                        x,
                        list(found.values()),
                        dashes,
                        color=color,
                        marker="o",
                        markersize=3.5,
                        linewidth=1.5,
                    )
        top, bottom = axes[0][column], axes[1][column]
        top.set_title(f"{sites} sites", loc="left")
        bottom.axhline(1, color=GREY, linewidth=1)
        bottom.set_xlabel("link, Mbit/s")
        for axis in (top, bottom):
            log_axis(axis, "x")
            log_axis(axis, "y")
        ticks = [*finite, unlimited] if math.inf in link.rates else finite
        bottom.set_xticks(ticks, [plain(x) if x < unlimited else "no limit" for x in ticks], fontsize=8.5)
        for axis in (top, bottom):
            axis.tick_params(axis="x", which="minor", bottom=False)
    axes[0][0].set_ylabel("seconds per step")
    axes[1][0].set_ylabel("speed-up over dense")
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker="o", markersize=3.5, label=name)
        for i, name in enumerate(link.names)
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle=style, label=f"{delay:g} ms delay")
        for delay, style in zip(link.delays, DASHES * len(link.delays), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure
