"""The command `curvadion project`: prints and draws the formulas of `curvadion.cost`, beside emulated runs where there are some.

    python -m curvadion.project --model 1b3 --replicas 4 --link cross-datacentre-10 --payload outer-4 --interval 30
    python -m curvadion.project --published
    python -m curvadion.project --measured points.jsonl --picture speedup.png

What comes out of a formula is called projected; points of a file keep the label that they have there.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvadion.cost import (
    FORMULA,
    GATE_BYTES,
    LINKS,
    PAYLOADS,
    PUBLISHED_ASSUMPTIONS,
    SIZES,
    VOCABULARY,
    Link,
    Projection,
    Sent,
    break_even,
    decoder,
    payload,
    published,
    wire_bytes,
)

DESCRIPTION = "project bytes, time per step and speed-up of CurvaDion over a link (nothing is measured)"
BANDWIDTHS = [10 ** (k / 20) for k in range(-40, 61)]  # of the picture, Gbit/s

Curves = dict[str, list[tuple[float, float]]]

# ---- beside what was emulated

NUMBERS = ("sites", "delay_ms", "seconds_per_step", "compute_seconds", "ledger_bytes_per_step")
CALLS = {"dense": 1, "dion": 3}  # gradients; P, R and AdamW gradients; of others 1 with consensus="outer", else those of "average"


def read_points(file: Path) -> list[dict[str, Any]]:
    """Return the measured or emulated points of a file of JSON lines.

    Keys: label, setting, sites, mbit (null: unlimited), delay_ms (one way), seconds_per_step, compute_seconds, ledger_bytes_per_step (what
    leaves one site, `Ledger.wire`), interval (steps per synchronization, null or absent: 1), options (consensus and gate_every of
    CurvaDion, as text, may be absent); others are ignored.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        points = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--measured must be a readable file of JSON lines; got {file}: {error}; write one object per line") from None
    if not points:
        raise ValueError(f"--measured must hold at least one point; got none in {file}; write one JSON object per line")
    for number, point in enumerate(points, 1):
        missing = [k for k in ("label", "setting", "mbit", *NUMBERS) if not isinstance(point, dict) or k not in point]
        wrong = [] if missing else [k for k in NUMBERS if not isinstance(point[k], int | float) or point[k] < 0]
        if not missing and point["mbit"] is not None and not (isinstance(point["mbit"], int | float) and point["mbit"] > 0):
            wrong.append("mbit")
        if missing or wrong:
            what = f"lacks {', '.join(missing)}" if missing else f"has no number >= 0 in {', '.join(wrong)}"
            raise ValueError(f"every line must hold label, setting, mbit, {', '.join(NUMBERS)}; line {number} of {file} {what}; add it")
    return points


def project_point(point: Mapping[str, Any], gbit: float | None = None) -> float:
    """Return the seconds per step that the formula gives for a point's compute seconds, bytes and link, or for another bandwidth."""
    if gbit is None:
        gbit = math.inf if point["mbit"] is None else point["mbit"] / 1e3
    interval, gated = point.get("interval") or 1, point["setting"] != "dense"
    at = Projection(point["compute_seconds"], point["sites"], 1, gbit, 2 * point["delay_ms"] / 1e3)
    options = point.get("options", {})
    outer = options.get("consensus") == "outer"
    latency = CALLS.get(point["setting"], 1 if outer else 6) / interval * (at.replicas - 1) * at.rtt
    gate = gated * math.ceil(math.log2(at.replicas)) * at.rtt / int(options.get("gate_every", 1))
    hidden = int(options.get("outer_delay", 0)) * at.compute / interval
    return at.compute + max(0.0, 8 * point["ledger_bytes_per_step"] / (gbit * 1e9) + latency - hidden) + gate


