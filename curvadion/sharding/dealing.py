"""Whole matrices, dealt out to ranks: how they lie over them, what travels, and who owns which; without
torch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvadion.sharding.region import Axes, Region

# Elements of whole matrices that a rank takes on at a time, unless one matrix has more.
BUCKET_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Spread:
    """How equal matrices lie over the ranks of a replica.

    Attributes:
        shape: of a whole matrix.
        regions: what each rank has of it.
        split: the axes that split it; along the others it is the same.
        flops: of the work on one of them.
    """

    shape: tuple[int, int]
    regions: tuple[Region, ...]
    split: Axes
    flops: float


@dataclass(frozen=True)
class Errand:
    """What owners of equal matrices are sent of each, and what they send back.

    Attributes:
        takes, gives: tensors, each spread in its own way.
        flops: of the work on one matrix.
    """

    takes: tuple[Spread, ...]
    gives: tuple[Spread, ...]
    flops: float

    @staticmethod
    def of(spread: Spread | Errand) -> Errand:
        """Return the errand of a matrix that comes back as large as it went."""
        return spread if isinstance(spread, Errand) else Errand((spread,), (spread,), spread.flops)

    @property
    def elements(self) -> float:
        """How many elements of one matrix a rank has at once: of what goes to its owner, on average over all
        ranks, or of what comes back, at most."""
        taken = sum(math.prod(s.shape) / len(s.regions) for s in self.takes)
        return max(taken, sum(max(region.numel for region in s.regions) for s in self.gives))


def assign(
    spreads: Sequence[Spread | Errand], counts: Sequence[int], ranks: int
) -> tuple[list[list[int]], list[float]]:
    """Return the owners of all matrices, and the work of each rank: longest processing time first.

    The largest matrix goes to the rank that has the least to do, then the next one: no rank has more to do
    than the mean and one matrix.

    Args:
        counts: how many matrices there are of each kind.

    Source: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17, 1969.
    """
    heap = [(0.0, rank) for rank in range(ranks)]
    owners: list[list[int]] = [[] for _ in counts]
    for i in largest_first(spreads):
        for _ in range(counts[i]):
            load, rank = heap[0]
            owners[i].append(rank)
            heapq.heapreplace(heap, (load + spreads[i].flops, rank))
    return owners, [load for load, _ in sorted(heap, key=lambda pair: pair[1])]


def largest_first(spreads: Sequence[Spread | Errand]) -> list[int]:
    """Return the indices of what takes longest first."""
    return sorted(range(len(spreads)), key=lambda i: (-spreads[i].flops, i))
