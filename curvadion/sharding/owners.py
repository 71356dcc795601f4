"""Whole matrices, each with one rank of the replica, its owner: it is sent the shards, works on the matrix,
and sends every rank its part of what came out.

What a rank sends and computes falls with the number S of ranks: with w bytes an element about 2 w / S times
the elements of all matrices, and each matrix is worked on once. Which collective comes when, on all ranks
alike, for buckets 0, 1, 2, ...:

    in 0;    in 1, (work 0), out 0;    in 2, (work 1), out 1;    ...

"in" and "out" are one all-to-all each, of exactly what others need: nothing is padded, and what a rank has
already does not travel. While a rank works on a bucket, the next one comes in and the one before goes out, so
that about two of them are in memory.
"""

import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from curvadion.sharding.exchange import Exchange
from curvadion.sharding.group import Work
from curvadion.sharding.layout import Axes
from curvadion.sharding.region import Region

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
class Stack:
    """Some of a stack of equal matrices: from `start` to `stop` of the stack with this index."""

    index: int
    start: int
    stop: int

    def of(self, stacked: Tensor) -> Tensor:
        """Return them."""
        return stacked[self.start : self.stop]


class _Item(NamedTuple):
    """A part of a matrix that travels: of which matrix of which stack, to or from which rank."""

    stack: int
    place: int
    rank: int


@dataclass
class _Leg:
    """What this rank sends and receives, in the order of ranks, and to each in the order of matrices."""

    sent: list[_Item] = field(default_factory=list)
    received: list[_Item] = field(default_factory=list)

    def sort(self) -> None:
        self.sent.sort(key=lambda item: item.rank)
        self.received.sort(key=lambda item: item.rank)


@dataclass
class _Bucket:
    """Matrices that travel together, as this rank sees them.

    Attributes:
        stacks: which they are.
        mine: for each stack, the places in it of those that this rank owns.
        coming, going: shards to their owners, and what came out of the work to all.
        split: whether there is something to come at all, on whichever rank.
    """

    stacks: list[Stack]
    mine: list[list[int]]
    coming: _Leg
    going: _Leg
    split: bool


@dataclass
class Plan:
    """Who owns which matrix, the same on all ranks.

    Attributes:
        spreads, wire: of each stack, and its dtype on the way.
        owners: for each stack, the owners of its matrices, as indices of the replica's ranks.
        load: the work of each rank, in FLOPs.
        buckets: in which they travel.
    """

    spreads: Sequence[Spread]
    wire: Sequence[torch.dtype]
    owners: list[list[int]]
    load: list[float]
    buckets: list[_Bucket]


