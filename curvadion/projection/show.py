"""Tables in plain text, and the picture of speed-up over bandwidth."""

from collections.abc import Sequence
from pathlib import Path

BANDWIDTHS = [10 ** (k / 20) for k in range(-40, 61)]  # of a picture, Gbit/s

Curves = dict[str, list[tuple[float, float]]]  # by name: Gbit/s of a replica, and speed-up over dense


def draw(file: Path, title: str, curves: Curves, markers: Curves) -> None:
    """Draw speed-up against bandwidth: projected curves, and markers, which are full if emulated."""
    try:
        import matplotlib
    except ImportError:
        rule = "--picture must find matplotlib"
        raise ValueError(f"{rule}; it is missing; pip install 'curvadion[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    colors = {name: pyplot.get_cmap("tab20")(k) for k, name in enumerate(curves)}
    for name, values in curves.items():
        axes.plot(*zip(*values, strict=True), color=colors[name], label=f"projected: {name}")
    for name, values in markers.items():
        label, _, curve = name.partition(": ")
        face = colors[curve] if label == "emulated" else "white"
        axes.scatter(*zip(*values, strict=True), color=face, edgecolors=colors[curve], zorder=3)
    # One line in the legend for each label: colors are those of the curves.
    for label in dict.fromkeys(name.partition(": ")[0] for name in markers):
        face = "#555555" if label == "emulated" else "white"
        axes.scatter([], [], label=label, color=face, edgecolors="#555555")
    axes.axhline(1, color="#8a8a8a", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="Gbit/s of a replica, each way", ylabel="speed-up over dense all-reduce")
    ticks = [d * 10.0**k for k in range(-2, 4) for d in (1, 1.5, 2, 3, 5, 7)]
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in ticks if low <= t <= high], minor=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.yaxis.set_minor_formatter(lambda y, _: "")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right center", frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in plain text, the first column to the left, and an empty line."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        cells = [f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)]
        cells[0] = f"{row[0]:<{widths[0]}}"
        print("  " + "  ".join(cells).rstrip())
    print()
