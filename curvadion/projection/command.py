"""The command `curvadion project`: prints and draws the formulas, beside emulated runs where there are some.

    curvadion project --model 1b3 --replicas 4 --link cross-datacentre-10 --payload outer-4 --interval 30
    curvadion project --published
    curvadion project --measured points.jsonl --picture speedup.png

What comes out of a formula is called projected; points of a file keep the label that they have there.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curvadion.algebra.iteration import Iteration
from curvadion.allowed import nearest
from curvadion.projection.formulas import (
    FORMULA,
    GATE_BYTES,
    Projection,
    Sent,
    break_even,
    payload,
    wire_bytes,
)
from curvadion.projection.nominal import KNOWN_RULES, LINKS, MOVES_Q, SIZES, Link, Model
from curvadion.projection.points import curves_and_markers, print_points, read_points
from curvadion.projection.published import PUBLISHED_ASSUMPTIONS, published
from curvadion.projection.rates import RATES, Rates
from curvadion.projection.replicas import print_common_factors
from curvadion.projection.show import BANDWIDTHS, draw, print_table
from curvadion.projection.work import (
    Settings,
    Work,
    busiest,
    dense_step,
    local_step,
    synchronized_step,
)

# ---- the command


def run(args: argparse.Namespace) -> None:
    """Run `curvadion project`."""
    try:
        if args.published:
            print_published()
        elif args.measured:
            points = read_points(args.measured)
            print_points(points)
            if args.picture:
                title = "Curves: projected. Markers: as labelled."
                draw(args.picture, title, *curves_and_markers(points))
        else:
            print_projection(Case.of(args), args.faster, args.picture)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        raise SystemExit(str(error)) from None


# ---- one case


@dataclass(frozen=True)
class Case:
    """What the options describe: a model, how it is trained, and over which link.

    Attributes:
        args: the options.
        model: its shapes.
        compute, how: T_compute in seconds, and where it is from.
        link: the one that was asked for.
        interval: steps per synchronized step.
        gate_every: steps per exchange of the gate.
        dense, dion, sent: what a dense step, a Dion step and a synchronized step of CurvaDion send.
        rates: of the optimizer's own work.
        work: that of the busiest GPU in each kind of step.
    """

    args: argparse.Namespace
    model: Model
    compute: float
    how: str
    link: Link
    interval: float
    gate_every: float
    dense: dict[str, Sent]
    dion: dict[str, Sent]
    sent: dict[str, Sent]
    rates: Rates
    work: dict[str, Work]

    @staticmethod
    def of(args: argparse.Namespace) -> "Case":
        """Return what the options describe.

        Raises:
            ValueError: an option is out of its range, or two contradict each other.
        """
        size = replace(SIZES[args.model], **given(args, "dim", "layers", "ffn", "vocabulary"))
        interval = args.interval if args.rate is None else 1 / args.rate if args.rate > 0 else math.nan
        check(args, [size.dim, size.layers, size.ffn, size.vocabulary], interval)
        model = size.model
        compute, how = args.compute_seconds, "as given"
        if compute is None:
            how = f"6 FLOP x parameters x {args.tokens:,.0f} tokens at {args.flops_per_gpu:g} FLOP/s a GPU"
            compute = 6 * model.parameters * args.tokens / (args.flops_per_gpu * args.shards)
        moves_Q = args.local_update in MOVES_Q
        low_rank = {
            "rank_fraction": args.rank_fraction,
            "rank_multiple_of": args.rank_multiple_of,
            "element": args.payload_bytes,
        }
        rates = rates_of(args)
        return Case(
            args,
            model,
            compute,
            how,
            replace(LINKS[args.link], **given(args, "gbit", "rtt_ms")),
            interval,
            interval if args.gate_every is None else args.gate_every,
            dense=payload(model, "dense"),
            dion=payload(model, "low-rank", moves_Q=False, **low_rank),
            sent=payload(model, args.payload, moves_Q=moves_Q, **given(args, "block"), **low_rank),
            rates=rates,
            work=work_of(args, model, rates),
        )

    def nics_of(self, link: Link) -> int:
        """Return how many NICs a replica has for a link."""
        return self.args.nics or link.nics(self.args.shards)

    def on(self, link: Link) -> Projection:
        """Return the formulas for a link."""
        args, gbit = self.args, link.gbit * self.nics_of(link)
        own = sum(self.own.values())
        dense_own = sum(self.seconds(self.work[DENSE]).values())
        rtt = link.rtt_ms / 1e3
        return Projection(self.compute, args.replicas, args.shards, gbit, rtt, args.overlap, own, dense_own)

    def seconds(self, work: Work) -> dict[str, float]:
        """Return how long the parts of the optimizer's own work take."""
        return work.seconds(self.rates, self.args.shards, self.args.gpus_per_node)

    @property
    def own(self) -> dict[str, float]:
        """The seconds of CurvaDion's own work by part, on average over steps."""
        local, synchronized = self.seconds(self.work[LOCAL_STEP]), self.seconds(self.work[SYNCHRONIZED])
        rare = 1 / self.interval
        return {part: (1 - rare) * local[part] + rare * synchronized[part] for part in local}

    def times(self, at: Projection) -> tuple[float, float, float]:
        """Return T_dense, T_dion and T_curvadion."""
        T_curvadion = at.gated(self.sent, self.interval, self.gate_every, self.args.delay)
        dion = replace(at, own=sum(self.seconds(self.work[DION]).values()))
        return at.dense(self.dense), dion.gated(self.dion), T_curvadion