def curves_and_markers(points: Sequence[Mapping[str, Any]]) -> tuple[Curves, Curves]:
    """Return speed-ups over the dense setting of the same sites and delay: projected over bandwidth, and as they were emulated.

    A curve takes compute and bytes from the first point of its setting and of dense, a marker needs both on one link.
    """
    rates = [p["mbit"] / 1e3 for p in points if p["mbit"] is not None] or BANDWIDTHS
    near = [x for x in BANDWIDTHS if min(rates) / 4 <= x <= max(rates) * 4]
    curves: Curves = {}
    markers: Curves = {}
    for p in points:
        like = [d for d in points if d["setting"] == "dense" and (d["sites"], d["delay_ms"]) == (p["sites"], p["delay_ms"])]
        if p["setting"] == "dense" or not like:
            continue
        every = f" every {p['interval']}" if p.get("interval") else ""
        name = f"{p['setting']}{every}, {p['sites']} sites, {2 * p['delay_ms']:g} ms"
        curves.setdefault(name, [(x, project_point(like[0], x) / project_point(p, x)) for x in near])
        for d in like:
            if (d["mbit"], d["label"]) == (p["mbit"], p["label"]) and p["mbit"] is not None:
                markers.setdefault(f"{p['label']}: {name}", []).append((p["mbit"] / 1e3, d["seconds_per_step"] / p["seconds_per_step"]))
    if not curves:
        raise ValueError("--picture must have a dense point with the sites and delay of another setting's; got none; add a dense run")
    return curves, markers


def draw(file: Path, title: str, curves: Curves, markers: Curves) -> None:
    """Draw speed-up against bandwidth: projected curves, and markers (full ones if emulated) in the color of their curve."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--picture must find matplotlib; it is missing; pip install 'curvadion[report]'") from None
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
    for label in dict.fromkeys(name.partition(": ")[0] for name in markers):  # one line each: colors are those of the curves
        axes.scatter([], [], label=label, color="#555555" if label == "emulated" else "white", edgecolors="#555555")
    axes.axhline(1, color="#8a8a8a", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="Gbit/s of a replica, each way", ylabel="speed-up over dense all-reduce", title=title)
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


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `curvadion project`."""
    add = parser.add_argument
    add("--model", choices=SIZES, default="160m", help="Llama-style decoder, untied, vocabulary 50304 (default %(default)s)")
    for name in ("dim", "layers", "ffn", "vocabulary"):
        add(f"--{name}", type=int, help="in place of that of --model")
    add("--replicas", type=int, default=2, help="K, the copies of the model (default %(default)s)")
    add("--shards", type=int, default=8, help="GPUs in a replica (default %(default)s)")
    add("--tokens", type=float, default=524288, help="per replica and step (default %(default)s)")
    add("--flops-per-gpu", type=float, default=4e14, help="effective FLOP/s of a GPU (default %(default)g)")
    add("--compute-seconds", type=float, help="T_compute, in place of --tokens and --flops-per-gpu")
    add("--link", choices=LINKS, default="cross-datacentre", help="nominal bandwidth and round trip (default %(default)s)")
    add("--gbit", type=float, help="of one NIC, each way, in place of the link's")
    add("--rtt-ms", type=float, help="round trip, in place of the link's")
    add("--nics", type=int, help="NICs of a replica: its bandwidth is nics * gbit (default: --shards where each GPU has its own, else 1)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--interval", type=float, default=8, help="steps per synchronized step (default %(default)g)")
    rate.add_argument("--rate", type=float, help="synchronized steps per step, in place of --interval")
    add("--gate-every", type=int, default=8, help="steps from one exchange of the gate to the next (default %(default)s)")
    add("--delay", type=int, default=0, help="outer_delay: steps for which a synchronization is under way (default %(default)s)")
    add("--payload", choices=PAYLOADS, default="outer-1", help="of a synchronized step (default %(default)s)")
    add(
        "--local-update",
        choices=("dion", "gradient", "muon"),
        default="dion",
        help="Dion steps move Q, sent then (default %(default)s)",
    )
    add("--rank-fraction", type=float, default=0.25, help="of P and R (default %(default)s)")
    add("--rank-multiple-of", type=int, default=1, help="rank is rounded up to it (default %(default)s)")
    add("--payload-bytes", type=int, choices=(2, 4), default=4, help="of an element of P, R and AdamW gradients (default %(default)s)")
    add("--block", type=int, default=128, help="elements that share a scale in outer-8 and fewer (default %(default)s)")
    add("--overlap", type=float, default=0.0, help="fraction of the dense all-reduce that the backward hides (default %(default)s)")
    add("--faster", type=float, default=10.0, help="percent, for the break-even link (default %(default)g)")
    add("--published", action="store_true", help="print the published range, the assumptions that give it, and nothing else")
    add("--measured", type=Path, metavar="FILE", help="JSON lines of emulated runs, to set beside the projection of each, and nothing else")
    add("--picture", type=Path, metavar="FILE.png", help="draw speed-up over bandwidth")


def main(args: argparse.Namespace) -> None:
    """Run `curvadion project`."""
    try:
        if args.published:
            print_published()
        elif args.measured:
            points = read_points(args.measured)
            print_points(points)
            if args.picture:
                draw(args.picture, "Curves: projected. Markers: as labelled.", *curves_and_markers(points))
        else:
            print_projection(args)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        raise SystemExit(str(error)) from None


