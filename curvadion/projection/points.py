"""Measured and emulated runs, as points of a file of JSON lines, and what the formulas give for each."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvadion.projection.formulas import Projection, Sent, payload
from curvadion.projection.nominal import Model
from curvadion.projection.show import BANDWIDTHS, Curves, print_table
from curvadion.sharding.ledger import WIRE

NUMBERS = ("sites", "delay_ms", "seconds_per_step", "compute_seconds", "ledger_bytes_per_step")
ANY = Model((), 0)  # calls depend on no size
# What a synchronized step sends, for its calls: with settings that always synchronize, else by consensus.
EVERY_STEP = {"dense": payload(ANY, "dense"), "dion": payload(ANY, "low-rank", moves_Q=False)}
OF_CONSENSUS = {
    "average": payload(ANY, "average"),
    "none": payload(ANY, "low-rank"),
    "outer": payload(ANY, "outer-1"),
}


def read_points(file: Path) -> list[dict[str, Any]]:
    """Return the measured or emulated points of a file of JSON lines.

    Keys: label, setting, sites, mbit (null: unlimited), delay_ms (one way), seconds_per_step,
    compute_seconds, ledger_bytes_per_step (what leaves one site, `Ledger.wire`), interval (steps per
    synchronization, null or absent: 1), options (consensus, gate_every and outer_delay of CurvaDion, as text,
    may be absent); others are ignored.

    Raises:
        ValueError: the file cannot be read, or a line lacks something.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        points = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        rule = "--measured must be a readable file of JSON lines"
        raise ValueError(f"{rule}; got {file}: {error}; write one object per line") from None
    if not points:
        rule = "--measured must hold at least one point"
        raise ValueError(f"{rule}; got none in {file}; write one JSON object per line")
    for number, point in enumerate(points, 1):
        what = wrong_with(point)
        if what:
            rule = f"every line must hold label, setting, mbit, {', '.join(NUMBERS)}"
            raise ValueError(f"{rule}; line {number} of {file} {what}; add it")
    return points


def wrong_with(point: Any) -> str:
    """Return what a line of a file of points lacks, in words; "" if nothing."""
    wanted = ("label", "setting", "mbit", *NUMBERS)
    missing = [key for key in wanted if not isinstance(point, dict) or key not in point]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [key for key in NUMBERS if not isinstance(point[key], int | float) or point[key] < 0]
    if point["mbit"] is not None and not (isinstance(point["mbit"], int | float) and point["mbit"] > 0):
        wrong.append("mbit")
    return f"has no number >= 0 in {', '.join(wrong)}" if wrong else ""


def project_point(point: Mapping[str, Any], gbit: float | None = None) -> float:
    """Return what the formulas give for a point's compute seconds, bytes and link, in seconds per step.

    Args:
        gbit: in place of the point's bandwidth.
    """
    if gbit is None:
        gbit = math.inf if point["mbit"] is None else point["mbit"] / 1e3
    at = Projection(point["compute_seconds"], point["sites"], 1, gbit, 2 * point["delay_ms"] / 1e3)
    options = point.get("options", {})
    consensus = OF_CONSENSUS.get(options.get("consensus", "average"), OF_CONSENSUS["average"])
    calls = sum(s.calls for s in EVERY_STEP.get(point["setting"], consensus).values())
    interval, wire = point.get("interval") or 1, point["ledger_bytes_per_step"]

    def counted(wire: float) -> dict[str, Sent]:
        """Buffers of which so many bytes leave a replica in each step."""
        return {"counted": Sent(max(0.0, wire) * interval / WIRE["all_reduce"](at.replicas), calls)}

    if point["setting"] == "dense":
        return at.dense(counted(wire))
    gate_every = int(options.get("gate_every", 1))
    without_gate = counted(wire - at.gate_wire / gate_every)
    return at.gated(without_gate, interval, gate_every, int(options.get("outer_delay", 0)))


def print_points(points: Sequence[Mapping[str, Any]]) -> None:
    """Print the seconds per step of each point beside what the formulas give for its own values."""
    header = ["setting", "interval", "sites", "Mbit/s", "rtt ms", "label", "s/step"]
    header += ["projected s/step", "projected / it - 1"]
    rows = []
    for p in points:
        T, seen = project_point(p), p["seconds_per_step"]
        rate = "no limit" if p["mbit"] is None else f"{p['mbit']:g}"
        what = [p["setting"], f"{p.get('interval') or 1:g}", str(p["sites"]), rate, f"{2 * p['delay_ms']:g}"]
        rows.append([*what, p["label"], f"{seen:.4g}", f"{T:.4g}", f"{T / seen - 1:+.1%}"])
    print_table(
        "beside the projection from each line's own compute seconds, ledger bytes and link", header, rows
    )


def curves_and_markers(points: Sequence[Mapping[str, Any]]) -> tuple[Curves, Curves]:
    """Return speed-ups over dense with the same sites and delay: projected over bandwidth, and as emulated.

    A curve takes compute and bytes from the first point of its setting and of dense. A marker needs both on
    one link.

    Raises:
        ValueError: there is no dense point to compare with.
    """
    rates = [p["mbit"] / 1e3 for p in points if p["mbit"] is not None] or BANDWIDTHS
    near = [x for x in BANDWIDTHS if min(rates) / 4 <= x <= max(rates) * 4]
    all_dense = [p for p in points if p["setting"] == "dense"]
    curves: Curves = {}
    markers: Curves = {}
    for p in points:
        like = [d for d in all_dense if (d["sites"], d["delay_ms"]) == (p["sites"], p["delay_ms"])]
        if p["setting"] == "dense" or not like:
            continue
        every = f" every {p['interval']}" if p.get("interval") else ""
        name = f"{p['setting']}{every}, {p['sites']} sites, {2 * p['delay_ms']:g} ms"
        curves.setdefault(name, [(x, project_point(like[0], x) / project_point(p, x)) for x in near])
        for d in like:
            if (d["mbit"], d["label"]) == (p["mbit"], p["label"]) and p["mbit"] is not None:
                speedup = d["seconds_per_step"] / p["seconds_per_step"]
                markers.setdefault(f"{p['label']}: {name}", []).append((p["mbit"] / 1e3, speedup))
    if not curves:
        rule = "--picture must have a dense point with the sites and delay of another setting's"
        raise ValueError(f"{rule}; got none; add a dense run")
    return curves, markers
