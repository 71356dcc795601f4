"""What the optimizer's own steps take of a GPU, by formulas: products, memory, and traffic inside a replica.

Parameters are sharded by rows over the S GPUs of a replica, as FSDP2 does, and the busiest GPU counts. For
matrices m x n of elements w bytes on the way (m the longer side, m_s rows on this GPU, "wide" where the rows
are the shorter side)::

    Muon, owners      FLOPs  of the matrices it owns: rounds (4 m n^2 + 2 n^3) each
                      sent   w times its part of others' matrices, and the others' part of its own
    Muon, together    FLOPs  rounds (4 m_s n^2 + 2 n^3); wide: rounds (4 m n^2 + 2 n^3)
                      sent   2 (S-1)/S (rounds 4 n^2 + 8); wide: 2 (S-1)/S 4 m n
    Dion of rank r    FLOPs  8 m n r / S; P in float32 and in float64 p r^2 to 2 p r^2 (a triangle of the Gram
                             matrix) and p r^2 (triangular solve), and r^3 (Cholesky) for p rows of P: with
                             owners m of those it owns, together m_s; wide: m
                      sent   2 (S-1)/S 4 n r; wide: 2 (S-1)/S 4 (m + 1) r; to owners and back as Muon's, of P,
                             which they have already where it is wide; together 2 (S-1)/S 12 r^2
    host              a time for each operation and each collective, where nothing runs ahead: on CPUs
    memory            bytes read and written by all operations but products: momenta, parameters and AdamW
                      (24 and 28 an element by the fused kernels, 40 by the reference, which reads 8 more for
                      norms), what is packed, unpacked and rescaled for owners, addends of products, and 65
                      for each element of P and R

    seconds = FLOPs / rate + sent / rate + bytes / rate + operations x a time + collectives x a time

One after the other, but for what owners send: of that only the first bucket's waits for nobody, the others
travel behind products. FLOPs and bytes are those that FLOP counter and ledger count (a test compares them),
but for Cholesky, triangular solves and Householder's QR, which are not counted there; bytes of memory and
numbers of operations are estimates. Rates of GPUs are assumptions; `benchmarks/sharded.py --only
ceilings,...` measures a machine's, and sets what comes of them beside what it measures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from curvadion import costs
from curvadion.algebra.iteration import Iteration
from curvadion.algebra.sizes import rank_of
from curvadion.formats import FORMATS
from curvadion.projection.nominal import KNOWN_RULES, Model
from curvadion.projection.rates import KERNELS, Rates
from curvadion.sharding.dealing import BUCKET_ELEMENTS, Errand, Spread, assign
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.region import Region

# Copies of what a GPU orthonormalizes at once, at the peak: what came, the iterate, the next one, what goes.
# Measured, 5.3 to 5.5, by benchmarks/sharded.py in both dtypes, by owners and together.
COPIES = 5.5
# Copies of what is under way to and from owners of Dion's factors, in two buckets, at the peak: an estimate.
COPIES_OF_FACTORS = 5
# Bytes read and written for an element of pseudo-gradient, beside the local step: X_0, X, the mean and new
# values; and by the codec, in plain torch.
OUTER_BYTES, CODEC_BYTES = 40.0, 93.0


ADAMW = 28.0  # of an element that AdamW updates
LOW_RANK = 28.0  # of an element of a matrix: m with its gradient 12, X and M with what is applied 16
FACTOR = 65.0  # of an element of P and R, by count
# Operations, by count: of any step, and for each matrix; of a rule, and for each of its matrices.
STEP_OPERATIONS, MUON_OPERATIONS, DION_OPERATIONS = (300, 8), (130, 18), (350, 20)


@dataclass(frozen=True)
class Work:
    """What a step takes of one GPU.

    Attributes:
        flops: by dtype.
        memory: bytes read and written.
        all_reduce, all_to_all: bytes that leave it inside the replica.
        buckets: in which matrices travel to owners.
        solved: FLOPs of triangular solves, by dtype, and of Householder's QR: FLOP counters leave them out.
        cholesky: FLOPs of Cholesky factors, which they leave out too.
        reduced: bytes read for norms by themselves.
        operations, calls: on the host, and collectives.
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
    reduced: float = 0.0
    operations: float = 0.0
    calls: float = 0.0
    transient: float = 0.0
    owned: int = 0

    def __add__(self, other: "Work") -> "Work":
        names = (
            "memory",
            "reduced",
            "operations",
            "calls",
            "all_reduce",
            "all_to_all",
            "buckets",
            "cholesky",
        )
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*names, "owned")}
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
        products = sum(self.flops.get(d, 0.0) / getattr(rates, d) for d in ("bfloat16", "float32"))
        products += self.solved.get("float32", 0.0) / rates.solve32
        products += self.solved.get("householder", 0.0) / rates.householder
        exact = (
            self.flops.get("float64", 0.0) / rates.float64 + self.solved.get("float64", 0.0) / rates.solve64
        )
        crossing = self.all_to_all / (rates.inside if shards <= gpus_per_node else rates.across)
        behind = (1 - 1 / self.buckets) * min(crossing, products) if self.buckets else 0.0
        return {
            "products": products,
            "float64": exact + self.cholesky / rates.cholesky,
            "memory": self.memory / rates.memory + self.reduced / rates.reduced,
            "host": self.operations * rates.operation + self.calls * rates.call,
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
    how: Iteration = field(default_factory=lambda: Iteration(dtype="bfloat16"))
    triangle: float = 1.0
    owners: str = "auto"
    owner_dtype: str | None = None
    rank_fraction: float = 0.25
    rank_multiple_of: int = 1
    device: str = "cuda"

    @property
    def dtype(self) -> str:
        """The name of the dtype of Newton-Schulz."""
        return self.how.dtype or "float32"

    @property
    def wire(self) -> int:
        """Bytes of an element on the way to its owner."""
        return FORMATS[self.owner_dtype or self.dtype].bytes


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
    """Return the FLOPs of all rounds on `rows` rows of matrices, together, in full products' time."""
    return s.how.steps * (s.triangle * (2 * rows * n**2 + 2 * n**3) + 2 * rows * n**2)


def rounds_alone(s: Settings, m: float, n: float) -> float:
    """Return the FLOPs of all rounds on a whole matrix, in full products' time."""
    symmetric, others = s.how.products(m, n, s.dtype)
    return s.triangle * symmetric + others


def counts_of(model: Model) -> dict[tuple[int, int], int]:
    """Return how many matrices there are of each shape."""
    counts: dict[tuple[int, int], int] = {}
    for shape in model.matrices:
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def plain(model: Model, s: Settings, width: float | None = 4) -> list[Work]:
    """Return what norms, momenta and parameters take, and AdamW for everything else, on each rank.

    Args:
        width: bytes of an element of directions; None where an update of low rank is applied to X and M.
    """
    counts, kernels = counts_of(model), KERNELS[s.device]
    matrix = LOW_RANK if width is None else kernels.matrix(width)
    scalars, (once, each) = model.scalars / s.shards, STEP_OPERATIONS
    work = []
    for rank in range(s.shards):
        local = sum(c * rows_of(m, s.shards)[rank] * n for (m, n), c in counts.items())
        work.append(
            Work(
                memory=matrix * local + ADAMW * scalars,
                reduced=kernels.norms * (local + scalars / 2),
                operations=once + each * len(model.matrices),
                calls=1 if s.shards > 1 else 0,
            )
        )
    return work


def addends(s: Settings, m: float, n: float) -> float:
    """Return how many elements the products of all rounds on a whole matrix read to add them."""
    found = 0.0
    for segment in s.how.segments(m, n, s.dtype):
        k = len(segment)
        found += n * n + m * n if k == 1 else (k + 3 * (k - 1)) * n * n
    return found


def muon(model: Model, s: Settings) -> list[Work]:
    """Return what "muon" takes of each rank, norms, momenta and AdamW left out."""
    counts = counts_of(model)
    wire, width = s.wire, FORMATS[s.dtype].bytes
    owned, work = dict[tuple[int, int], Spread](), [Work() for _ in range(s.shards)]
    for shape, count in counts.items():
        m, n = max(shape), min(shape)
        spread = spread_of(shape, rounds_alone(s, m, n), s.shards)
        wide = shape[0] < shape[1]
        sides = (1, s.shards) if wide else (s.shards, 1)
        alone = costs.cost_alone(spread, wire, s.shards, len(model.matrices))
        pays = costs.owner_pays(alone, costs.cost_together(s.how, m, n, *sides), costs.Rates.of(s.device))
        if s.shards == 1 or s.owners == "always" or (s.owners == "auto" and pays):
            owned[shape] = spread
            continue
        for rank, rows in enumerate(rows_of(shape[0], s.shards)):
            cost = costs.cost_together(s.how, m, n, *sides)
            flops = rounds_of(s, m if wide else rows, n)
            elements = count * (m * n if wide else rows * n)
            work[rank] += Work(
                {s.dtype: count * flops},
                memory=elements * (4 + (1 + s.how.steps) * width) + count * s.how.steps * (8 + width) * n * n,
                reduced=4 * elements,
                all_reduce=count * cost.all_reduce,
                operations=MUON_OPERATIONS[0] / len(counts),
                calls=(s.how.steps + 1 + wide) / len(counts),
                transient=0.0,
            )
            kept = work[rank].transient + COPIES * max(4, width) * elements
            work[rank] = replace(work[rank], transient=kept)
    if not owned:
        return work
    shapes = list(owned)
    owners, load = assign(list(owned.values()), [counts[x] for x in shapes], s.shards)
    for rank in range(s.shards):
        mine = sent = local = added = 0.0
        for shape, spread, whose in zip(shapes, owned.values(), owners, strict=True):
            part, size, own = spread.regions[rank].numel, math.prod(shape), whose.count(rank)
            mine, local = mine + own * size, local + len(whose) * part
            added += own * addends(s, max(shape), min(shape))
            sent += (len(whose) - own) * part + own * (size - part)
        stays, gone = 1 / s.shards, 1 - 1 / s.shards
        copied = gone * (4 + 3 * wire) * local + (gone * 4 * wire + stays * (12 + 5 * wire)) * mine
        several = mine > BUCKET_ELEMENTS
        at_once = (
            (COPIES + 2 * several) * max(wire, width) * min(mine, max(BUCKET_ELEMENTS, math.prod(shapes[0])))
        )
        work[rank] += Work(
            {s.dtype: load[rank]},
            memory=(copied if s.shards > 1 else 0.0) + mine * (wire + width) + added * width,
            reduced=mine * wire,
            all_to_all=wire * sent,
            buckets=max(1, math.ceil(mine / BUCKET_ELEMENTS)),
            operations=MUON_OPERATIONS[0] + MUON_OPERATIONS[1] * sum(counts[x] for x in shapes),
            calls=2 * max(1, math.ceil(mine / BUCKET_ELEMENTS)) if s.shards > 1 else 0,
            transient=at_once,
            owned=sum(counts[x] for x in shapes),
        )
    return work


def dion(model: Model, s: Settings) -> list[Work]:
    """Return what "dion" takes of each rank, norms, momenta and AdamW left out; a synchronized step with
    consensus="average" too, beside what it sends to other replicas."""
    counts, (once, each) = counts_of(model), DION_OPERATIONS
    work = [Work(operations=once + each * len(model.matrices)) for _ in range(s.shards)]
    summed, total = WIRE["all_reduce"](s.shards), len(model.matrices)
    whole, left = dict[tuple[int, int], Errand](), dict[tuple[int, int], Spread]()
    for shape, count in counts.items():
        m, n = max(shape), min(shape)
        r, wide = rank_of(n, s.rank_fraction, s.rank_multiple_of), shape[0] < shape[1]
        split = (0,) if s.shards > 1 else ()
        errand = costs.errand_of_factors(shape, spread_of(shape, 0.0, s.shards).regions, (split, ()), r)
        pays = costs.factors_have_owner(
            errand, lambda axes: s.shards if axes else 1, 4, total, "cholesky_qr", costs.Rates.of(s.device)
        )
        if s.shards > 1 and (s.owners == "always" or (s.owners == "auto" and pays)):
            whole[shape] = errand
        P = replace(errand.gives[0], flops=costs.orthogonalization(m, r))
        parts = 1 if wide else s.shards
        pays = costs.P_has_owner(P, parts, 4, total, "cholesky_qr", costs.Rates.of(s.device))
        if shape not in whole and s.shards > 1 and s.owners == "auto" and pays:
            left[shape] = P
        sent = (4 * m + 8) * r if wide else 4 * n * r + (0 if shape in left else (8 + 4) * r * r)
        for rank, rows in enumerate(rows_of(shape[0], s.shards)):
            part = rows * shape[1]
            if shape in whole:  # the owner's: of a rank, X and M with what is applied
                work[rank] += Work({"float32": count * 4 * part * r})
                continue
            work[rank] += Work(
                {"float32": count * 8 * part * r},
                count * FACTOR * (P.regions[rank].numel + (rows if wide else n) * r),
                summed * count * sent,
            )
            if shape not in left:
                method = "qr" if s.shards == 1 and s.device == "cpu" else "cholesky_qr"
                work[rank] = at_once(work[rank], orthogonalized(P.regions[rank].shape[0], r, method), count)
    if s.shards > 1 and len(whole) < len(counts):
        work = [w + Work(calls=5) for w in work]
    for owned in (whole, left):
        if owned:
            errands = [Errand.of(x) for x in owned.values()]
            by_owners(work, errands, [counts[x] for x in owned], s, at_once=owned is left)
    return work


def by_owners(
    work: list[Work], errands: Sequence[Errand], counts: Sequence[int], s: Settings, *, at_once: bool
) -> None:
    """Add what owners of Dion's factors take of each rank, and what travels.

    Args:
        at_once: of all matrices, rather than bucket by bucket.
    """
    owners, _ = assign(errands, counts, s.shards)
    method = "qr" if s.device == "cpu" else "cholesky_qr"
    for rank in range(s.shards):
        mine = 0.0
        for errand, whose in zip(errands, owners, strict=True):
            P, own, sent = errand.gives[0], whose.count(rank), 0.0
            for x in errand.takes:
                sent += (len(whose) - own) * x.regions[rank].numel if x.split else 0
            for x in errand.gives:
                sent += own * sum(part.numel for k, part in enumerate(x.regions) if k != rank)
            one = orthogonalized(*P.shape, method)
            if not at_once:  # the products are the owner's too
                (m, r), n = P.shape, errand.gives[1].shape[0]
                one = replace(one, transient=0.0)
                one += Work({"float32": costs.factor_products(m, n, r)}, FACTOR * (m + n) * r)
            back = len(whose) * sum(x.regions[rank].numel for x in errand.gives)
            taken = sum(math.prod(x.shape) for x in errand.takes)
            kept = work[rank].transient + own * one.transient + (8 * back if at_once else 0)
            work[rank] += sum([one] * own, start=Work(all_to_all=4 * sent, owned=len(whose)))
            work[rank] += Work(memory=16 * (own * taken + back))
            work[rank] = replace(work[rank], transient=kept)
            mine += max(own * taken, back)
        most = BUCKET_ELEMENTS if at_once else costs.bucket_elements(s.device)
        buckets = max(1, math.ceil(mine / most))
        work[rank] += Work(buckets=buckets, calls=0 if at_once else 2 * buckets)
        if not at_once:
            kept = work[rank].transient + COPIES_OF_FACTORS * 4 * min(mine, most)
            work[rank] = replace(work[rank], transient=kept)


def orthogonalized(rows: int, r: int, method: str = "cholesky_qr") -> Work:
    """Return what orthogonalizing so many rows of P takes: Cholesky QR in two passes, the first in float64;
    or "qr", Householder's."""
    if method == "qr":
        flops = 4 * rows * r**2 - 4 * r**3 / 3
        return Work(solved={"householder": flops}, transient=12 * rows * r)
    width = max(128, r // 8)  # of block columns of the lower triangle
    gram = sum(2 * rows * (r - j) * min(width, r - j) for j in range(0, r, width))
    return Work(
        {"float32": gram, "float64": gram},
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


# NorMuon: two sums of norms more than Muon.
LOCAL: dict[str, Callable[[Model, Settings], list[Work]]] = dict(
    zip(KNOWN_RULES, (gradient, dion, muon, muon), strict=True)
)


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
    width = s.wire if LOCAL[rule] is muon else 4
    common = plain(model, s, None if LOCAL[rule] is LOCAL["dion"] else width)
    return [a + b for a, b in zip(common, LOCAL[rule](model, s), strict=True)]


def synchronized_step(model: Model, payload: str, rule: str, s: Settings) -> list[Work]:
    """Return what a synchronized step takes of each rank, beside what it sends to other replicas: with
    pseudo-gradients ("outer-B") a local step and those, else one of Dion's."""
    if not payload.startswith("outer"):
        return [a + b for a, b in zip(plain(model, s, None), dion(model, s), strict=True)]
    coded = CODEC_BYTES if payload not in ("outer-32", "outer-16") else 0.0
    elements = model.parameters / s.shards
    outer = Work(memory=(OUTER_BYTES + coded) * elements)
    return [work + outer for work in local_step(model, rule, s)]


def dense_step(model: Model, s: Settings) -> Work:
    """Return what fused AdamW takes of each rank, the optimizer of a dense step."""
    return Work(memory=ADAMW * model.parameters / s.shards)
