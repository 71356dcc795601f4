"""What the optimizer's own steps take of a GPU, by formulas: products, memory, and traffic inside a replica.

Parameters are sharded by rows over the S GPUs of a replica, as FSDP2 does, and the busiest GPU counts. For
matrices m x n of elements w bytes on the way (m the longer side, m_s rows on this GPU, "wide" where the rows
are the shorter side)::

    Muon, owners      FLOPs  of the matrices it owns: rounds (4 m n^2 + 2 n^3) each
                      sent   w times its part of others' matrices, and the others' part of its own
    Muon, together    FLOPs  rounds (4 m_s n^2 + 2 n^3); wide: rounds (4 m n^2 + 2 n^3)
                      sent   2 (S-1)/S (rounds 4 n^2 + 8); wide: 2 (S-1)/S 4 m n
    Dion of rank r    FLOPs  8 m n r / S; in float32 and in float64 p r^2 to 2 p r^2 (a triangle of the Gram
                             matrix) and p r^2 (triangular solve), and r^3 (Cholesky) for p rows of P: with
                             owners m of those it owns, together m_s; wide: m
                      sent   2 (S-1)/S 4 n r; wide: 2 (S-1)/S 4 (m + 1) r; to owners and back as Muon's, of P,
                             which they have already where it is wide; together 2 (S-1)/S 12 r^2
    host              a time for each matrix, where nothing runs ahead: on CPUs
    memory            bytes read and written: 24 of an element of a matrix, 28 of one that is AdamW's (or of
                      all, in a dense step), and what is packed, unpacked and rescaled for owners

    seconds = FLOPs / rate + sent / rate + bytes / rate + host

One after the other, but for what owners send: of that only the first bucket's waits for nobody, the others
travel behind products. FLOPs and bytes are those that FLOP counter and ledger count (a test compares them),
but for Cholesky and triangular solves, which are not counted there. Rates are assumptions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from curvadion.algebra.newton_schulz import Iteration
from curvadion.algebra.power_iteration import rank_of
from curvadion.projection.formulas import Model
from curvadion.rules import left_factor
from curvadion.rules.orthonormal import RATES as CHOICE
from curvadion.rules.orthonormal import cost_alone, cost_together, owner_pays
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.owners import BUCKET_ELEMENTS, Spread, assign
from curvadion.sharding.region import Region

# Copies of what a GPU orthonormalizes at once, at the peak: what came, the iterate, the next one, what goes.
# Measured, 5.3 to 5.5, by benchmarks/sharded.py in both dtypes, by owners and together.
COPIES = 5.5
# Bytes read and written for an element of pseudo-gradient, beside the local step: X_0, X, the mean and new
# values; and by the codec, in plain torch.
OUTER_BYTES, CODEC_BYTES = 40.0, 93.0


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
        bfloat16, float32, float64: FLOPs of products and triangular solves.
        cholesky: FLOPs of Cholesky factors.
        memory: bytes read and written.
        inside: bytes that leave it for others in its machine, and in an all-reduce, which crosses machines
            over all their network cards at once.
        across: bytes that leave it in an all-to-all of more GPUs than a machine has.
        host: seconds that a matrix keeps the host, where the device waits for it.
        device: whose choice between owners and all together is meant.
    """

    bfloat16: float
    float32: float
    float64: float
    memory: float
    inside: float
    across: float
    cholesky: float
    host: float = 0.0
    device: str = "cuda"


# H100 SXM: half of its dense peak in bfloat16, three quarters of its memory's, NVLink, 400 Gbit/s of network
# for each GPU. A core of a Xeon with AMX, gloo on one machine: by `benchmarks/sharded.py --only ceilings`.
RATES = {
    "h100": Rates(5e14, 5e13, 4e13, 2.5e12, 3.7e11, 5e10, cholesky=5e12),
    "cpu": Rates(3.3e11, 1.15e11, 6e10, 1e10, 1.6e9, 1.6e9, cholesky=1e10, host=1e-4, device="cpu"),
}