def print_projection(args: argparse.Namespace) -> None:
    """Print bytes, times, break-even links and the table over links, and draw the picture."""

    def require(fine: bool, rule: str, value: object, hint: str) -> None:
        if not fine:
            raise ValueError(f"{rule}; got {value}; try {hint}")

    given_or_not = zip((args.dim, args.layers, args.ffn), SIZES[args.model], strict=True)
    dim, layers, ffn = (preset if given is None else given for given, preset in given_or_not)
    vocabulary = VOCABULARY if args.vocabulary is None else args.vocabulary
    interval = args.interval if args.rate is None else 1 / args.rate if args.rate > 0 else math.nan
    sizes = [dim, layers, ffn, vocabulary]
    require(min(sizes) > 0, "--dim, --layers, --ffn and --vocabulary must be > 0", sizes, "--model 160m")
    require(1 <= interval < math.inf, "--interval must be finite and >= 1, --rate in (0, 1]", args.rate or interval, "--interval 8")
    require(0 < args.rank_fraction <= 1, "--rank-fraction must be in (0, 1]", args.rank_fraction, "0.25")
    require(args.gate_every >= 1, "--gate-every must be >= 1", args.gate_every, "1")
    even = args.delay % 2 == 0
    require(0 <= args.delay <= interval and even, "--delay must be an even number >= 0, at most --interval", args.delay, "0")
    delays = not args.delay or args.payload.startswith("outer")
    require(delays, "--delay is of consensus='outer', payload outer-BITS", f"--payload {args.payload}", "--payload outer-1")
    require(args.rank_multiple_of >= 1, "--rank-multiple-of must be >= 1", args.rank_multiple_of, "1")
    require(args.block >= 1, "--block must be >= 1", args.block, "128")
    require(args.nics is None or args.nics >= 1, "--nics must be >= 1", args.nics, "1, a link that all GPUs of a replica share")
    require(args.shards >= 1, "--shards must be >= 1", args.shards, "8")
    require(args.flops_per_gpu > 0, "--flops-per-gpu must be > 0", args.flops_per_gpu, "4e14")

    K, S, link = args.replicas, args.shards, LINKS[args.link]
    link = replace(link, gbit=link.gbit if args.gbit is None else args.gbit, rtt_ms=link.rtt_ms if args.rtt_ms is None else args.rtt_ms)
    model = decoder(dim, layers, ffn, vocabulary)
    compute, how = args.compute_seconds, "as given"
    if compute is None:
        how = f"6 FLOP x parameters x {args.tokens:,.0f} tokens at {args.flops_per_gpu:g} FLOP/s a GPU"
        compute = 6 * model.parameters * args.tokens / (args.flops_per_gpu * S)

    def over(link: Link) -> Projection:
        return Projection(compute, K, S, link.gbit * (args.nics or link.nics(S)), link.rtt_ms / 1e3, args.overlap)

    at = over(link)
    ranks = {"rank_fraction": args.rank_fraction, "rank_multiple_of": args.rank_multiple_of, "element": args.payload_bytes}
    dense, dion = payload(model, "dense"), payload(model, "low-rank", moves_Q=False, **ranks)
    sent = payload(model, args.payload, moves_Q=args.local_update == "dion", block=args.block, **ranks)
    print(f"projected, not measured: {model.parameters:,} parameters, {len(model.matrices)} matrices; {K} replicas of {S} GPUs;")
    print(f"T_compute {compute:.4g} s, {how};")
    print(f"{args.nics or link.nics(S)} x {link.gbit:g} Gbit/s a replica, round trip {link.rtt_ms:g} ms;")
    print(f"payload {args.payload} on 1 step in {interval:g}, under way for {args.delay}, the gate on 1 in {args.gate_every};")
    print(f"overlap {args.overlap:g}\n\n{FORMULA}\n")

    gate = {"gate": Sent(GATE_BYTES * S)}
    columns = {"dense, each step": dense, "Dion, each step": gate | dion, "CurvaDion, synchronized step": gate | sent}
    purposes = dict.fromkeys(p for column in columns.values() for p in column)
    rows = [[p, *(f"{c[p].bytes:,.0f}" if p in c else "" for c in columns.values())] for p in purposes]
    wires = [wire_bytes(c, K) for c in columns.values()]
    means = [*wires[:2], wire_bytes(gate, K) / args.gate_every + wire_bytes(sent, K) / interval]
    rows.append(["leave a replica", *(f"{w:,.0f}" for w in wires)])
    rows.append(["... per step, mean", *(f"{w:,.0f}" for w in means)])
    rows.append(["... of dense", *(f"{w / wires[0]:.2%}" for w in means)])
    print_table("projected: bytes of one replica's buffers, by purpose", ["", *columns], rows)

    T = {"dense": at.dense(dense), "Dion, each step": at.gated(dion), "CurvaDion": at.gated(sent, interval, args.gate_every, args.delay)}
    rows = [[name, f"{t:.4g}", f"{t - compute:.4g}", f"{T['dense'] / t:.2f}x"] for name, t in T.items()]
    print_table("projected: seconds per step on this link", ["", "T_step", "of it waiting", "speed-up over dense"], rows)

    print(f"projected: break-even at a round trip of {link.rtt_ms:g} ms, in Gbit/s of a replica")
    for percent in sorted({0.0, args.faster, 100.0}):
        gbit = break_even(at, dense, sent, interval, 1 + percent / 100, args.gate_every, args.delay)
        where = {0.0: "on no link", math.inf: "on every link"}.get(gbit, f"below {gbit:.4g} Gbit/s")
        print(f"  CurvaDion is {f'{percent:g} % ' if percent else ''}faster than dense {where}")
    print()

    rows = []
    for name, preset in LINKS.items():
        here = over(preset)
        times = [here.dense(dense), here.gated(dion), here.gated(sent, interval, args.gate_every, args.delay)]
        what = [name, f"{args.nics or preset.nics(S)} x {preset.gbit:g}", f"{preset.rtt_ms:g}"]
        rows.append([*what, *(f"{t:.4g}" for t in times), *(f"{times[0] / t:.2f}x" for t in times[1:])])
    header = ["link", "Gbit/s", "rtt ms", "T_dense", "T_dion", "T_curvadion", "speed-up Dion", "CurvaDion"]
    print_table("projected: seconds per step and speed-up over dense, on nominal links", header, rows)

    if args.picture:
        curves: Curves = {"Dion, each step": [], f"CurvaDion, {args.payload}, 1 step in {interval:g}": []}
        for here in (replace(at, gbit=x) for x in BANDWIDTHS):
            both = here.gated(dion), here.gated(sent, interval, args.gate_every, args.delay)
            for curve, t in zip(curves.values(), both, strict=True):
                curve.append((here.gbit, here.dense(dense) / t))
        title = f"Projected: {model.parameters / 1e6:.0f}M parameters, {K} replicas, T_compute {compute:.3g} s, rtt {link.rtt_ms:g} ms"
        draw(args.picture, title, curves, {})


