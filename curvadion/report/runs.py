"""Read a training run's files: steps.jsonl, a line for each step, and summary.json."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvadion.sharding.ledger import words_of

Record = dict[str, Any]


@dataclass
class Table:
    """A table for the terminal and for the page: `head` and every row start with the row's name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def number(value: float | None) -> float:
    """Return a value from a file; what is missing there is NaN here, and a gap in a picture."""
    return math.nan if value is None else float(value)


def read_lines(file: Path) -> list[Record]:
    """Return the objects of a file of JSON lines; a last line that is still being written is left out."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise SystemExit(
            f"{file} must be a file of JSON lines, and cannot be read ({reason}); check the path"
        ) from None
    records = []
    lines = text.splitlines()
    for position, line in enumerate(lines, 1):
        try:
            record = json.loads(line or "{}")
            if not isinstance(record, dict):
                raise ValueError(f"got {line[:30]}")
        except ValueError as error:
            if position == len(lines) and not text.endswith("\n"):
                break
            raise SystemExit(
                f"{file}, line {position}, must be a JSON object: {error}; delete the line, or write the "
                "file anew"
            ) from None
        if record:
            records.append(record)
    return records


def require(records: Sequence[Record], keys: Iterable[str], file: Path, hint: str) -> None:
    """End with a sentence where a record lacks a key."""
    for position, record in enumerate(records, 1):
        missing = [key for key in keys if key not in record]
        if missing:
            raise SystemExit(
                f"{file}, record {position}, must have {', '.join(missing)}, and does not; {hint}"
            )


class Run:
    """A run's files, read back."""

    def __init__(self, folder: Path):
        hint = "give the --out folder of scripts/train.py, or a .jsonl file of a study"
        try:
            self.summary = json.loads((folder / "summary.json").read_text())
        except FileNotFoundError:
            raise SystemExit(
                f"{folder} must be the folder of a training run, and has no summary.json; {hint}"
            ) from None
        except ValueError as error:
            raise SystemExit(f"{folder / 'summary.json'} must hold a JSON object: {error}; {hint}") from None
        require(
            [self.summary],
            ("arguments", "hardware", "held_out", "parameters", "replicas", "shards"),
            folder / "summary.json",
            hint,
        )
        lines = read_lines(folder / "steps.jsonl")
        if not lines:
            raise SystemExit(
                f"{folder / 'steps.jsonl'} must have a line for each step, and has none; wait for the run's "
                "first step"
            )
        require(lines, ("step", "loss", "tokens", "seconds"), folder / "steps.jsonl", hint)
        # By step, because a resumed run repeats the steps since its checkpoint.
        self.steps = [record for _, record in sorted({record["step"]: record for record in lines}.items())]
        self.arguments = self.summary["arguments"]
        self.tau = float(self.arguments["tau"])
        local = f"CurvaDion, local steps: {self.arguments['local_update']}"
        self.folder = folder
        self.name = {"dion": "Dion, every step", "adamw": "AdamW, every step"}.get(
            self.arguments["optimizer"], local
        )

    @property
    def has_wire(self) -> bool:
        """Say whether the run counted what leaves a rank, rather than only the buffers that it hands to
        collectives."""
        return "curvadion/wire/replicate" in self.steps[0]

    @property
    def gated(self) -> bool:
        return any(record.get("curvadion/rmmc_max") is not None for record in self.steps)

    @property
    def taus(self) -> list[float]:
        """The threshold that each step was decided with: a step's line has what came out of it, if it is
        steered."""
        after = [self.tau if math.isnan(tau) else tau for tau in self.column("curvadion/tau")]
        return [self.tau, *after[:-1]]

    def column(self, key: str) -> list[float]:
        return [number(record.get(key)) for record in self.steps]

    def sums(self, key: str) -> list[float]:
        """Return a column added up from the first step on; a gap adds nothing."""
        total, sums = 0.0, []
        for value in self.column(key):
            total += 0 if math.isnan(value) else value
            sums.append(total)
        return sums

    def total(self, key: str) -> float:
        return self.sums(f"curvadion/{key}")[-1]

    def cells(self, wire: bool) -> dict[str, str]:
        """Return the run's column of the table, from row label to text."""
        (_, before), (_, after) = self.summary["held_out"][0], self.summary["held_out"][-1]
        tokens, seconds = self.sums("tokens")[-1], self.sums("seconds")[-1]
        sent, dense = (self.total(key) for key in sent_keys(wire))
        return {
            "processes": f"{self.summary['replicas']} x {self.summary['shards']}",
            "parameters": f"{self.summary['parameters']:,}",
            "seed": f"{self.arguments.get('seed', 'unknown')}",
            "held-out loss before": f"{number(before):.4f}",
            "held-out loss after": f"{number(after):.4f}",
            "training tokens": f"{tokens:,.0f}",
            "training time, s": f"{seconds:,.0f}",
            "tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
            "synchronized steps": f"{self.total('synchronized'):.0f} of {len(self.steps)}",
            "sent between replicas": readable(sent),
            "dense bf16 gradients": readable(dense),
            "against dense": saved(sent, dense),
        }

    def purposes(self) -> dict[str, float]:
        """Return the buffers that went to the other replicas, in bytes, by what they were for."""
        keys = [key for key in self.steps[-1] if key.startswith("curvadion/bytes/replicate/")]
        return {key.rpartition("/")[2]: self.sums(key)[-1] for key in keys}


