"""What a training run shows and writes while it goes on: a live line, and a JSON line for each step.

Bytes are those that the optimizer's ledger counted on training steps, summed over the ranks of one replica.
Evaluations and checkpoints, which bring the replicas together for a moment, are not in them.
"""

import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column
except ImportError as error:  # now, not after the last step
    raise SystemExit(
        f"results are shown with {error.name}, which is missing: pip install 'curvadion[report]'"
    ) from None

from curvadion.report.files import replace_file
from curvadion.report.runs import saved

PLAIN_LINES = 20  # printed in a run whose output is no terminal


def hardware(device: torch.device, tree: Path) -> dict[str, str]:
    """Say what a result is measured with; the commit is that of the checkout which the folder `tree` is
    in."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {os.cpu_count()} cores"
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def _step_of(line: str) -> float:
    """Return the step that a line of steps.jsonl is of; infinity for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _held_out(file: Path) -> list[list[float]]:
    """Return the held-out losses in a summary; none of one that is damaged."""
    try:
        points = json.loads(file.read_text())["held_out"]
        return [[step, loss] for step, loss in points]
    except (ValueError, KeyError, TypeError):
        return []


class Display:
    """Show and write a run while it goes on; on one rank only."""

    def __init__(self, folder: Path, *, steps: int, tau: float, start: int, summary: dict[str, Any]):
        self.folder, self.steps, self.tau, self.summary = folder, steps, tau, summary
        self.sent = self.dense = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if start and (folder / "summary.json").exists():
            summary["held_out"] = [p for p in _held_out(folder / "summary.json") if p[0] < start]
        steps_file = folder / "steps.jsonl"
        if start and steps_file.exists():  # without the steps that are taken again, and a line cut short
            kept = [line for line in steps_file.read_text().splitlines() if _step_of(line) <= start]
            replace_file(steps_file, "".join(line + "\n" for line in kept))
        self.file = steps_file.open("a" if start else "w")
        self.console = Console(soft_wrap=True, highlight=False, markup=False)  # names may have brackets
        bar = (BarColumn(bar_width=12),) if self.console.width >= 120 else ()
        line = TextColumn(
            "{task.fields[line]}", markup=False, table_column=Column(no_wrap=False)
        )  # two lines where one is too narrow
        columns = (MofNCompleteColumn(), *bar, line, TimeRemainingColumn(compact=True))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=start, line="")
        self.console.print(
            f"{summary['parameters']:,} parameters; {summary['replicas']} replicas x {summary['shards']} "
            f"shards on {summary['hardware']['device']}; text: {summary['text']}; files: {folder}"
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
        rmmc: dict[str, float] | None = None,
        drift: float | None = None,
    ) -> None:
        """Write a step's line, and show it; `rmmc`, of every matrix, is given on some steps only, `drift` on
        synchronized ones."""
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "tokens": tokens,
            "seconds": seconds,
            "rmmc_matrix": matrix,
        }
        record |= finite(metrics)
        if rmmc:
            record["rmmc"] = finite(rmmc)
        if drift is not None:
            record["drift"] = drift
        print(json.dumps(record), file=self.file, flush=True)
        self.sent += record["curvadion/wire/replicate"]
        self.dense += record["curvadion/dense_bf16_wire"]
        line = live_line(record, self.tau, saved(self.sent, self.dense))
        self.tau = record["curvadion/tau"] or self.tau  # of the next step, if it is steered
        self.progress.update(self.task, completed=step, line=line)
        if not self.console.is_terminal and (
            step % max(1, self.steps // PLAIN_LINES) == 0 or step == self.steps
        ):
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {line}", flush=True)

    def held_out(self, step: int, loss: float) -> None:
        """Note and show a held-out loss, and write the summary so far."""
        self.summary["held_out"].append([step, loss])
        replace_file(self.folder / "summary.json", json.dumps(self.summary, indent=2) + "\n")
        self.console.print(f"step {step:>{len(str(self.steps))}}/{self.steps}  held-out loss {loss:.4f}")

    def close(self) -> None:
        self.progress.stop()
        self.file.close()


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Return the values with None for those that JSON has no word for."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def live_line(record: dict[str, Any], tau: float, traffic: str) -> str:
    rmmc = record["curvadion/rmmc_max"]
    limit = f"/{tau:g}" if math.isfinite(tau) else ""  # without a gate there is none
    return (
        f"loss {record['loss']:.3f}  {record['tokens'] / record['seconds'] / 1000:.1f}k tokens/s  "
        f"RMMC {'  -  ' if rmmc is None else f'{rmmc:.3f}'}{limit} "
        f"{'sync ' if record['curvadion/synchronized'] else 'local'}  {record['curvadion/sync_rate']:4.0%} "
        f"synchronized  bytes {traffic}"
    )