# The kinds of steps in tables.
DENSE, DION, LOCAL_STEP, SYNCHRONIZED = (
    "AdamW, dense step",
    "Dion, each step",
    "CurvaDion, local step",
    "CurvaDion, synchronized step",
)


def rates_of(args: argparse.Namespace) -> Rates:
    """Return the rates of the hardware, with those in their place that were given."""
    given_rates = {
        name.removesuffix("_per_second"): value
        for name, value in vars(args).items()
        if name.endswith("_per_second") and value is not None
    }
    return replace(RATES[args.hardware], **given_rates)


def work_of(args: argparse.Namespace, model: Model, rates: Rates) -> dict[str, Work]:
    """Return the optimizer's own work on the busiest GPU, by kind of step."""
    settings = Settings(
        args.shards,
        Iteration(steps=args.newton_schulz_steps, dtype=args.newton_schulz_dtype),
        args.symmetric_share,
        args.owners,
        rank_fraction=args.rank_fraction,
        rank_multiple_of=args.rank_multiple_of,
        device=rates.device,
    )
    kinds = {
        DION: synchronized_step(model, "low-rank", args.local_update, settings),
        LOCAL_STEP: local_step(model, args.local_update, settings),
        SYNCHRONIZED: synchronized_step(model, args.payload, args.local_update, settings),
    }
    most = {name: busiest(works, rates, args.gpus_per_node) for name, works in kinds.items()}
    return {DENSE: dense_step(model, settings)} | most


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def check(args: argparse.Namespace, sizes: Sequence[int], interval: float) -> None:
    """Raise ValueError for the first option that is out of its range; `Projection` checks its own."""
    even = args.delay % 2 == 0
    delays = not args.delay or args.payload.startswith("outer")
    one = "1, a link that all GPUs of a replica share"
    rules: list[tuple[bool, str, object, str]] = [
        (min(sizes) > 0, "--dim, --layers, --ffn and --vocabulary must be > 0", sizes, "--model 160m"),
        (
            1 <= interval < math.inf,
            "--interval must be finite and >= 1, --rate in (0, 1]",
            args.rate or interval,
            "--interval 8",
        ),
        (0 < args.rank_fraction <= 1, "--rank-fraction must be in (0, 1]", args.rank_fraction, "0.25"),
        (args.gate_every is None or args.gate_every >= 1, "--gate-every must be >= 1", args.gate_every, "1"),
        (
            0 <= args.delay <= interval and even,
            "--delay must be an even number >= 0, at most --interval",
            args.delay,
            "0",
        ),
        (
            delays,
            "--delay is of consensus='outer', payload outer-BITS",
            f"--payload {args.payload}",
            "--payload outer-1",
        ),
        (
            args.local_update in KNOWN_RULES,
            f"--local-update must be one of {', '.join(KNOWN_RULES)}, whose work is known",
            args.local_update,
            nearest(args.local_update, KNOWN_RULES, "muon"),
        ),
        (args.rank_multiple_of >= 1, "--rank-multiple-of must be >= 1", args.rank_multiple_of, "1"),
        (args.block is None or args.block >= 1, "--block must be >= 1", args.block, "128"),
        (0 < args.symmetric_share <= 1, "--symmetric-share must be in (0, 1]", args.symmetric_share, "1"),
        (
            args.replica_gbit is None or args.replica_gbit > 0,
            "--replica-gbit must be > 0",
            args.replica_gbit,
            "400",
        ),
        (args.gpus_per_node >= 1, "--gpus-per-node must be >= 1", args.gpus_per_node, "8"),
        (args.newton_schulz_steps >= 1, "--newton-schulz-steps must be >= 1", args.newton_schulz_steps, "5"),
        *(
            (value > 0, f"--{name.replace('_', '-')} must be > 0", value, "5e13")
            for name, value in vars(args).items()
            if name.endswith("_per_second") and value is not None
        ),
        (args.nics is None or args.nics >= 1, "--nics must be >= 1", args.nics, one),
        (args.shards >= 1, "--shards must be >= 1", args.shards, "8"),
        (args.flops_per_gpu > 0, "--flops-per-gpu must be > 0", args.flops_per_gpu, "4e14"),
    ]
    for fine, rule, value, hint in rules:
        if not fine:
            raise ValueError(f"{rule}; got {value}; try {hint}")


