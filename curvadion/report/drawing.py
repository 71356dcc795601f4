"""What all pictures have in common: how they are drawn, their axes, colours and sizes."""

import io
import math
from collections.abc import Callable
from typing import Any, Literal

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise SystemExit(
        f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'"
    ) from None

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
    """Return a number as a tick says it: 0.00005, 5,000, 200k, 2M."""
    for least, unit, letter in ((1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if value >= least:
            return f"{value / unit:,.10g}{letter}"
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


def drift_axes(axes: Axes) -> None:
    """Say what a picture of drift shows."""
    log_axis(axes, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("relative distance")
    axes.set_title("Drift of replicas just before each synchronization", loc="left")
