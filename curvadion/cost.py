"""What a synchronization sends and what a step takes, for a model, a layout and a link: formulas, nothing here is measured.

Bytes are those that the optimizer's ledger counts (a test compares them), times are those of a latency and a bandwidth::

    T_dense     = T_compute + T_x(dense) - min(overlap T_x(dense), T_compute)
    T_dion      = T_compute + T_gate + T_x(P, R, AdamW gradients)
    T_curvadion = T_compute + T_gate / gate_every + max(0, T_x(payload) - delay T_compute) / interval
    T_x(sent)   = 8 W(sent) / (nics gbit 1e9) + calls (K - 1) rtt
    T_gate      = 8 W(8 bytes per GPU) / (nics gbit 1e9) + ceil(log2 K) rtt
    W(sent)     = bytes that leave one of the K replicas: 2 (K - 1) / K of an all-reduced buffer, (K - 1) / K of a broadcast one
    speed-up    = T_dense / T_curvadion

So T_dense is T_compute + (1 - overlap) T_x as long as there is compute to hide behind. Only the dense all-reduce overlaps: gradients leave
while others are still computed, an optimizer starts when all are there; and with outer_delay, an even number, each half of a
synchronization with half of the steps. T_compute is 6 FLOP per parameter and token, unless given. T_x is a ring's, T_gate recursive
doubling's (Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005). Not in the formula: the optimizer's own
work, congestion, stragglers, packet loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from curvadion.collectives import WIRE
from curvadion.dion import rank_of

FORMULA = "    T_dense" + (__doc__ or "T_dense").split("T_dense", 1)[1].split("\n\n")[0]
SIZES = {"160m": (768, 12, 2048), "350m": (1024, 20, 2816), "720m": (1536, 20, 4096), "1b3": (2048, 22, 5632)}  # dim, layers, ffn
VOCABULARY = 50304
GATE_BYTES = 8
BITS = (32, 16, 8, 4, 2, 1)
PAYLOADS = ("average", "low-rank", "parameters", "dense", *(f"outer-{bits}" for bits in BITS))


@dataclass(frozen=True)
class Model:
    """Shapes of the matrices that Dion updates, and the number of parameters of everything else (AdamW)."""

    matrices: tuple[tuple[int, int], ...]
    scalars: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(m * n for m, n in self.matrices) + self.scalars


def decoder(dim: int, layers: int, ffn: int, vocabulary: int = VOCABULARY) -> Model:
    """Return a Llama-style decoder: untied embeddings, four attention and three SwiGLU matrices a layer, RMSNorm, no biases."""
    layer = ((dim, dim),) * 4 + ((ffn, dim),) * 2 + ((dim, ffn),)
    return Model(layer * layers, 2 * vocabulary * dim + (2 * layers + 1) * dim)


@dataclass(frozen=True)
class Sent:
    """One purpose of a synchronization: bytes of the buffers of one replica (all its GPUs), and how they travel."""

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
    block: int = 128,
) -> dict[str, Sent]:
    """Return what a synchronized step sends, by the ledger's purposes, the gate left out.

    Args:
        what: "dense": bf16 gradients. "low-rank": P, R and AdamW gradients, and Q, which local Dion steps moved (`consensus="none"`).
            "average": that, and fp32 parameters and AdamW moments (`consensus="average"`). "parameters": fp32 parameters alone.
            "outer-B": pseudo-gradients of B bits (`consensus="outer"`), of 8 and fewer with a bf16 scale for each block: B + 16 / block,
            padding left out.
        element: bytes of an element of P, R and AdamW gradients, 2 for `payload_dtype=torch.bfloat16`.
        moves_Q: whether local Dion steps came before, which move Q.

    Raises:
        ValueError: `what` is none of PAYLOADS.
    """
    if what not in PAYLOADS:
        raise ValueError(f"a payload must be one of {', '.join(PAYLOADS)}; got {what!r}; try 'average', the optimizer's default consensus")
    if what == "dense":
        return {"gradients": Sent(2 * model.parameters)}
    if what == "parameters":
        return {"parameters": Sent(4 * model.parameters)}
    if what.startswith("outer-"):
        bits = int(what.removeprefix("outer-"))
        return {"pseudo_gradients": Sent(model.parameters * (bits + (16 / block if bits <= 8 else 0)) / 8)}
    ranks = [rank_of(min(shape), rank_fraction, rank_multiple_of) for shape in model.matrices]
    sent = {}
    if what == "average":
        sent = {"parameters": Sent(4 * model.parameters), "moments": Sent(2 * 4 * model.scalars)}
    if moves_Q:
        sent["right_factor"] = Sent(4 * sum(min(s) * r for s, r in zip(model.matrices, ranks, strict=True)), collective="broadcast")
    sent["factors"] = Sent(element * sum(sum(s) * r for s, r in zip(model.matrices, ranks, strict=True)), calls=2)
    sent["gradients"] = Sent(element * model.scalars)
    return sent


@dataclass(frozen=True)
class Link:
    """A nominal link: Gbit/s each way of one NIC, round trip in ms, and whether every GPU has a NIC of its own or a replica shares one."""

    gbit: float
    rtt_ms: float
    per_gpu: bool = False

    def nics(self, shards: int) -> int:
        """Return how many of them a replica of that many GPUs has."""
        return shards if self.per_gpu else 1


LINKS = {
    "infiniband-per-gpu": Link(400, 0.005, per_gpu=True),
    "infiniband": Link(400, 0.005),
    "ethernet-100": Link(100, 0.05),
    "ethernet-25": Link(25, 0.1),
    "ethernet-10": Link(10, 0.1),
    "metro": Link(10, 2),
    "cross-datacentre-10": Link(10, 40),
    "cross-datacentre-2": Link(2, 40),
    "cross-datacentre": Link(1, 40),
    "internet": Link(0.1, 100),
}


@dataclass(frozen=True)
class Projection:
    """The formula of the module's docstring.

    Args:
        compute: T_compute, seconds per step.
        replicas, shards: K, and GPUs in a replica.
        gbit: of a replica, all its NICs together; inf for no limit.
        rtt: round trip between replicas, seconds.
        overlap: fraction of the dense all-reduce that the backward hides, at most all of T_compute.

    Raises:
        ValueError: a value is out of its range.
    """

    compute: float
    replicas: int
    shards: int
    gbit: float
    rtt: float
    overlap: float = 0.0

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
        return 8 * wire_bytes(sent, self.replicas) / (self.gbit * 1e9) + calls * (self.replicas - 1) * self.rtt

    @property
    def gate(self) -> float:
        """T_gate in seconds."""
        bits = 8 * Sent(GATE_BYTES * self.shards).wire(self.replicas)
        return bits / (self.gbit * 1e9) + math.ceil(math.log2(self.replicas)) * self.rtt

    def dense(self, sent: Mapping[str, Sent]) -> float:
        """Return T_dense."""
        T_x = self.transfer(sent)
        return self.compute + T_x - min(self.overlap * T_x, self.compute)

    def gated(self, sent: Mapping[str, Sent], interval: float = 1, gate_every: float = 1, delay: float = 0) -> float:
        """Return T_curvadion, or T_dion with interval 1."""
        return self.compute + self.gate / gate_every + max(0.0, self.transfer(sent) - delay * self.compute) / interval


def wire_bytes(sent: Mapping[str, Sent], replicas: int) -> float:
    """Return W: the bytes that leave one replica."""
    return sum(s.wire(replicas) for s in sent.values())


def break_even(
    at: Projection,
    dense: Mapping[str, Sent],
    sent: Mapping[str, Sent],
    interval: float,
    speedup: float = 1.0,
    gate_every: float = 1,
    delay: float = 0,
) -> float:
    """Return the Gbit/s of a replica below which T_dense >= speedup T_curvadion; 0 for none, inf for every link.

    With t = 1 / (1e9 gbit), both times are linear in t but for what is hidden, which makes each of them the larger of two lines::

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
            slope, missing = a * A - speedup * C, speedup * (at.compute + k) - at.compute - a * dense_latency + b
            if slope > 0:
                found = max(found, slope / missing if missing > 1e-12 * at.compute else math.inf)  # a rounding error is none
        return found

    k, C = flat.gate / gate_every, (unit.gate - flat.gate) / gate_every
    k_sent, C_sent = flat.transfer(sent) / interval, (unit.transfer(sent) - flat.transfer(sent)) / interval
    both = below(C + C_sent, k + k_sent - hidden)
    return min(both, below(C, k)) if delay else both