def print_projection(case: Case, faster: float, picture: Path | None) -> None:
    """Print bytes, times, break-even links and the table over links, and draw the picture."""
    at = case.on(case.link)
    print_case(case)
    print_bytes(case)
    print_work(case)
    print_seconds(case, at)
    print_break_even(case, at, faster)
    print_links(case)
    if picture:
        draw_case(picture, case, at)


def print_case(case: Case) -> None:
    """Print what is projected, and the formulas."""
    print(
        f"projected, not measured: {case.model.parameters:,} parameters, "
        f"{len(case.model.matrices)} matrices; "
        f"{case.args.replicas} replicas of {case.args.shards} GPUs;"
    )
    print(f"T_compute {case.compute:.4g} s, {case.how};")
    nics, link = case.nics_of(case.link), case.link
    print(f"{nics} x {link.gbit:g} Gbit/s a replica, round trip {link.rtt_ms:g} ms;")
    print(
        f"payload {case.args.payload} on 1 step in {case.interval:g}, under way for {case.args.delay}, "
        f"the gate on 1 in {case.gate_every:g};"
    )
    print(f"overlap {case.args.overlap:g}\n\n{FORMULA}\n")


def print_bytes(case: Case) -> None:
    """Print the bytes of a step, by purpose, and those that leave a replica."""
    gate = {"gate": Sent(GATE_BYTES * case.args.shards)}
    columns = {
        "dense, each step": case.dense,
        "Dion, each step": gate | case.dion,
        "CurvaDion, synchronized step": gate | case.sent,
    }
    purposes = dict.fromkeys(p for column in columns.values() for p in column)
    rows = [[p, *(f"{c[p].bytes:,.0f}" if p in c else "" for c in columns.values())] for p in purposes]
    wires = [wire_bytes(column, case.args.replicas) for column in columns.values()]
    gates, syncs = wire_bytes(gate, case.args.replicas), wire_bytes(case.sent, case.args.replicas)
    means = [*wires[:2], gates / case.gate_every + syncs / case.interval]
    rows.append(["leave a replica", *(f"{w:,.0f}" for w in wires)])
    rows.append(["... per step, mean", *(f"{w:,.0f}" for w in means)])
    rows.append(["... of dense", *(f"{w / wires[0]:.2%}" for w in means)])
    print_table("projected: bytes of one replica's buffers, by purpose", ["", *columns], rows)


def print_work(case: Case) -> None:
    """Print what the optimizer's own steps take of the busiest GPU."""
    rows = []
    for name, work in case.work.items():
        parts = case.seconds(work)
        whole = sum(parts.values())
        flops = sum(work.arithmetic.values()) + work.cholesky
        counts = [f"{flops / 1e9:,.1f}", f"{work.sent / 1e6:,.1f}", f"{work.transient / 1e6:,.0f}"]
        times = [f"{1e3 * t:.2f}" for t in (*parts.values(), whole)]
        rows.append([name, *counts, *times, f"{whole / case.compute:.1%}"])
    header = ["", "GFLOP", "MB sent", "MB transient", *(f"{part}, ms" for part in case.own), "sum, ms"]
    title = f"projected: the optimizer's own work on the busiest GPU of a replica ({case.args.hardware})"
    print_table(title, [*header, "of T_compute"], rows)
    owned, count = case.work[LOCAL_STEP].owned, len(case.model.matrices)
    print(f"  {owned} of {count} matrices have an owner in a local step; sent: inside a replica\n")
    if case.args.replica_gbit is not None:
        print_common_factors(case.model, case.args)