@dataclass(frozen=True)
class Work:
    """What a step takes of one GPU.

    Attributes:
        flops: by dtype.
        memory: bytes read and written.
        all_reduce, all_to_all: bytes that leave it inside the replica.
        buckets: in which matrices travel to owners.
        solved: FLOPs of triangular solves, which FLOP counters leave out, by dtype.
        cholesky: FLOPs of Cholesky factors, which they leave out too.
        matrices: how many there are.
        transient: bytes that are allocated in between, an estimate.
        owned: how many matrices of the replica have an owner.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    memory: float = 0.0
    all_reduce: float = 0.0
    all_to_all: float = 0.0
    buckets: int = 0
    solved: Mapping[str, float] = field(default_factory=dict)
    cholesky: float = 0.0
    matrices: int = 0
    transient: float = 0.0
    owned: int = 0

    def __add__(self, other: "Work") -> "Work":
        names = ("memory", "all_reduce", "all_to_all", "buckets", "cholesky", "matrices", "owned")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        sums |= {name: _added(getattr(self, name), getattr(other, name)) for name in ("flops", "solved")}
        return Work(**sums, transient=max(self.transient, other.transient))

    @property
    def arithmetic(self) -> Mapping[str, float]:
        """FLOPs of products and triangular solves, by dtype."""
        return _added(self.flops, self.solved)

    @property
    def sent(self) -> float:
        """Bytes that leave this GPU inside the replica."""
        return self.all_reduce + self.all_to_all

    def seconds(self, rates: Rates, shards: int, gpus_per_node: int) -> dict[str, float]:
        """Return how long its parts take."""
        flops = self.arithmetic
        products = sum(flops.get(d, 0.0) / getattr(rates, d) for d in ("bfloat16", "float32"))
        crossing = self.all_to_all / (rates.inside if shards <= gpus_per_node else rates.across)
        behind = (1 - 1 / self.buckets) * min(crossing, products) if self.buckets else 0.0
        return {
            "products": products,
            "float64": flops.get("float64", 0.0) / rates.float64 + self.cholesky / rates.cholesky,
            "memory": self.memory / rates.memory + self.matrices * rates.host,
            "shard traffic": self.all_reduce / rates.inside + crossing - behind,
        }


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {*one, *other}}


@dataclass(frozen=True)
class Settings:
    """What a local step depends on, beside the shapes; as the optimizer's options of the same names.

    Attributes:
        shards: S.
        triangle: how long a symmetric product takes, of which one triangle is enough, relative to a full one.
        device: "cuda" or "cpu", for the choice between owners and all together.
    """

    shards: int
    how: Iteration = field(default_factory=lambda: Iteration(dtype=torch.bfloat16))
    triangle: float = 1.0
    owners: str = "auto"
    owner_dtype: torch.dtype | None = None
    rank_fraction: float = 0.25
    rank_multiple_of: int = 1
    device: str = "cuda"


def rows_of(rows: int, shards: int) -> list[int]:
    """Return how many rows each rank has, as FSDP2 deals them out."""
    chunk = math.ceil(rows / shards)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(shards)]


def spread_of(shape: tuple[int, int], flops: float, shards: int) -> Spread:
    """Return how a matrix lies over ranks that split its rows."""
    chunk = math.ceil(shape[0] / shards)
    regions = [
        Region((min(rank * chunk, shape[0]), 0), (rows, shape[1]))
        for rank, rows in enumerate(rows_of(shape[0], shards))
    ]
    return Spread(shape, tuple(regions), (0,) if shards > 1 else (), flops)


def rounds_of(s: Settings, rows: float, n: float) -> float:
    """Return the FLOPs of all rounds on `rows` rows of matrices, in full products' time."""
    return s.how.steps * (s.triangle * (2 * rows * n**2 + 2 * n**3) + 2 * rows * n**2)


def counts_of(model: Model) -> dict[tuple[int, int], int]:
    """Return how many matrices there are of each shape."""
    counts: dict[tuple[int, int], int] = {}
    for shape in model.matrices:
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def plain(model: Model, s: Settings) -> list[Work]:
    """Return what norms, momenta and parameters take, and AdamW for everything else, on each rank."""
    counts = counts_of(model)
    work = []
    for rank in range(s.shards):
        local = sum(c * rows_of(m, s.shards)[rank] * n for (m, n), c in counts.items())
        memory = 24 * local + 28 * model.scalars / s.shards
        work.append(Work(memory=memory, matrices=len(model.matrices)))
    return work