def assign(
    spreads: Sequence[Spread], counts: Sequence[int], ranks: int
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
    for i in _largest_first(spreads):
        for _ in range(counts[i]):
            load, rank = heap[0]
            owners[i].append(rank)
            heapq.heapreplace(heap, (load + spreads[i].flops, rank))
    return owners, [load for load, _ in sorted(heap, key=lambda pair: pair[1])]


def _largest_first(spreads: Sequence[Spread]) -> list[int]:
    return sorted(range(len(spreads)), key=lambda i: (-spreads[i].flops, i))


class Owners:
    """Has work on whole matrices done by their owners.

    Args:
        exchange: of the replica.
        when: "auto", where that takes less time; "always"; "never".
        dtype: of matrices on their way; None: that in which they are worked on.

    Attributes:
        ranks: how many there are.
        spreads: what users have found out about their matrices.
        plans: for what was asked so far.
        owner_of: the owner of each parameter that has one so far, as an index of the replica's ranks.
    """

    def __init__(self, exchange: Exchange, when: str = "auto", dtype: torch.dtype | None = None):
        self.exchange, self.when, self.dtype = exchange, when, dtype
        self.ranks = exchange.shards.size
        self.spreads: dict[Hashable, Spread] = {}
        self.owner_of: dict[int, int] = {}
        self.plans: dict[tuple, Plan] = {}

    def plan(
        self, spreads: Sequence[Spread], members: Sequence[Sequence[int]], wire: Sequence[torch.dtype]
    ) -> Plan:
        """Return who owns what; the same object when asked again.

        Args:
            spreads: of each stack of matrices.
            members: which parameters they are.
            wire: their dtype on the way.
        """
        key = (*map(id, spreads), *(tuple(m) for m in members), *wire)
        if key not in self.plans:
            counts = [len(m) for m in members]
            owners, load = assign(spreads, counts, self.ranks)
            buckets = [self._bucket(spreads, b, owners) for b in self._cut(spreads, counts, wire)]
            self.plans[key] = Plan(spreads, wire, owners, load, buckets)
            for some, owned in zip(members, owners, strict=True):
                self.owner_of |= zip(some, owned, strict=True)
        return self.plans[key]

    def _cut(
        self, spreads: Sequence[Spread], counts: Sequence[int], wire: Sequence[torch.dtype]
    ) -> Iterator[list[Stack]]:
        """Cut the matrices, in the order in which they were assigned, into buckets of one dtype: so many that
        every rank has one to work on, and more if they are small."""
        for dtype in sorted(set(wire), key=str):
            stacks: list[Stack] = []
            number = elements = 0
            for i in _largest_first(spreads):
                size = math.prod(spreads[i].shape)
                for k in range(counts[i]) if wire[i] == dtype else ():
                    if number >= self.ranks and elements + size > self.ranks * BUCKET_ELEMENTS:
                        yield stacks
                        stacks, number, elements = [], 0, 0
                    if stacks and stacks[-1].index == i:
                        stacks[-1] = replace(stacks[-1], stop=k + 1)
                    else:
                        stacks.append(Stack(i, k, k + 1))
                    number, elements = number + 1, elements + size
            if stacks:
                yield stacks

    def _bucket(self, spreads: Sequence[Spread], stacks: list[Stack], owners: list[list[int]]) -> _Bucket:
        me, coming, going = self.exchange.shards.index, _Leg(), _Leg()
        mine: list[list[int]] = []
        for s, stack in enumerate(stacks):
            spread = spreads[stack.index]
            owned = owners[stack.index][stack.start : stack.stop]
            mine.append([k for k, owner in enumerate(owned) if owner == me])
            for k, owner in enumerate(owned):
                if owner != me:
                    if spread.regions[me].numel:
                        going.received.append(_Item(s, k, owner))
                        if self._sends(me, owner, spread.split):
                            coming.sent.append(_Item(s, k, owner))
                    continue
                for rank, region in enumerate(spread.regions):
                    if rank != me and region.numel:
                        going.sent.append(_Item(s, k, rank))
                        if self._sends(rank, me, spread.split):
                            coming.received.append(_Item(s, k, rank))
        coming.sort()
        going.sort()
        return _Bucket(stacks, mine, coming, going, any(spreads[stack.index].split for stack in stacks))

    def _sends(self, rank: int, owner: int, split: Axes) -> bool:
        """Say whether it is this rank, of all that have the same part of a matrix, that sends it to the
        owner: the one that differs from it along the axes that split the matrix only."""
        places = self.exchange.shards.coordinates
        return all(
            axis in split or a == b
            for axis, (a, b) in enumerate(zip(places[rank], places[owner], strict=True))
        )

    def carry_out(
        self, plan: Plan, shards: Callable[[Stack], Tensor], work: Callable[[int, Tensor], Tensor]
    ) -> Iterator[list[tuple[Stack, Tensor]]]:
        """Yield, bucket by bucket, this rank's part of what `work` makes of the whole matrices.

        All ranks exhaust it: it has collectives.

        Args:
            shards: returns this rank's part of some matrices, (b, rows, columns).
            work: is given the index of a stack and some of its whole matrices, (b, *shape) in its dtype on
                the way, and returns as much.

        Yields: pairs (stack, (b, rows, columns)), in the dtype that `work` returns.
        """
        if self.ranks == 1:
            for bucket in plan.buckets:
                yield [(s, work(s.index, shards(s).to(plan.wire[s.index]))) for s in bucket.stacks]
            return
        trips = [_Trip(self.exchange, bucket, plan) for bucket in plan.buckets]
        for number, trip in enumerate(trips):
            if number == 0:
                trip.come(shards)
            if number + 1 < len(trips):
                trips[number + 1].come(shards)
            trip.go(work)
            if number:
                yield trips[number - 1].arrive()
        if trips:
            yield trips[-1].arrive()


class _Trip:
    """A bucket on its way to the owners and back."""

    def __init__(self, exchange: Exchange, bucket: _Bucket, plan: Plan):
        self._exchange, self._bucket, self._me = exchange, bucket, exchange.shards.index
        self._spreads = [plan.spreads[stack.index] for stack in bucket.stacks]
        self._wire = plan.wire[bucket.stacks[0].index]
        self._place = [{k: place for place, k in enumerate(places)} for places in bucket.mine]
        self._own: list[Tensor] = []  # this rank's part of the matrices that it owns
        self._received: list[Tensor] = []
        self._work: Work | None = None

    def _start(self, leg: _Leg, parts: list[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
        """Send parts, and prepare to receive parts of these shapes."""
        device = self._exchange.device
        sent = [p.numel() for p in parts]
        out = torch.empty(sum(sent), dtype=self._wire, device=device)
        if parts:
            torch._foreach_copy_(
                [v.view(p.shape) for v, p in zip(out.split(sent), parts, strict=True)], parts
            )
        received = [math.prod(shape) for shape in shapes]
        into = torch.empty(sum(received), dtype=self._wire, device=device)
        self._received = [v.view(s) for v, s in zip(into.split(received), shapes, strict=True)]
        counts = [[0] * self._exchange.shards.size for _ in range(2)]
        for count, items, sizes in zip(counts, (leg.sent, leg.received), (sent, received), strict=True):
            for item, size in zip(items, sizes, strict=True):
                count[item.rank] += size
        self._work = self._exchange.start_all_to_all(out, counts[0], into, counts[1], "matrices")

    def come(self, shards: Callable[[Stack], Tensor]) -> None:
        """Send this rank's shards to the owners."""
        local = [shards(stack) for stack in self._bucket.stacks]
        self._own = [  # not x[places], which uploads the indices and makes the host wait for the device
            torch.stack([x[k] for k in places]) if places else x[:0]
            for x, places in zip(local, self._bucket.mine, strict=True)
        ]
        if self._bucket.split:
            leg = self._bucket.coming
            shapes = [self._spreads[item.stack].regions[item.rank].shape for item in leg.received]
            self._start(leg, [local[item.stack][item.place] for item in leg.sent], shapes)

    def go(self, work: Callable[[int, Tensor], Tensor]) -> None:
        """Wait for the matrices, work on them, and send all their parts."""
        whole = [
            own.new_empty((len(own), *spread.shape), dtype=self._wire)
            for own, spread in zip(self._own, self._spreads, strict=True)
        ]
        for matrices, own, spread in zip(whole, self._own, self._spreads, strict=True):
            spread.regions[self._me].of(matrices).copy_(own)
        if self._work is not None:
            self._work.wait()
            targets = [self._part(whole, item) for item in self._bucket.coming.received]
            if targets:
                torch._foreach_copy_(targets, self._received)
        done = [
            work(stack.index, matrices) if len(matrices) else matrices
            for stack, matrices in zip(self._bucket.stacks, whole, strict=True)
        ]
        del whole
        self._own = [
            spread.regions[self._me].of(d).clone() for d, spread in zip(done, self._spreads, strict=True)
        ]
        leg = self._bucket.going
        shapes = [self._spreads[item.stack].regions[self._me].shape for item in leg.received]
        self._start(leg, [self._part(done, item) for item in leg.sent], shapes)

    def _part(self, whole: Sequence[Tensor], item: _Item) -> Tensor:
        """Return a rank's part of a matrix that this rank owns."""
        place = self._place[item.stack][item.place]
        return self._spreads[item.stack].regions[item.rank].of(whole[item.stack][place])

    def arrive(self) -> list[tuple[Stack, Tensor]]:
        """Wait for this rank's parts of all matrices, and return them."""
        assert self._work is not None, "it has gone"
        self._work.wait()
        result = []
        for stack, spread, own, places in zip(
            self._bucket.stacks, self._spreads, self._own, self._bucket.mine, strict=True
        ):
            local = own.new_empty((stack.stop - stack.start, *spread.regions[self._me].shape))
            if places:
                torch._foreach_copy_([local[k] for k in places], list(own))
            result.append((stack, local))
        targets = [result[item.stack][1][item.place] for item in self._bucket.going.received]
        if targets:
            torch._foreach_copy_(targets, self._received)
        self._own, self._received, self._work = [], [], None
        return result
