"""Show what the benchmarks measured: tables, and a picture with the roofline.

    python benchmarks/report.py benchmarks/results/kernels.jsonl benchmarks/results/step.jsonl --picture
    kernels.png

Files of `kernels.py` and `step.py`, in any order. Of several results for the same thing the last one counts,
and only those on the hardware of the last run. Effective GB/s: the bytes that the operation must move at
least, whatever the variant moves, divided by the median device time.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'"
    ) from None

Row = dict[str, Any]
COLORS = {
    **dict.fromkeys(("triton", "curvadion_triton", "kernels_triton"), "#2f6db3"),
    **dict.fromkeys(("reference", "products", "curvadion_reference", "kernels_reference"), "#e0762a"),
    **dict.fromkeys(("foreach", "baddbmm_stacked", "microsoft_dion"), "#3a9a5b"),
    **dict.fromkeys(("foreach_compiled", "addmm", "muon"), "#8d5fb0"),
    **dict.fromkeys(("adamw_fused",), "#b5475d"),
    **dict.fromkeys(("sgd_fused", "kernels_triton_graph"), "#7a6a53"),
}
GREY = "#8a8a8a"
MARKERS = {"triton": "o", "products": "s", "reference": "s", "addmm": "^", "baddbmm_stacked": "v"}
ELEMENTWISE = ("momentum_norm_", "local_step_", "local_update")
MODELWISE = (*ELEMENTWISE, "low_rank_apply_")  # on the shapes of a model


def read(files: Sequence[Path]) -> list[Row]:
    """Return the last row of everything that was measured on the hardware of the last run."""
    rows = []
    for file in files:
        try:
            rows += [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        except FileNotFoundError:
            raise SystemExit(
                f"{file} must be a file of JSON lines that kernels.py or step.py wrote; it is not there"
            ) from None
        except json.JSONDecodeError as error:
            raise SystemExit(f"{file} must hold JSON lines; {error}") from None
    if not rows:
        raise SystemExit("there are no results in these files")
    rows.sort(key=lambda r: r["run"]["date"])
    hardware = rows[-1]["run"]["hardware"]
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["run"]["hardware"] != hardware:
            continue
        keys = (
            "benchmark",
            "operation",
            "variant",
            "model",
            "shard",
            "shape",
            "rank",
            "rank_fraction",
            "precision",
            "dtype",
        )
        key = tuple(row.get(k) for k in keys)
        newest.pop(key, None)  # the order of the last run
        newest[key] = row
    return list(newest.values())


def median(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else value["median"]


def number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def caption(rows: list[Row]) -> str:
    """Say what the results were measured with."""
    keys = ("hardware", "commit", "torch", "triton", "python", "cuda", "date")
    runs = {tuple(r["run"].get(key) for key in keys): r["run"] for r in rows}
    copies = [r["GBps"] for r in rows if r["operation"] == "copy"]
    lines = [
        f"{run['hardware']}, commit {run['commit']}, torch {run['torch']}, triton {run['triton']}, Python "
        f"{run['python']}, CUDA {run['cuda']}, "
        f"{run['date'][:16]}{', INTERPRETED: not a measurement' if run.get('interpreted') else ''}"
        for run in list(runs.values())[-3:]
    ]
    return "\n".join([*lines, f"copy: {max(copies):,.0f} GB/s" if copies else ""]).strip()


def show(title: str, rows: list[Row], what: tuple[str, ...], notes: str) -> None:
    """Print a table, a section for each case."""
    if not rows:
        return
    table = Table(title=title, caption=notes, caption_justify="left")
    for key in what:
        table.add_column(key.replace("_", " "), no_wrap=True)
    with_flops = any(row["operation"] == "matmul" for row in rows)
    for label in ("device ms", "p10 to p90", "GB/s", "of copy", "launches", "host us", "wall ms", "MB more"):
        table.add_column(
            "TFLOP/s" if with_flops and label == "of copy" else label, justify="right", no_wrap=True
        )
    before = None
    for row in rows:
        section = tuple(row.get(key) for key in what if key != "variant")
        if before not in (None, section):
            table.add_section()
        before = section
        ms = row["device_ms"]
        teraflops = row["flops"] / ms["median"] / 1e9 if row.get("flops") else None
        table.add_row(
            *(
                "" if row.get(key) is None else f"1/{row[key]}" if key == "shard" else str(row[key])
                for key in what
            ),
            f"{ms['median']:.3f}",
            f"{ms['p10']:.3f} to {ms['p90']:.3f}",
            number(row["GBps"], ",.0f" if (row["GBps"] or 0) >= 100 else ".1f"),
            number(teraflops, ",.3g") if with_flops else number(row["fraction_of_copy"], ".0%"),
            number(row["launches"], "d"),
            number(median(row, "host_us"), ",.0f"),
            number(median(row, "wall_ms"), ",.3f"),
            "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.1f}",
        )
    out(table)


def show_low_rank(rows: list[Row], notes: str) -> None:
    """Print the low-rank apply with a line for each rank and a column for each variant."""
    if not rows:
        return
    table = Table(title="low_rank_apply_: median device ms (launches)", caption=notes, caption_justify="left")
    for label in ("model", "shard", "shape", "precision", "rank"):
        table.add_column(label, no_wrap=True)
    names = [
        name
        for name in ("triton", "products", "addmm", "baddbmm_stacked")
        if any(r["variant"] == name for r in rows)
    ]
    first = names[0]
    for label in (*names, f"products / {first}", f"{first} GB/s", "of copy", "TFLOP/s"):
        table.add_column(label, justify="right", no_wrap=True)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        lines.setdefault((r["model"], r["shard"], r["shape"], r["precision"], r["rank"]), {})[
            r["variant"]
        ] = r
    before = None
    for (model, shard, shape, precision, rank), found in lines.items():
        if before not in (None, (model, shard, shape, precision)):
            table.add_section()
        before = (model, shard, shape, precision)
        ms = {name: r["device_ms"]["median"] for name, r in found.items()}
        launches = {name: "" if r["launches"] is None else f" ({r['launches']})" for name, r in found.items()}
        own = found.get(first)
        table.add_row(
            *(model, f"1/{shard}", shape, precision, str(rank)),
            *(f"{ms[name]:.3f}{launches[name]}" if name in ms else "" for name in names),
            number(ms["products"] / ms[first] if own and "products" in ms else None, ".2f"),
            number(own["GBps"] if own else None, ",.0f"),
            number(own["fraction_of_copy"] if own else None, ".0%"),
            number(own["flops"] / ms[first] / 1e9 if own else None, ",.3g"),
        )
    out(table)


def out(table: Table) -> None:
    """Print a table; one that is cut at 80 columns in a log file is worth nothing."""
    Console(highlight=False, width=None if Console().is_terminal else 180).print(table)


def roofline(axis: Any, rows: list[Row]) -> None:
    """Draw operations between the measured ceilings of memory and of products, at the intensity of their
    definition."""
    points = [
        r
        for r in rows
        if r.get("flops") and r["operation"] in MODELWISE and r["shard"] == 1 and r["model"] != "tiny"
    ]
    ceilings = {
        r["precision"]: r["flops"] / r["device_ms"]["median"] / 1e9
        for r in rows
        if r["operation"] == "matmul"
    }
    copy = max(r["GBps"] for r in rows if r["operation"] == "copy") / 1e3  # TB/s: TFLOP/s at one flop a byte
    x = [r["flops"] / r["bytes"] for r in points]
    low, high = min(x) / 2, max(max(x), *(c / copy for c in ceilings.values())) * 12
    top = max(ceilings.values(), default=high * copy)
    corner = top / copy
    axis.plot([low, corner], [low * copy, top], color=GREY, linewidth=1.5)
    axis.text(1.3, 1.3 * copy * 0.6, f"copy, {1e3 * copy:,.0f} GB/s", color=GREY, fontsize=9, va="top")
    for precision, value in ceilings.items():
        axis.plot(
            [value / copy, high],
            [value, value],
            color=GREY,
            linewidth=1.5,
            linestyle="-" if precision == "tf32" else "--",
        )
        axis.text(
            high,
            value * 1.08,
            f"product, {precision}, {value:,.3g} TFLOP/s",
            color=GREY,
            fontsize=9,
            ha="right",
        )
    seen = set()
    # The largest model says most; its most frequent shape stands for the others.
    largest = max(points, key=lambda r: r["params"])["model"]
    shape = next((r["shape"] for r in points if r["model"] == largest and r.get("shape")), None)
    for row in points:
        name = row["variant"]
        if (
            row["model"] != largest
            or row.get("shape") not in (None, shape)
            or name in ("sgd_fused", "adamw_fused", "addmm")
        ):
            continue
        operation = row["operation"]
        hollow = row.get("precision") == "highest" and operation == "low_rank_apply_"
        label = (
            f"{operation.rstrip('_')}, {name}{'' if operation in ELEMENTWISE else ', ' + row['precision']}"
        )
        marker = {"momentum_norm_": "P", "local_step_": "X", "local_update": "D"}.get(
            operation
        ) or MARKERS.get(name, "o")
        axis.scatter(
            row["flops"] / row["bytes"],
            row["flops"] / row["device_ms"]["median"] / 1e9,
            marker=marker,
            s=34,
            facecolors="none" if hollow else COLORS.get(name, GREY),
            edgecolors=COLORS.get(name, GREY),
            label=None if label in seen else label,
            zorder=3,
        )
        seen.add(label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high * 1.1)
    axis.set_xlabel(
        "arithmetic intensity of the definition (flop a byte); low_rank_apply: from left to right by rank"
    )
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Roofline, {largest} model{f', low_rank_apply on {shape}' if shape else ''}", loc="left")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def bandwidth(axis: Any, rows: list[Row]) -> None:
    """Draw the share of copy bandwidth of the elementwise operations as bars."""
    rows = [r for r in rows if r["operation"] in ELEMENTWISE]
    rows.sort(key=lambda r: ELEMENTWISE.index(r["operation"]))
    cases = list(dict.fromkeys((r["operation"], r["model"], r["shard"]) for r in rows))
    words = [operation.strip("_").split("_") for operation, _, _ in cases]
    labels = [
        "\n".join([*w, f"{model}{'' if shard == 1 else f' 1/{shard}'}"])
        for w, (_, model, shard) in zip(words, cases, strict=True)
    ]
    cells = {
        (cases.index((r["operation"], r["model"], r["shard"])), r["variant"]): r["fraction_of_copy"]
        for r in rows
    }
    bars(axis, labels, cells)
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set_ylabel("effective bandwidth / copy")
    axis.set_title(
        "Elementwise operations: least bytes of the operation by time, as a share of copy bandwidth",
        loc="left",
    )


def bars(axis: Any, labels: list[str], cells: dict[tuple[int, str], float]) -> None:
    """Draw groups of bars, one colour a variant; where a variant is missing there is no gap."""
    order = list(dict.fromkeys(name for _, name in cells))
    for place in range(len(labels)):
        here = [name for name in order if (place, name) in cells]
        for k, name in enumerate(here):
            width = 0.8 / len(here)
            axis.bar(
                place - 0.4 + width * (k + 0.5),
                cells[place, name],
                width * 0.92,
                color=COLORS.get(name, GREY),
            )
    handles = [Patch(color=COLORS.get(name, GREY), label=name) for name in order]
    wide = len(labels) * max(len(line) for label in labels for line in label.split("\n"))
    axis.set_xticks(range(len(labels)), labels, fontsize=7.5, rotation=90 if wide > 135 else 0)
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def crossover(axis: Any, rows: list[Row]) -> None:
    """Draw how much faster the fused low-rank apply is than the products, by rank."""
    times: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for r in rows:
        if r["operation"] == "low_rank_apply_":
            key = (r["precision"], r["model"], r["shard"], r["shape"])
            times.setdefault(key, {}).setdefault(r["rank"], {})[r["variant"]] = r["device_ms"]["median"]
    lines = {}
    for key, sweep in times.items():
        ranks = [rank for rank in sorted(sweep) if {"triton", "products"} <= sweep[rank].keys()]
        if ranks:
            lines[key] = ranks, [sweep[rank]["products"] / sweep[rank]["triton"] for rank in ranks]
    whole = [key for key in lines if key[2] == 1]
    models = list(dict.fromkeys(key[1] for key in whole))
    dashes = ["-", "--", ":", "-."]
    shapes = {model: list(dict.fromkeys(key[3] for key in whole if key[1] == model)) for model in models}
    palette = {"tf32": ["#2f6db3", "#6fa3dc"], "highest": ["#e0762a", "#f2b37f"]}
    for key in whole:
        precision, model, _, shape = key
        color = palette[precision][models.index(model) % 2]
        style = dashes[shapes[model].index(shape) % len(dashes)]
        axis.plot(
            *lines[key], linestyle=style, color=color, marker=".", label=f"{precision}, {model}, {shape}"
        )
    axis.axhline(1, color=GREY, linewidth=1)
    try:
        from curvadion_kernels.triton_ops import FUSED_RANK_TF32

        axis.axvline(
            FUSED_RANK_TF32,
            color=GREY,
            linestyle="--",
            linewidth=1,
            label=f"FUSED_RANK_TF32 = {FUSED_RANK_TF32}",
        )
    except ImportError:
        pass
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("rank r")
    axis.set_ylabel("time of products / of the kernel")
    axis.set_title(
        "low_rank_apply_: the fused kernel against two products per matrix (above 1 it is faster), whole "
        "models",
        loc="left",
    )
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def steps(axis: Any, rows: list[Row], model: str) -> None:
    """Draw the wall time of steps where there is one, the device time otherwise, with the host's as a line in
    the bar."""
    order = ["local_branch", "local", "peer", "local_dion", "synchronized"]
    rows = sorted(
        (r for r in rows if r["model"] == model and r["operation"] in order),
        key=lambda r: order.index(r["operation"]),
    )
    cases = list(dict.fromkeys((r["operation"], r.get("rank_fraction")) for r in rows))
    labels = [
        operation if fraction is None else f"{operation}\nrank {fraction}" for operation, fraction in cases
    ]
    cells = {
        (cases.index((r["operation"], r.get("rank_fraction"))), r["variant"]): r["device_ms"]["median"]
        for r in rows
    }
    bars(axis, labels, cells)
    axis.set_yscale("log")
    axis.set_ylabel("device ms")
    axis.set_title(f"Steps, {model} model", loc="left")


def draw(rows: list[Row], file: Path) -> None:
    """Draw what there are results for."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    )
    kernels = [r for r in rows if r["benchmark"] == "kernels"]
    step = [r for r in rows if r["benchmark"] == "step"]
    panels: list[tuple[float, Any]] = []
    operations = {r["operation"] for r in kernels}
    whole = [r for r in kernels if r.get("shard") == 1 and r["model"] != "tiny"]
    if "copy" in operations and any(r["operation"] in MODELWISE for r in whole):
        panels.append((4.2, lambda axis: roofline(axis, kernels)))
    if operations & set(ELEMENTWISE):
        panels.append((3.4, lambda axis: bandwidth(axis, kernels)))
    if any(
        r["variant"] == "triton" and r["operation"] == "low_rank_apply_" and r["shard"] == 1 for r in kernels
    ):
        panels.append((3.4, lambda axis: crossover(axis, kernels)))
    for model in dict.fromkeys(r["model"] for r in step if r["model"]):
        panels.append((3.0, lambda axis, m=model: steps(axis, step, m)))
    if not panels:
        raise SystemExit("there is nothing to draw in these results")
    heights = [height for height, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(13, sum(heights) + 0.9),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis, (_, panel) in zip(axes[:, 0], panels, strict=True):
        panel(axis)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.supxlabel(caption(rows), fontsize=8, color=GREY)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="FILE", help="JSON lines of kernels.py or step.py"
    )
    parser.add_argument(
        "--picture", type=Path, help="PNG file to draw; none: the first file's name with .png"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="the table of low_rank_apply_ with all shards; none: whole models only",
    )
    arguments = parser.parse_args()
    rows = read(arguments.results)
    picture = arguments.picture or arguments.results[0].with_suffix(".png")
    kernels = [r for r in rows if r["benchmark"] == "kernels"]
    ceilings = [r for r in kernels if r["operation"] in ("copy", "matmul")]
    show("Ceilings", ceilings, ("operation", "variant"), caption(ceilings))
    elementwise = [r for r in kernels if r["operation"] in ELEMENTWISE]
    elementwise.sort(key=lambda r: (r["model"], r["shard"], ELEMENTWISE.index(r["operation"])))
    show("Elementwise kernels", elementwise, ("model", "shard", "operation", "variant"), caption(kernels))
    low_rank = [
        r for r in kernels if r["operation"] == "low_rank_apply_" and (arguments.all or r["shard"] == 1)
    ]
    show_low_rank(low_rank, caption(kernels))
    symmetric = [r for r in kernels if r["operation"] == "symmetric_product"]
    show("Symmetric products", symmetric, ("shape", "variant"), caption(kernels))
    step = [r for r in rows if r["benchmark"] == "step" and r["operation"] != "copy"]
    show(
        "Steps",
        step,
        ("model", "operation", "rank_fraction", "variant"),
        caption([r for r in rows if r["benchmark"] == "step"]),
    )
    draw(rows, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
