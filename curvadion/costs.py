"""What the work of local rules takes of ranks, and whether matrices had better have owners: arithmetic alone.

The rules choose by it, and `curvadion project` prints what they would choose. So it is without torch, as all
that it imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from curvadion.algebra.iteration import Iteration
from curvadion.algebra.sizes import piece_elements
from curvadion.sharding.dealing import Errand, Spread
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.region import Axes, Region


@dataclass(frozen=True)
class Rates:
    """What a rank does in a second: FLOPs of products, and in float64; bytes that leave it in an all-reduce
    and in an all-to-all, and for other replicas. Round figures; they choose between two ways, so only their
    ratios count."""

    flops: float
    float64: float
    all_reduce: float
    all_to_all: float
    replicas: float = math.inf

    @staticmethod
    def of(device: str) -> Rates:
        """Return those of this kind of device."""
        return RATES.get(device, RATES["cuda"])


# A GPU with bfloat16 products, NVLink inside its machine and a network card to others; a CPU core in float32.
RATES = {"cuda": Rates(5e14, 4e13, 2e11, 5e10), "cpu": Rates(5e10, 2.5e10, 1e9, 1e9)}


@dataclass(frozen=True)
class Cost:
    """What some work takes of a rank: FLOPs of products, bytes that leave it in all-reduces and in
    all-to-alls, and for other replicas."""

    flops: float = 0.0
    all_reduce: float = 0.0
    all_to_all: float = 0.0
    replicas: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def seconds(self, rates: Rates) -> float:
        """Return how long it takes, one after the other."""
        return sum(getattr(self, f.name) / getattr(rates, f.name) for f in fields(self))


def cost_alone(spread: Spread, itemsize: int, parts: int, total: int, replicas: int = 1) -> Cost:
    """Return what one of the matrices costs each rank on average where each is with one owner.

    Args:
        itemsize: bytes of an element on the way.
        parts: into how many parts a matrix is split; those of ranks that have the same part travel once.
        total: how many matrices there are; with fewer than ranks, some ranks have nothing to do.
        replicas: among whose ranks there is one owner.
    """
    ranks = len(spread.regions)
    share, sent = max(1 / ranks, 1 / total), itemsize * math.prod(spread.shape) / parts
    inside, others = (parts - 1) + (ranks // replicas - 1), ranks - ranks // replicas
    return Cost(share * spread.flops, 0.0, share * sent * inside, share * sent * others)


def cost_together(how: Iteration, m: float, n: float, long: int = 1, short: int = 1) -> Cost:
    """Return what one matrix costs each rank where all ranks work on it at once.

        FLOPs  steps (4 m n^2 / long + 2 n^3),    every rank does the second part, and where the short side is
                                                  split, as much as the others along it
        bytes  2 (k - 1) / k of a buffer          k = long: the Gram matrices, float32, and the norm, float64;
                                                  k = short: m n / long float32, to gather the short side

    Args:
        m, n: its longer and its shorter side.
        long, short: over how many ranks they are split.
    """

    def summed(nbytes: float, ranks: int) -> float:
        return nbytes * WIRE["all_reduce"](ranks)

    flops = how.steps * (4 * m / long * n**2 + 2 * n**3)
    return Cost(flops, summed(how.steps * 4 * n * n + 8, long) + summed(4 * m / long * n, short))


def owner_pays(alone: Cost, together: Cost, rates: Rates) -> bool:
    """Say whether a matrix had better be with one owner than with all ranks together."""
    return alone.seconds(rates) <= together.seconds(rates)


# ---- Dion's P


def orthogonalization(m: float, r: float) -> float:
    """Return the FLOPs of one P: two Gram matrices, two triangular solves, three Cholesky factorizations."""
    return 6 * m * r**2 + r**3


def P_has_owner(spread: Spread, parts: int, itemsize: int, total: int, method: str, rates: Rates) -> bool:
    """Say whether P had better be with one owner than with all ranks together; see `seconds_of_P`."""
    alone, together = seconds_of_P(spread, parts, itemsize, total, method, rates)
    return alone <= together


def seconds_of_P(
    spread: Spread,
    parts: int,
    itemsize: int,
    total: int,
    method: str,
    rates: Rates,
    replicas: int = 1,
) -> tuple[float, float]:
    """Return how long each rank takes for one P on average: with one owner, and all of a replica together.

    Args:
        parts: into how many its rows are split.
        itemsize: bytes of an element.
        total: how many matrices there are.
        replicas: among whose ranks there is one owner.
    """
    m, r = spread.shape
    # Householder needs the whole matrix on all ranks; Cholesky QR two Gram matrices, the first in float64.
    whole = method == "qr"
    summed = WIRE["all_reduce"](parts) * (itemsize * m * r if whole else (8 + itemsize) * r * r)
    together = Cost(orthogonalization(m if whole else m / parts, r), summed)
    alone = replace(cost_alone(spread, itemsize, parts, total, replicas), flops=0.0)
    alone += Cost(max(1 / len(spread.regions), 1 / total) * orthogonalization(m, r))
    exact = replace(rates, flops=rates.float64)
    return alone.seconds(exact), together.seconds(exact)


# ---- Dion's factors P and R of whole matrices

# Elements that a rank takes on at a time, in those of a piece: on CPUs 6 MiB in float32, on GPUs 192.
PIECES = 12


def bucket_elements(device: str) -> int:
    """Return how many elements a rank takes on at a time, on this kind of device."""
    return PIECES * piece_elements(device)


def errand_of_factors(
    shape: Sequence[int],
    regions: Sequence[Region],
    sharded: Sequence[Axes],
    r: int,
    *,
    orthonormal_R: bool = False,
) -> Errand:
    """Return what the owners of matrices are sent, and send back.

    Args:
        shape, regions: of a matrix, and what each rank has of it.
        sharded: the axes that split its rows, and its columns.
        r: the rank of P and R.
    """
    rows, columns = shape
    long, short = (0, 1) if rows >= columns else (1, 0)

    def factor(dim: int) -> Spread:
        parts = tuple(Region((part.offset[dim], 0), (part.shape[dim], r)) for part in regions)
        return Spread((shape[dim], r), parts, sharded[dim], 0.0)

    m, n = shape[long], shape[short]
    M = Spread((rows, columns), tuple(regions), tuple(sorted((*sharded[0], *sharded[1]))), 0.0)
    right = (
        factor(short) if orthonormal_R else Spread((1, r), (Region((0, 0), (1, r)),) * len(regions), (), 0.0)
    )
    work = factor_products(m, n, r) + orthogonalization(m, r)
    work += orthogonalization(n, r) if orthonormal_R else 0
    return Errand((M, factor(short)), (factor(long), factor(short), right), work)


def factor_products(m: float, n: float, r: float) -> float:
    """Return the FLOPs of P = M Q and R = M^T P."""
    return 4 * m * n * r


def factors_have_owner(
    errand: Errand, count: Callable[[Axes], int], itemsize: int, total: int, method: str, rates: Rates
) -> bool:
    """Say whether a matrix had better go to one owner, rather than that P and R are sums over all ranks.

    Args:
        count: returns how many ranks there are along axes.
        itemsize: bytes of an element.
        total: how many matrices there are.
        method: of orthogonalization.
    """
    P, R, right = errand.gives
    (m, r), n, ranks = P.shape, R.shape[0], len(P.regions)
    orthonormal_R = right.shape == R.shape

    def sent(spread: Spread, others: int) -> float:
        return itemsize * math.prod(spread.shape) / count(spread.split) * others

    leaves = sum(sent(x, count(x.split) - 1) for x in errand.takes)
    leaves += sum(sent(x, ranks - 1) for x in errand.gives)
    orthogonalized = orthogonalization(m, r) + (orthogonalization(n, r) if orthonormal_R else 0)
    work = factor_products(m, n, r) / rates.flops + orthogonalized / rates.float64
    alone = max(1 / ranks, 1 / total) * (work + leaves / rates.all_to_all)

    along, across = count(P.split), count(R.split)
    summed = itemsize * r * (WIRE["all_reduce"](along) * n / across + WIRE["all_reduce"](across) * m / along)
    together = factor_products(m, n, r) / (along * across) / rates.flops + summed / rates.all_reduce
    together += min(seconds_of_P(P, along, itemsize, total, method, rates))
    if orthonormal_R:
        together += seconds_of_P(R, across, itemsize, total, method, rates)[1]
    return alone < together
