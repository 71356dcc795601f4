"""What a training run shows: a live line, a JSON line for each step, and at the end a table and a picture.

    python scripts/report.py runs/curvadion-dion                    # table and picture again, from the files
    python scripts/report.py runs/curvadion-dion runs/dion          # several runs side by side

Bytes are those that the optimizer's ledger counted on training steps, summed over the ranks of one replica. Evaluations
and checkpoints, which bring the replicas together for a moment, are not in them.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column, Table
except ImportError as error:  # now, not after the last step
    raise SystemExit(f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'") from None

PURPOSES = {
    "gate": "gate",
    "check": "check that ranks agree",
    "factors": "Dion factors of matrices",
    "gradients": "gradients for AdamW",
    "parameters": "parameters, to average",
    "moments": "AdamW moments, to average",
    "right_factor": "right factors, made common",
}
PLAIN_LINES = 20  # printed in a run whose output is no terminal
BLUE, ORANGE, GREY = "#2f6db3", "#e0762a", "#8a8a8a"
COLORS = (BLUE, ORANGE, "#3a9a5b", "#8d5fb0", "#b5475d", "#7a6a53")


def hardware(device: torch.device) -> dict[str, str]:
    """Say what a result is measured with."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


class Display:
    """Show and write a run while it goes on; on one rank only."""

    def __init__(self, folder: Path, *, steps: int, tau: float, start: int, summary: dict[str, Any]):
        self.folder, self.steps, self.tau, self.summary = folder, steps, tau, summary
        folder.mkdir(parents=True, exist_ok=True)
        if start and (folder / "summary.json").exists():
            earlier = json.loads((folder / "summary.json").read_text())["held_out"]
            summary["held_out"] = [point for point in earlier if point[0] < start]
        self.file = (folder / "steps.jsonl").open("a" if start else "w")
        self.console = Console(soft_wrap=True, highlight=False)
        bar = (BarColumn(bar_width=12),) if self.console.width >= 120 else ()
        line = TextColumn("{task.fields[line]}", table_column=Column(no_wrap=False))  # two lines where one is too narrow
        columns = (MofNCompleteColumn(), *bar, line, TimeRemainingColumn(compact=True))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=start, line="")
        self.console.print(
            f"{summary['parameters']:,} parameters; {summary['replicas']} replicas x {summary['shards']} shards on "
            f"{summary['hardware']['device']}; text: {summary['text']}; files: {folder}"
        )
        self.progress.start()

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens: int,
        seconds: float,
        matrix: str | None,
        metrics: dict[str, float],
    ) -> None:
        """Write a step's line, and show it."""
        record = {"step": step, "loss": loss, "lr": lr, "tokens": tokens, "seconds": seconds, "rmmc_matrix": matrix}
        record |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        print(json.dumps(record), file=self.file, flush=True)
        line = live_line(record, self.tau)
        self.progress.update(self.task, completed=step, line=line)
        if not self.console.is_terminal and (step % max(1, self.steps // PLAIN_LINES) == 0 or step == self.steps):
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {line}", flush=True)

    def held_out(self, step: int, loss: float) -> None:
        """Note and show a held-out loss, and write the summary so far."""
        self.summary["held_out"].append([step, loss])
        (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")
        self.console.print(f"step {step:>{len(str(self.steps))}}/{self.steps}  held-out loss {loss:.4f}")

    def close(self) -> None:
        self.progress.stop()
        self.file.close()


def live_line(record: dict[str, Any], tau: float) -> str:
    rmmc = record["curvadion/rmmc_max"]
    sent, dense = record["curvadion/bytes_total/replicate"], record["curvadion/dense_bf16_bytes_total"]
    return (
        f"loss {record['loss']:.3f}  {record['tokens'] / record['seconds'] / 1000:.1f}k tokens/s  "
        f"RMMC {'  -  ' if rmmc is None else f'{rmmc:.3f}'}/{tau:g} {'sync ' if record['curvadion/synchronized'] else 'local'}  "
        f"{record['curvadion/sync_rate']:4.0%} synchronized  bytes {saved(sent, dense)}"
    )


def saved(sent: float, dense: float) -> str:
    """Compare with the baseline, in words; a single replica sends nothing and has none."""
    if not sent or not dense:
        return "none"
    return f"{100 * (1 - sent / dense):.1f}% fewer" if sent < dense else f"{sent / dense:.2f} x dense"


class Run:
    """A run's files, read back."""

    def __init__(self, folder: Path):
        try:
            self.summary = json.loads((folder / "summary.json").read_text())
            lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        except FileNotFoundError as error:
            raise SystemExit(f"{folder} must be the --out folder of a training run, and has no {Path(error.filename).name}") from None
        # By step, because a resumed run repeats the steps since its checkpoint.
        self.steps = [record for _, record in sorted({record["step"]: record for record in lines}.items())]
        self.arguments = self.summary["arguments"]
        self.tau = float(self.arguments["tau"])
        local = f"CurvaDion, local steps: {self.arguments['local_update']}"
        self.folder = folder
        self.name = {"dion": "Dion, every step", "adamw": "AdamW, every step"}.get(self.arguments["optimizer"], local)

    def column(self, key: str) -> list[float]:
        return [math.nan if record[key] is None else record[key] for record in self.steps]

    def total(self, key: str) -> float:
        return sum(record.get(f"curvadion/{key}") or 0 for record in self.steps)

    def cells(self) -> dict[str, str]:
        """Return the table's column, from row label to text."""
        (_, before), (_, after) = self.summary["held_out"][0], self.summary["held_out"][-1]
        tokens, seconds = sum(self.column("tokens")), sum(self.column("seconds"))
        synchronized, sent, dense = map(self.total, ("synchronized", "bytes/replicate", "dense_bf16_bytes"))
        return {
            "held-out loss before": f"{before:.4f}",
            "held-out loss after": f"{after:.4f}",
            "training tokens": f"{tokens:,.0f}",
            "training time, s": f"{seconds:,.0f}",
            "tokens per second": f"{tokens / seconds:,.0f}",
            "synchronized steps": f"{synchronized:.0f} of {len(self.steps)}",
            **{label: readable(self.total(f"bytes/replicate/{key}")) for key, label in PURPOSES.items()},
            "sent between replicas": readable(sent),
            "dense bf16 gradients": readable(dense),
            "against dense": saved(sent, dense),
        }


def readable(count: float) -> str:
    unit, size = next((u, n) for u, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= n or n == 1)
    return f"{count / size:,.1f} {unit}" if size > 1 else f"{count:.0f} B"


def show_table(runs: list[Run]) -> None:
    table = Table(
        title="Held-out loss in nats a byte, of the replicas' average; bytes that one replica sent to the others",
        caption="; ".join(f"{key} {value}" for key, value in runs[0].summary["hardware"].items()),
    )
    table.add_column("")
    columns = [run.cells() for run in runs]
    for run in runs:
        table.add_column(f"{run.name}\n{run.summary['replicas']} x {run.summary['shards']}", justify="right")
    sections = {"held-out loss after", "synchronized steps", list(PURPOSES.values())[-1], "sent between replicas"}
    for label in columns[0]:
        if label in PURPOSES.values() and all(column[label] == "0 B" for column in columns):
            continue
        table.add_row(label, *(column[label] for column in columns))
        if label in sections:
            table.add_section()
    # A table that is cut at 80 columns in a log file is worth nothing.
    Console(highlight=False, width=None if Console().is_terminal else 60 + 30 * len(runs)).print(table)


def draw(runs: list[Run], file: Path) -> None:
    """Draw loss, RMMC with tau and the synchronizations, and the bytes sent so far."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    gated = [run for run in runs if run.arguments["optimizer"] != "adamw"]
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    heights = [2.4, *[1.5] * len(gated), 1.3]
    figure, axes = pyplot.subplots(len(heights), sharex=True, figsize=(10, 1.6 * sum(heights)), height_ratios=heights, layout="constrained")
    loss_axis, *rmmc_axes, bytes_axis = axes

    for run, color in zip(runs, COLORS * len(runs), strict=False):
        steps = run.column("step")
        after = run.summary["held_out"][-1][1]
        loss_axis.plot(steps, run.column("loss"), color=color, alpha=0.25, linewidth=0.8)
        loss_axis.plot(steps, smooth(run.column("loss")), color=color, linewidth=1.6, label=f"{run.name}: {after:.3f} held out")
        loss_axis.plot(*zip(*run.summary["held_out"], strict=True), "o", color=color, markersize=6, markeredgecolor="white")
        sent = [total / 1e6 for total in accumulate(run.column("curvadion/bytes/replicate"))]
        bytes_axis.plot(steps, sent, color=color, linewidth=1.6, label=run.name)
    dense = [total / 1e6 for total in accumulate(runs[0].column("curvadion/dense_bf16_bytes"))]
    bytes_axis.plot(runs[0].column("step"), dense, "--", color=GREY, label="dense bf16 gradients")
    loss_axis.set_ylabel("loss (nats a byte)")
    loss_axis.set_title("Loss: training of one replica (lines), held-out of the replicas' average (points)", loc="left")
    bytes_axis.set_ylabel("MB")
    bytes_axis.set_xlabel("step")
    bytes_axis.set_title("Sent so far by one replica to the others", loc="left")

    for run, axis in zip(gated, rmmc_axes, strict=True):
        synchronized = run.column("curvadion/synchronized")
        points = list(zip(run.column("step"), run.column("curvadion/rmmc_max"), synchronized, strict=True))
        kinds = {
            "local step": ([p for p in points if not p[2]], {"color": BLUE, "marker": ".", "s": 12}),
            "synchronized: RMMC above tau": (
                [p for p in points if p[2] and p[1] > run.tau],
                {"color": ORANGE, "s": 22},
            ),
            "synchronized by rule": (
                [p for p in points if p[2] and not p[1] > run.tau],
                {"facecolors": "none", "edgecolors": ORANGE, "s": 18},
            ),
        }
        for label, (chosen, style) in kinds.items():
            if chosen:
                x, y, _ = zip(*chosen, strict=True)
                axis.scatter(x, y, label=label, **style)
        if math.isfinite(run.tau):
            axis.axhline(run.tau, color=GREY, linestyle="--", label=f"tau = {run.tau:g}")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("RMMC")
        count = f"{run.total('synchronized'):.0f} of {len(run.steps)} steps synchronized"
        axis.set_title(f"Relative momentum change ({run.name}): {count}", loc="left")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high**1.4 / low**0.4)  # room for the legend
        axis.legend(loc="upper right", ncols=4, columnspacing=1.2, handletextpad=0.3)
    loss_axis.legend(loc="upper right")
    bytes_axis.legend(loc="upper left")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def smooth(values: list[float], memory: float = 0.9) -> list[float]:
    """Average exponentially, without a bias to the first value."""
    weights = accumulate([1.0] * len(values), lambda total, _: memory * total + 1)
    return [s / w for s, w in zip(accumulate(values, lambda total, v: memory * total + v), weights, strict=True)]


def write_report(folders: list[Path], picture: Path | None = None) -> None:
    """Print the table of one or several runs and draw their picture, by default into the first one's folder."""
    runs = [Run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name += f" ({run.folder.name})"
    picture = picture or folders[0] / ("report.png" if len(runs) == 1 else "comparison.png")
    show_table(runs)
    draw(runs, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --out folder of a training run")
    parser.add_argument("--picture", type=Path, help="PNG file to draw; none: in the first run's folder")
    arguments = parser.parse_args()
    write_report(arguments.runs, arguments.picture)