# ---- what is published

PUBLISHED_ASSUMPTIONS = """\
The range of 1.02x on fast InfiniBand to 4.36x across datacentres is that of the CurvaDion paper (arXiv:2512.13728). The links and times
behind it were not at hand: the assumptions below are OURS, inferred to match it, and others would match as well.
  model        160M, 162,220,800 parameters, the size of the authors' public runs
  compute      0.329 s, the step time in their public log of 160M on 8 GPUs, 1,048,576 tokens a step (github.com/Bhavkumar21/CurvaDion)
  layout       2 replicas of 8 GPUs that share one link, whose bandwidth and round trip stand in the table
  baseline     bf16 gradients all-reduced on every step, nothing overlapped
  "published"  the same gradients on 1 step in 100 (99 % of the steps are local), and the gate's round trip on all
  "average"    what this library sends on 1 step in 100 (consensus="average", local Dion steps, rank fraction 1/8): five times as much
  "one bit"    the recommended settings: one bit per parameter, and the gate, on 1 step in 8 (consensus="outer")"""
PUBLISHED_RANGE = (1.02, 4.36)
PUBLISHED_LINKS = ("infiniband", "ethernet-100", "ethernet-25", "ethernet-10", "cross-datacentre-2")
PUBLISHED_INTERVAL = 100


def published() -> dict[str, tuple[float, float, float, float]]:
    """Return T_dense and the speed-ups "published", "average" and "one bit" by link, under PUBLISHED_ASSUMPTIONS."""
    model = decoder(*SIZES["160m"])
    dense, average, one_bit = payload(model, "dense"), payload(model, "average", rank_fraction=1 / 8), payload(model, "outer-1")
    found = {}
    for name in PUBLISHED_LINKS:
        at = Projection(0.329, 2, 8, LINKS[name].gbit, LINKS[name].rtt_ms / 1e3)
        T_dense = at.dense(dense)
        speedups = [T_dense / at.gated(sent, PUBLISHED_INTERVAL) for sent in (dense, average)]
        found[name] = (T_dense, speedups[0], speedups[1], T_dense / at.gated(one_bit, 8, gate_every=8))
    return found
