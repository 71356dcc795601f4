"""What a synchronization sends and what a step takes, for a model, a layout and a link, by formulas.

Bytes are those that the optimizer's ledger counts (a test compares them), times are those of a latency and a
bandwidth::

    T_dense     = T_compute + T_x(dense) - min(overlap T_x(dense), T_compute) + T_own(AdamW)
    T_dion      = T_compute + T_gate + T_x(P, R, AdamW gradients) + T_own(Dion)
    T_curvadion = T_compute + T_gate / gate_every + max(0, T_x(payload) - delay T_compute) / interval
                  + T_own(local step) (1 - 1 / interval) + T_own(synchronized step) / interval
    T_x(sent)   = 8 W(sent) / (nics gbit 1e9) + calls (K - 1) rtt
    T_gate      = 8 W(8 bytes per GPU) / (nics gbit 1e9) + ceil(log2 K) rtt
    W(sent)     = bytes that leave one of the K replicas: 2 (K - 1) / K of an all-reduced buffer, \
(K - 1) / K of a broadcast one
    speed-up    = T_dense / T_curvadion

So T_dense is T_compute + (1 - overlap) T_x as long as there is compute to hide behind. Two things overlap
with compute: a dense all-reduce, whose gradients leave while others are still computed, and, with outer_delay
(an even number), the two halves of a synchronization, each with half of the steps of the delay. Everything
else starts when all gradients are there. T_compute is 6 FLOP per parameter and token, unless given. T_x is a
ring's, T_gate that of recursive doubling (Thakur et al., "Optimization of Collective Communication Operations
in MPICH", 2005). T_own is the optimizer's own work on a GPU and inside a replica, see
`curvadion.projection.work`. Not in the formulas: FSDP's traffic, congestion, stragglers, packet loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from curvadion.algebra.sizes import rank_of
from curvadion.allowed import nearest
from curvadion.formats import BLOCK, OUTER_BITS, bits_per_value
from curvadion.projection.nominal import OUTER, WHOLE_PAYLOADS, Model
from curvadion.sharding.ledger import WIRE

FORMULA = "    T_dense" + (__doc__ or "T_dense").split("T_dense", 1)[1].split("\n\n")[0]

# ---- bytes

GATE_BYTES = 8
PAYLOADS = (*WHOLE_PAYLOADS, *(f"{OUTER}{bits}" for bits in OUTER_BITS))


@dataclass(frozen=True)
class Sent:
    """One purpose of a synchronization: buffers of one replica, all its GPUs, and how they travel."""

    bytes: float
    calls: int = 1
    collective: str = "all_reduce"

    def wire(self, replicas: int) -> float:
        """Return the bytes that leave one of the replicas."""
        return self.bytes * WIRE[self.collective](replicas)


def payload(
    model: Model,
    what: str,
    *,
    rank_fraction: float = 0.25,
    rank_multiple_of: int = 1,
    element: int = 4,
    moves_Q: bool = True,
    block: int = BLOCK,
    shards: int = 1,
) -> dict[str, Sent]:
    """Return what a synchronized step sends, by the ledger's purposes, the gate left out.

    Args:
        what: "dense": bf16 gradients.
            "low-rank": P, R and AdamW gradients, and Q, which local Dion steps moved (`consensus="none"`).
            "average": the same, and fp32 parameters and AdamW moments (`consensus="average"`).
            "parameters": fp32 parameters alone.
            "outer-B": pseudo-gradients of `outer_bits=B` (`consensus="outer"`), padding left out.
        element: bytes of an element of P, R and AdamW gradients, 2 for `payload_dtype=torch.bfloat16`.
        moves_Q: whether local Dion steps came before, which move Q.
        block: values that share a scale in "outer-8" and fewer bits.
        shards: ranks over which the rows of matrices are split; each sends with its part of a P one number,
            whether the matrix has a gradient.

    Raises:
        ValueError: `what` is none of PAYLOADS.
    """
    if what not in PAYLOADS:
        raise ValueError(
            f"a payload must be one of {', '.join(PAYLOADS)}; got {what!r}; try "
            f"{nearest(what, PAYLOADS, 'outer-1')!r}"
        )
    if what == "dense":
        return {"gradients": Sent(2 * model.parameters)}
    if what == "parameters":
        return {"parameters": Sent(4 * model.parameters)}
    if what.startswith(OUTER):
        bits = bits_per_value(int(what.removeprefix(OUTER)), block)
        return {"pseudo_gradients": Sent(model.parameters * bits / 8)}
    ranks = [rank_of(min(shape), rank_fraction, rank_multiple_of) for shape in model.matrices]
    of_P_and_R = sum((m + n) * r for (m, n), r in zip(model.matrices, ranks, strict=True))
    of_Q = sum(min(shape) * r for shape, r in zip(model.matrices, ranks, strict=True))
    sent = {}
    if what == "average":
        sent = {"parameters": Sent(4 * model.parameters), "moments": Sent(2 * 4 * model.scalars)}
    if moves_Q:
        sent["right_factor"] = Sent(4 * of_Q, collective="broadcast")
    flags = sum(shards if m >= n else 1 for m, n in model.matrices)
    sent["factors"] = Sent(element * (of_P_and_R + flags), calls=2)
    sent["gradients"] = Sent(element * model.scalars)
    return sent


def wire_bytes(sent: Mapping[str, Sent], replicas: int) -> float:
    """Return W: the bytes that leave one replica."""
    return sum(s.wire(replicas) for s in sent.values())


# ---- times


def link_seconds(wire: float, gbit: float, trips: float, trip_seconds: float) -> float:
    """Return what a link takes for `wire` bytes that leave over it and for trips that follow one another.

    8 wire / (gbit 1e9) + trips trip_seconds
    """
    return 8 * wire / (gbit * 1e9) + trips * trip_seconds


@dataclass(frozen=True)
class Projection:
    """The formulas of the module's docstring.

    Args:
        compute: T_compute, seconds per step.
        replicas, shards: K, and GPUs in a replica.
        gbit: of a replica, all its NICs together; inf for no limit.
        rtt: round trip between replicas, seconds.
        overlap: fraction of the dense all-reduce that the backward hides, at most all of T_compute.
        own, dense_own: T_own of a gated step, on average, and of a dense one, seconds.

    Raises:
        ValueError: a value is out of its range.
    """

    compute: float
    replicas: int
    shards: int
    gbit: float
    rtt: float
    overlap: float = 0.0
    own: float = 0.0
    dense_own: float = 0.0

    def __post_init__(self) -> None:
        rules = [
            ("compute seconds", self.compute, 0 < self.compute < math.inf, "a finite number > 0", "0.5"),
            ("replicas", self.replicas, self.replicas >= 2, ">= 2, since nothing leaves a single one", "2"),
            ("shards", self.shards, self.shards >= 1, ">= 1, the GPUs of a replica", "8"),
            ("Gbit/s of a replica", self.gbit, self.gbit > 0, "> 0", "10"),
            ("round trip", self.rtt, 0 <= self.rtt < math.inf, "finite and >= 0", "40 ms"),
            ("overlap", self.overlap, 0 <= self.overlap <= 1, "in [0, 1]", "0"),
        ]
        for name, value, fine, rule, hint in rules:
            if not fine:
                raise ValueError(f"{name} must be {rule}; got {value}; try {hint}")

    def transfer(self, sent: Mapping[str, Sent]) -> float:
        """Return T_x in seconds."""
        calls = sum(s.calls for s in sent.values())
        return link_seconds(wire_bytes(sent, self.replicas), self.gbit, calls * (self.replicas - 1), self.rtt)

    @property
    def gate_wire(self) -> float:
        """Bytes that leave a replica for the gate."""
        return Sent(GATE_BYTES * self.shards).wire(self.replicas)

    @property
    def gate(self) -> float:
        """T_gate in seconds."""
        return link_seconds(self.gate_wire, self.gbit, math.ceil(math.log2(self.replicas)), self.rtt)

    def dense(self, sent: Mapping[str, Sent]) -> float:
        """Return T_dense."""
        T_x = self.transfer(sent)
        return self.compute + T_x - min(self.overlap * T_x, self.compute) + self.dense_own

    def gated(
        self, sent: Mapping[str, Sent], interval: float = 1, gate_every: float = 1, delay: float = 0
    ) -> float:
        """Return T_curvadion, or T_dion with interval 1."""
        waiting = max(0.0, self.transfer(sent) - delay * self.compute)
        return self.compute + self.gate / gate_every + waiting / interval + self.own


def break_even(
    at: Projection,
    dense: Mapping[str, Sent],
    sent: Mapping[str, Sent],
    interval: float,
    speedup: float = 1.0,
    gate_every: float = 1,
    delay: float = 0,
) -> float:
    """Return the Gbit/s of a replica below which T_dense >= speedup T_curvadion; 0: none, inf: every link.

    With t = 1 / (1e9 gbit), both are linear in t but for what is hidden: each is the larger of two lines::

        T_dense:      T_compute + a (A t + l) - b,     (a, b) = (1 - overlap, 0) and (1, T_compute)
        T_curvadion:  T_compute + C t + k,             of all of T_x but delay T_compute, and without T_x
    """
    flat, unit = replace(at, gbit=math.inf), replace(at, gbit=1.0)
    dense_latency = flat.transfer(dense)
    A = unit.transfer(dense) - dense_latency
    hidden = delay * at.compute / interval

    def below(C: float, k: float) -> float:
        found = 0.0
        for a, b in ((1 - at.overlap, 0.0), (1.0, at.compute)):
            slope = a * A - speedup * C
            fixed = speedup * (at.compute + at.own + k) - (at.compute + at.dense_own)
            missing = fixed - a * dense_latency + b
            if slope > 0:
                # A rounding error is none.
                found = max(found, slope / missing if missing > 1e-12 * at.compute else math.inf)
        return found

    k, C = flat.gate / gate_every, (unit.gate - flat.gate) / gate_every
    k_sent, C_sent = flat.transfer(sent) / interval, (unit.transfer(sent) - flat.transfer(sent)) / interval
    both = below(C + C_sent, k + k_sent - hidden)
    return min(both, below(C, k)) if delay else both