def print_seconds(case: Case, at: Projection) -> None:
    """Print the seconds of a step on the link that was asked for, and what most of it is."""
    T = dict(zip(("dense", "Dion, each step", "CurvaDion"), case.times(at), strict=True))
    rows = [[name, f"{t:.4g}", f"{t - case.compute:.4g}", f"{T['dense'] / t:.2f}x"] for name, t in T.items()]
    header = ["", "T_step", "beside compute", "speed-up over dense"]
    print_table("projected: seconds per step on this link", header, rows)
    parts = {"forward and backward": case.compute} | {f"own {part}": t for part, t in case.own.items()}
    parts["the link"] = T["CurvaDion"] - sum(parts.values())
    shares = sorted(((t / T["CurvaDion"], part) for part, t in parts.items()), reverse=True)
    print("  of CurvaDion's step: " + ", ".join(f"{part} {share:.1%}" for share, part in shares) + "\n")


def print_break_even(case: Case, at: Projection, faster: float) -> None:
    """Print below which bandwidths CurvaDion is faster than dense, also by `faster` and by 100 percent."""
    args, rtt = case.args, f"a round trip of {case.link.rtt_ms:g} ms"
    print(f"projected: break-even at {rtt}, in Gbit/s of a replica")
    for percent in sorted({0.0, faster, 100.0}):
        speedup = 1 + percent / 100
        gbit = break_even(at, case.dense, case.sent, case.interval, speedup, case.gate_every, args.delay)
        where = {0.0: "on no link", math.inf: "on every link"}.get(gbit, f"below {gbit:.4g} Gbit/s")
        print(f"  CurvaDion is {f'{percent:g} % ' if percent else ''}faster than dense {where}")
    print()


def print_links(case: Case) -> None:
    """Print the seconds of a step on all nominal links."""
    rows = []
    for name, link in LINKS.items():
        T = case.times(case.on(link))
        what = [name, f"{case.nics_of(link)} x {link.gbit:g}", f"{link.rtt_ms:g}"]
        rows.append([*what, *(f"{t:.4g}" for t in T), *(f"{T[0] / t:.2f}x" for t in T[1:])])
    header = ["link", "Gbit/s", "rtt ms", "T_dense", "T_dion", "T_curvadion", "speed-up Dion", "CurvaDion"]
    print_table("projected: seconds per step and speed-up over dense, on nominal links", header, rows)


def draw_case(file: Path, case: Case, at: Projection) -> None:
    """Draw the speed-ups over bandwidth, at the round trip of the link that was asked for."""
    dion: list[tuple[float, float]] = []
    curvadion: list[tuple[float, float]] = []
    for gbit in BANDWIDTHS:
        T_dense, T_dion, T_curvadion = case.times(replace(at, gbit=gbit))
        dion.append((gbit, T_dense / T_dion))
        curvadion.append((gbit, T_dense / T_curvadion))
    name = f"CurvaDion, {case.args.payload}, 1 step in {case.interval:g}"
    model = f"{case.model.parameters / 1e6:.0f}M parameters, {case.args.replicas} replicas"
    title = f"Projected: {model}, T_compute {case.compute:.3g} s, rtt {case.link.rtt_ms:g} ms"
    draw(file, title, {"Dion, each step": dion, name: curvadion}, {})


def print_published() -> None:
    """Print the published range, the assumptions, and the table that they give."""
    print(f"{PUBLISHED_ASSUMPTIONS}\n\n{FORMULA}\n")
    header = ["link", "Gbit/s", "rtt ms", "T_dense", 'speed-up "published"', '"average"', '"one bit"']
    rows = []
    for name, (T, *speedups) in published().items():
        link = LINKS[name]
        what = [name, f"{link.gbit:g}", f"{link.rtt_ms:g}", f"{T:.4g}"]
        rows.append([*what, *(f"{speedup:.2f}x" for speedup in speedups)])
    print_table("projected: speed-up of CurvaDion over dense all-reduce", header, rows)