def print_published() -> None:
    """Print the published range, the assumptions, and the table that they give."""
    print(f"{PUBLISHED_ASSUMPTIONS}\n\n{FORMULA}\n")
    header = ["link", "Gbit/s", "rtt ms", "T_dense", 'speed-up "published"', '"average"', '"one bit"']
    rows = [
        [name, f"{LINKS[name].gbit:g}", f"{LINKS[name].rtt_ms:g}", f"{T:.4g}", *(f"{speedup:.2f}x" for speedup in speedups)]
        for name, (T, *speedups) in published().items()
    ]
    print_table("projected: speed-up of CurvaDion over dense all-reduce", header, rows)


def print_points(points: Sequence[Mapping[str, Any]]) -> None:
    """Print the seconds per step of each point beside those that the formula gives for its compute, bytes and link."""
    header = ["setting", "interval", "sites", "Mbit/s", "rtt ms", "label", "s/step", "projected s/step", "projected / it - 1"]
    rows = []
    for p in points:
        T, seen = project_point(p), p["seconds_per_step"]
        rate = "no limit" if p["mbit"] is None else f"{p['mbit']:g}"
        what = [p["setting"], f"{p.get('interval') or 1:g}", str(p["sites"]), rate, f"{2 * p['delay_ms']:g}", p["label"]]
        rows.append([*what, f"{seen:.4g}", f"{T:.4g}", f"{T / seen - 1:+.1%}"])
    print_table("beside the projection from each line's own compute seconds, ledger bytes and link", header, rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in plain text, the first column to the left, and an empty line."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        cells = [f"{cell:<{w}}" if not i else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  " + "  ".join(cells).rstrip())
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m curvadion.project", description=DESCRIPTION)
    add_arguments(parser)
    main(parser.parse_args())
