"""Pictures of studies and slow links: one function for each, from what was read to a matplotlib figure, or
None where the files hold nothing to draw."""

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvadion.report.drawing import (
    BLUE,
    COLORS,
    DASHES,
    GREY,
    ORANGE,
    drift_axes,
    log_axis,
    look,
    panels,
    plain,
)
from curvadion.report.runs import number
from curvadion.report.studies import Cell, Link, Setting, sensitivity


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
    drift_axes(axes)
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