def sent_keys(wire: bool) -> tuple[str, str]:
    """Return the metrics of what a step sent between replicas and of its dense baseline, on the wire or as
    buffers."""
    return ("wire/replicate", "dense_bf16_wire") if wire else ("bytes/replicate", "dense_bf16_bytes")


def sent_words(wire: bool) -> str:
    return "leaving one replica" if wire else "in one replica's buffers"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, and make their names differ."""
    runs = [Run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name += f" ({run.folder.resolve().name})"
    return runs


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """Return what the runs came to, and their bytes by purpose; a column for each run."""
    wire = all(run.has_wire for run in runs)
    caption = (
        f"Held-out loss in nats a byte, of the replicas' average; bytes {sent_words(wire)}, on training "
        f"steps. {run_provenance(runs)}"
    )
    head = ["", *(run.name for run in runs)]
    cells = [run.cells(wire) for run in runs]
    tables = [
        Table("Runs", head, [[label, *(column[label] for column in cells)] for label in cells[0]], caption)
    ]
    purposes = [run.purposes() for run in runs]
    kept = [
        key
        for key in dict.fromkeys(key for column in purposes for key in column)
        if any(column.get(key) for column in purposes)
    ]
    if kept:
        rows = [[words_of(key), *(readable(column.get(key, 0)) for column in purposes)] for key in kept]
        rows.append(["all", *(readable(sum(column.values())) for column in purposes)])
        caption = (
            "Buffers that the ranks of one replica handed to collectives between replicas, by purpose. What "
            "leaves a replica for them is more or less: 2 (K - 1) / K times a buffer that K replicas reduce, "
            f"(K - 1) / K times one of which each gets a part. {run_provenance(runs)}"
        )
        tables.append(Table("Bytes by purpose", head, rows, caption))
    return tables


def run_provenance(runs: Sequence[Run]) -> str:
    return provenance("measured", [{**run.summary, "seed": run.arguments.get("seed")} for run in runs])


def provenance(label: str, records: Sequence[Record]) -> str:
    """Say how results came about: label, seeds, hardware, versions, commit and date, each as often as it
    differs."""
    seeds = distinct(record.get("seed") for record in records)
    hardware = [record.get("hardware") or {} for record in records]
    words = [label.capitalize()]
    if seeds:
        words.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    for key in dict.fromkeys(key for entry in hardware for key in entry):
        values = distinct(entry.get(key) for entry in hardware)
        shown = " / ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else "")
        words.append(shown if key == "device" else f"{key} {shown}")
    dates = sorted(date[:10] for date in distinct(record.get("date") for record in records))
    if dates:
        words.append(dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")
    return "; ".join(words) + "."


def distinct(values: Iterable[Any]) -> list[str]:
    """Return what values there are, as text: numbers by size, then the rest."""
    known = {value if isinstance(value, int | float) else str(value) for value in values if value is not None}
    return [str(value) for value in sorted(known, key=lambda value: (isinstance(value, str), value))]


def readable(count: float) -> str:
    """Write a number of bytes, in decimal units."""
    unit, size = next(
        (u, n) for u, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= n or n == 1
    )
    return f"{count / size:,.1f} {unit}" if size > 1 else f"{count:.0f} B"


def saved(sent: float, dense: float) -> str:
    """Compare with the baseline, in words; a single replica sends nothing and has none."""
    if not sent or not dense:
        return "none"
    return f"{100 * (1 - sent / dense):.1f}% fewer" if sent < dense else f"{sent / dense:.2f} x dense"