def muon(model: Model, s: Settings) -> list[Work]:
    """Return what "muon" takes of each rank, norms, momenta and AdamW left out."""
    counts = counts_of(model)
    name = str(s.how.dtype or torch.float32).removeprefix("torch.")
    wire = (s.owner_dtype or s.how.dtype or torch.float32).itemsize
    width = (s.how.dtype or torch.float32).itemsize
    owned, work = dict[tuple[int, int], Spread](), [Work() for _ in range(s.shards)]
    for shape, count in counts.items():
        m, n = max(shape), min(shape)
        spread = spread_of(shape, rounds_of(s, m, n), s.shards)
        wide = shape[0] < shape[1]
        sides = (1, s.shards) if wide else (s.shards, 1)
        alone = cost_alone(spread, wire, s.shards, len(model.matrices))
        pays = owner_pays(alone, cost_together(s.how, m, n, *sides), CHOICE[s.device])
        if s.shards == 1 or s.owners == "always" or (s.owners == "auto" and pays):
            owned[shape] = spread
            continue
        for rank, rows in enumerate(rows_of(shape[0], s.shards)):
            cost = cost_together(s.how, m, n, *sides)
            flops = rounds_of(s, m if wide else rows, n)
            elements = count * (m * n if wide else rows * n)
            work[rank] += Work(
                {name: count * flops},
                memory=elements * (12 + (4 + s.how.steps) * width),
                all_reduce=count * cost.all_reduce,
                transient=0.0,
            )
            kept = work[rank].transient + COPIES * max(4, width) * elements
            work[rank] = replace(work[rank], transient=kept)
    if not owned:
        return work
    shapes = list(owned)
    owners, load = assign(list(owned.values()), [counts[x] for x in shapes], s.shards)
    for rank in range(s.shards):
        mine = sent = local = 0.0
        for shape, spread, whose in zip(shapes, owned.values(), owners, strict=True):
            part, size, own = spread.regions[rank].numel, math.prod(shape), whose.count(rank)
            mine, local = mine + own * size, local + len(whose) * part
            sent += (len(whose) - own) * part + own * (size - part)
        copied = 2 * (4 + wire) * local + 2 * 2 * wire * mine if s.shards > 1 else 0.0
        several = mine > BUCKET_ELEMENTS
        at_once = (
            (COPIES + 2 * several) * max(wire, width) * min(mine, max(BUCKET_ELEMENTS, math.prod(shapes[0])))
        )
        work[rank] += Work(
            {name: load[rank]},
            memory=copied + mine * (12 + (4 + s.how.steps) * width),
            all_to_all=wire * sent,
            buckets=max(1, math.ceil(mine / BUCKET_ELEMENTS)),
            transient=at_once,
            owned=sum(counts[x] for x in shapes),
        )
    return work


def dion(model: Model, s: Settings) -> list[Work]:
    """Return what "dion" takes of each rank, norms, momenta and AdamW left out; a synchronized step with
    consensus="average" too, beside what it sends to other replicas."""
    counts, work = counts_of(model), [Work() for _ in range(s.shards)]
    summed = WIRE["all_reduce"](s.shards)
    owned = dict[tuple[int, int], Spread]()
    for shape, count in counts.items():
        m, n = max(shape), min(shape)
        r, wide = rank_of(n, s.rank_fraction, s.rank_multiple_of), shape[0] < shape[1]
        P = replace(spread_of(shape, left_factor.flops(m, r), s.shards), shape=(m, r))
        P = replace(P, regions=tuple(Region((0, 0), (m if wide else x.shape[0], r)) for x in P.regions))
        parts = 1 if wide else s.shards
        pays = left_factor.owner_pays(P, parts, 4, len(model.matrices), "cholesky_qr", CHOICE[s.device])
        has_owner = s.shards > 1 and (s.owners == "always" or (s.owners == "auto" and pays))
        if has_owner:
            owned[shape] = P
        sent = 4 * (m + 1) * r if wide else 4 * n * r + (0 if has_owner else (8 + 4) * r * r)
        for rank, rows in enumerate(rows_of(shape[0], s.shards)):
            part = rows * shape[1]
            work[rank] += Work(
                {"float32": count * 8 * part * r},
                count * (16 * part + 12 * P.regions[rank].numel),
                summed * count * sent,
            )
            if not has_owner:
                work[rank] = at_once(work[rank], orthogonalized(P.regions[rank].shape[0], r), count)
    if not owned:
        return work
    shapes = list(owned)
    owners, _ = assign(list(owned.values()), [counts[x] for x in shapes], s.shards)
    for rank in range(s.shards):
        for shape, P, whose in zip(shapes, owned.values(), owners, strict=True):
            own, size, part = whose.count(rank), math.prod(P.shape), P.regions[rank].numel
            whole = shape[0] < shape[1]  # each rank has all of P: an owner is sent nothing
            sent = own * sum(x.numel for k, x in enumerate(P.regions) if k != rank)
            sent += 0 if whole else (len(whose) - own) * part
            work[rank] = at_once(work[rank], orthogonalized(*P.shape), own)
            kept = work[rank].transient + 8 * len(whose) * part  # what came and what goes
            work[rank] = replace(work[rank], transient=kept)
            work[rank] += Work(
                all_to_all=4 * sent, memory=16 * (own * size + len(whose) * part), owned=len(whose)
            )
        mine = sum(w.count(rank) * math.prod(P.shape) for P, w in zip(owned.values(), owners, strict=True))
        work[rank] += Work(buckets=max(1, math.ceil(mine / BUCKET_ELEMENTS)))
    return work


def orthogonalized(rows: int, r: int) -> Work:
    """Return what Cholesky QR of so many rows of P takes: two passes, the first in float64."""
    width = max(128, r // 8)  # of block columns of the lower triangle
    gram = sum(2 * rows * (r - j) * min(width, r - j) for j in range(0, r, width))
    return Work(
        {"float32": gram, "float64": gram},
        memory=60 * rows * r,
        solved=dict.fromkeys(("float32", "float64"), rows * r * r),
        cholesky=r**3,
        transient=14 * rows * r + 9 * r * r,
    )


def at_once(work: Work, one: Work, count: int) -> Work:
    """Return work and that of `count` matrices more, all in memory at once."""
    return replace(sum([one] * count, start=work), transient=work.transient + count * one.transient)


def gradient(model: Model, s: Settings) -> list[Work]:
    """Return what "gradient" takes of each rank beside momenta and parameters: nothing."""
    return [Work() for _ in range(s.shards)]


LOCAL: dict[str, Callable[[Model, Settings], list[Work]]] = {
    "gradient": gradient,
    "dion": dion,
    "muon": muon,
    "normuon": muon,  # two sums of norms more
}


def busiest(works: list[Work], rates: Rates, gpus_per_node: int) -> Work:
    """Return the work of the rank that takes longest."""
    return max(works, key=lambda w: sum(w.seconds(rates, len(works), gpus_per_node).values()))


def local_step(model: Model, rule: str, s: Settings) -> list[Work]:
    """Return what a local step takes of each rank.

    Raises:
        ValueError: the rule's work is not known here.
    """
    if rule not in LOCAL:
        raise ValueError(
            f"the work of a local step is known for {', '.join(LOCAL)}; got {rule!r}; try 'muon', which "
            "takes more"
        )
    return [a + b for a, b in zip(plain(model, s), LOCAL[rule](model, s), strict=True)]


def synchronized_step(model: Model, payload: str, rule: str, s: Settings) -> list[Work]:
    """Return what a synchronized step takes of each rank, beside what it sends to other replicas: with
    pseudo-gradients ("outer-B") a local step and those, else one of Dion's."""
    if not payload.startswith("outer"):
        return [a + b for a, b in zip(plain(model, s), dion(model, s), strict=True)]
    coded = CODEC_BYTES if payload not in ("outer-32", "outer-16") else 0.0
    elements = model.parameters / s.shards
    outer = Work(memory=(OUTER_BYTES + coded) * elements)
    return [work + outer for work in local_step(model, rule, s)]


def dense_step(model: Model, s: Settings) -> Work:
    """Return what fused AdamW takes of each rank, the optimizer of a dense step."""
    return Work(memory=28 * model.parameters / s.shards)
