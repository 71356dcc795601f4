"""Whole matrices, each with one rank of the replica, its owner: it is sent the shards, works on the matrix,
and sends every rank its part of what came out. What all replicas have alike may have one owner among the
ranks of all of them.

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
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from curvadion.sharding.crew import Crew
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.group import Work
from curvadion.sharding.layout import Axes
from curvadion.sharding.region import Region

Tensors = list[Tensor]
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
    def of(spread: "Spread | Errand") -> "Errand":
        """Return the errand of a matrix that comes back as large as it went."""
        return spread if isinstance(spread, Errand) else Errand((spread,), (spread,), spread.flops)

    @property
    def elements(self) -> float:
        """How many elements of one matrix a rank has at once: of what goes to its owner, on average over all
        ranks, or of what comes back, at most."""
        taken = sum(math.prod(s.shape) / len(s.regions) for s in self.takes)
        return max(taken, sum(max(region.numel for region in s.regions) for s in self.gives))


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
    """A part of a tensor that travels: of which matrix of which stack, to or from which rank, and which
    tensor of an errand it is."""

    stack: int
    place: int
    rank: int
    tensor: int


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
        errands, wire: of each stack, and its dtype on the way.
        owners: for each stack, the owners of its matrices, as indices of the replica's ranks.
        load: the work of each rank, in FLOPs.
        buckets: in which they travel.
    """

    errands: Sequence[Errand]
    wire: Sequence[torch.dtype]
    owners: list[list[int]]
    load: list[float]
    buckets: list[_Bucket]


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
    for i in _largest_first(spreads):
        for _ in range(counts[i]):
            load, rank = heap[0]
            owners[i].append(rank)
            heapq.heapreplace(heap, (load + spreads[i].flops, rank))
    return owners, [load for load, _ in sorted(heap, key=lambda pair: pair[1])]


def _largest_first(spreads: Sequence[Spread | Errand]) -> list[int]:
    return sorted(range(len(spreads)), key=lambda i: (-spreads[i].flops, i))


class Owners:
    """Has work on whole matrices done by their owners.

    Args:
        exchange: of the replica.
        when: "auto", where that takes less time; "always"; "never".
        dtype: of matrices on their way; None: that in which they are worked on.
        crew: the ranks among which owners are chosen; None for those of the replica.
        purpose: of what travels, in the ledger.
        bandwidth: at which a rank sends to other replicas, bytes a second.

    Attributes:
        ranks: how many there are.
        spreads, errands: what users have found out about their matrices.
        plans: for what was asked so far.
        owner_of: the owner of each parameter that has one so far, as an index of the replica's ranks.
    """

    def __init__(
        self,
        exchange: Exchange,
        when: str = "auto",
        dtype: torch.dtype | None = None,
        crew: Crew | None = None,
        purpose: str = "matrices",
        bandwidth: float = math.inf,
    ):
        self.exchange, self.when, self.dtype, self.purpose = exchange, when, dtype, purpose
        self.bandwidth = bandwidth
        self.crew = crew or Crew(exchange.shards)
        self.ranks = self.crew.size
        self.spreads: dict[Hashable, Spread] = {}
        self.errands: dict[Hashable, Errand] = {}
        self.owner_of: dict[int, int] = {}
        self.plans: dict[tuple, Plan] = {}

    def plan(
        self,
        spreads: Sequence[Spread | Errand],
        members: Sequence[Sequence[int]],
        wire: Sequence[torch.dtype],
        bucket_elements: int | None = None,
    ) -> Plan:
        """Return who owns what; the same object when asked again.

        Args:
            spreads: of each stack of matrices; or errands, where other tensors come back than went.
            members: which parameters they are.
            wire: their dtype on the way.
            bucket_elements: how many a rank takes on at a time, None for BUCKET_ELEMENTS.
        """
        key = (*map(id, spreads), *(tuple(m) for m in members), *wire)
        if key not in self.plans:
            counts, errands = [len(m) for m in members], [Errand.of(s) for s in spreads]
            owners, load = assign(errands, counts, self.ranks)
            buckets = [
                self._bucket(errands, stacks, owners)
                for stacks in self._cut(errands, counts, wire, bucket_elements or BUCKET_ELEMENTS)
            ]
            self.plans[key] = Plan(errands, wire, owners, load, buckets)
            for some, owned in zip(members, owners, strict=True):
                self.owner_of |= zip(some, owned, strict=True)
        return self.plans[key]

    def _cut(
        self, errands: Sequence[Errand], counts: Sequence[int], wire: Sequence[torch.dtype], most: int
    ) -> Iterator[list[Stack]]:
        """Cut the matrices, in the order in which they were assigned, into buckets of one dtype: so many that
        every rank has one to work on, and more if they are small."""
        for dtype in sorted(set(wire), key=str):
            stacks: list[Stack] = []
            number, elements = 0, 0.0
            for i in _largest_first(errands):
                size = errands[i].elements
                for k in range(counts[i]) if wire[i] == dtype else ():
                    if number >= self.ranks and elements + size > most:
                        yield stacks
                        stacks, number, elements = [], 0, 0.0
                    if stacks and stacks[-1].index == i:
                        stacks[-1] = replace(stacks[-1], stop=k + 1)
                    else:
                        stacks.append(Stack(i, k, k + 1))
                    number, elements = number + 1, elements + size
            if stacks:
                yield stacks

    def _bucket(self, errands: Sequence[Errand], stacks: list[Stack], owners: list[list[int]]) -> _Bucket:
        me, coming, going = self.crew.index, _Leg(), _Leg()
        mine: list[list[int]] = []
        for s, stack in enumerate(stacks):
            takes, gives = errands[stack.index].takes, errands[stack.index].gives
            owned = owners[stack.index][stack.start : stack.stop]
            mine.append([k for k, owner in enumerate(owned) if owner == me])
            for k, owner in enumerate(owned):
                others = [r for r in range(self.ranks) if r != me] if owner == me else [me]
                for tensor, spread in enumerate(takes):
                    for rank in others:
                        if spread.regions[rank].numel and self._sends(rank, owner, spread.split):
                            if owner == me:
                                coming.received.append(_Item(s, k, rank, tensor))
                            else:
                                coming.sent.append(_Item(s, k, owner, tensor))
                for tensor, spread in enumerate(gives):
                    for rank in others:
                        if spread.regions[rank].numel:
                            if owner == me:
                                going.sent.append(_Item(s, k, rank, tensor))
                            else:
                                going.received.append(_Item(s, k, owner, tensor))
        coming.sort()
        going.sort()
        split = any(spread.split for stack in stacks for spread in errands[stack.index].takes)
        return _Bucket(stacks, mine, coming, going, split)

    def _sends(self, rank: int, owner: int, split: Axes) -> bool:
        """Say whether it is this rank, of all that have the same part of a matrix, that sends it to the
        owner: the one that differs from it along the axes that split the matrix only."""
        places = self.crew.coordinates
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
        for arrived in self._trips(plan, lambda stack: [shards(stack)], lambda i, x: [work(i, x.pop())]):
            yield [(stack, part) for stack, [part] in arrived]

    def carry_out_errands(
        self,
        plan: Plan,
        shards: Callable[[Stack], Tensors],
        work: Callable[[int, Tensors], Tensors],
        at_once: int,
    ) -> Iterator[tuple[Stack, Tensors]]:
        """Do what `carry_out` does with as many tensors for each matrix as its errand takes and gives.

        Args:
            at_once: how many elements of what comes back to yield at a time, unless one matrix has more.
        """
        for arrived in self._trips(plan, shards, work, at_once):
            yield from arrived

    def _trips(
        self,
        plan: Plan,
        shards: Callable[[Stack], Tensors],
        work: Callable[[int, Tensors], Tensors],
        at_once: int | None = None,
    ) -> Iterator[Iterable[tuple[Stack, Tensors]]]:
        """Let each bucket make its trip, and yield what arrives from it."""
        if self.ranks == 1:
            for bucket in plan.buckets:
                yield [
                    (s, work(s.index, [x.to(plan.wire[s.index]) for x in shards(s)])) for s in bucket.stacks
                ]
            return
        trips = [_Trip(self, bucket, plan) for bucket in plan.buckets]
        for number, trip in enumerate(trips):
            if number == 0:
                trip.come(shards)
            if number + 1 < len(trips):
                trips[number + 1].come(shards)
            trip.go(work)
            if number:
                yield trips[number - 1].arrive(at_once)
        if trips:
            yield trips[-1].arrive(at_once)


class _Trip:
    """A bucket on its way to the owners and back."""

    def __init__(self, owners: Owners, bucket: _Bucket, plan: Plan):
        self._owners, self._bucket, self._me = owners, bucket, owners.crew.index
        self._takes = [plan.errands[stack.index].takes for stack in bucket.stacks]
        self._gives = [plan.errands[stack.index].gives for stack in bucket.stacks]
        self._wire = plan.wire[bucket.stacks[0].index]
        self._place = [{k: place for place, k in enumerate(places)} for places in bucket.mine]
        self._own: list[Tensors] = []  # this rank's part of the matrices that it owns
        self._received: Tensors = []
        self._work: Work | None = None

    def _start(self, leg: _Leg, parts: Tensors, shapes: Sequence[tuple[int, ...]]) -> None:
        """Send parts, which are kept no longer, and prepare to receive parts of these shapes."""
        device = self._owners.exchange.device
        sent = [p.numel() for p in parts]
        out = torch.empty(sum(sent), dtype=self._wire, device=device)
        if parts:
            torch._foreach_copy_(
                [v.view(p.shape) for v, p in zip(out.split(sent), parts, strict=True)], parts
            )
        parts.clear()
        received = [math.prod(shape) for shape in shapes]
        into = torch.empty(sum(received), dtype=self._wire, device=device)
        self._received = [v.view(s) for v, s in zip(into.split(received), shapes, strict=True)]
        counts = [[0] * self._owners.ranks for _ in range(2)]
        for count, items, sizes in zip(counts, (leg.sent, leg.received), (sent, received), strict=True):
            for item, size in zip(items, sizes, strict=True):
                count[item.rank] += size
        self._work = self._owners.exchange.start_all_to_all(
            self._owners.crew, out, counts[0], into, counts[1], self._owners.purpose
        )

    def come(self, shards: Callable[[Stack], Tensors]) -> None:
        """Send this rank's shards to the owners."""
        local = [shards(stack) for stack in self._bucket.stacks]
        self._own = [  # not x[places], which uploads the indices and makes the host wait for the device
            [torch.stack([x[k] for k in places]) if places else x[:0] for x in tensors]
            for tensors, places in zip(local, self._bucket.mine, strict=True)
        ]
        if self._bucket.split:
            leg = self._bucket.coming
            shapes = [self._takes[i.stack][i.tensor].regions[i.rank].shape for i in leg.received]
            self._start(leg, [local[i.stack][i.tensor][i.place] for i in leg.sent], shapes)

    def go(self, work: Callable[[int, Tensors], Tensors]) -> None:
        """Wait for the matrices, work on them, and send all their parts."""
        whole = [
            [self._place_own(own, spread) for own, spread in zip(tensors, spreads, strict=True)]
            for tensors, spreads in zip(self._own, self._takes, strict=True)
        ]
        self._own = []
        if self._work is not None:
            self._work.wait()
            targets = [self._part(whole, self._takes, item) for item in self._bucket.coming.received]
            if targets:
                torch._foreach_copy_(targets, self._received)
            del targets
            self._received = []
        done = list[Tensors]()
        for stack, places, gives in zip(self._bucket.stacks, self._bucket.mine, self._gives, strict=True):
            tensors = whole.pop(0)
            done.append(work(stack.index, tensors) if places else self._none(gives))
        self._own = [
            [spread.regions[self._me].of(d).clone() for d, spread in zip(tensors, spreads, strict=True)]
            for tensors, spreads in zip(done, self._gives, strict=True)
        ]
        leg = self._bucket.going
        shapes = [self._gives[i.stack][i.tensor].regions[self._me].shape for i in leg.received]
        parts = [self._part(done, self._gives, item) for item in leg.sent]
        del done
        self._start(leg, parts, shapes)

    def _place_own(self, own: Tensor, spread: Spread) -> Tensor:
        """Return whole matrices that have this rank's part of them, and nothing yet of the others'."""
        if own.shape[1:] == spread.shape:
            return own.to(self._wire)
        whole = own.new_empty((len(own), *spread.shape), dtype=self._wire)
        spread.regions[self._me].of(whole).copy_(own)
        return whole

    def _none(self, gives: Sequence[Spread]) -> Tensors:
        """Return what comes of no matrices."""
        device = self._owners.exchange.device
        return [torch.empty((0, *spread.shape), dtype=self._wire, device=device) for spread in gives]

    def _part(self, whole: Sequence[Tensors], spreads: Sequence[Sequence[Spread]], item: _Item) -> Tensor:
        """Return a rank's part of a tensor of a matrix that this rank owns."""
        place, spread = self._place[item.stack][item.place], spreads[item.stack][item.tensor]
        return spread.regions[item.rank].of(whole[item.stack][item.tensor][place])

    def arrive(self, at_once: int | None) -> Iterator[tuple[Stack, Tensors]]:
        """Wait for this rank's parts of all matrices, and yield them, at most so many elements at a time."""
        assert self._work is not None, "it has gone"
        self._work.wait()
        self._work = None
        received: list[list[tuple[int, int, Tensor]]] = [[] for _ in self._bucket.stacks]
        for item, part in zip(self._bucket.going.received, self._received, strict=True):
            received[item.stack].append((item.place, item.tensor, part))
        own, self._own, self._received = self._own, [], []
        for s, (stack, spreads) in enumerate(zip(self._bucket.stacks, self._gives, strict=True)):
            shapes, count = [spread.regions[self._me].shape for spread in spreads], stack.stop - stack.start
            mine = zip(self._bucket.mine[s], *own[s], strict=True)
            arrived = received[s] + [(k, tensor, x) for k, *xs in mine for tensor, x in enumerate(xs)]
            step = max(1, at_once // max(1, sum(map(math.prod, shapes)))) if at_once else count
            for start in range(0, count, step):
                stop = min(start + step, count)
                local = [x.new_empty((stop - start, *shape)) for x, shape in zip(own[s], shapes, strict=True)]
                some = [item for item in arrived if start <= item[0] < stop]
                if some:
                    targets = [local[tensor][k - start] for k, tensor, _ in some]
                    torch._foreach_copy_(targets, [x for _, _, x in some])
                yield Stack(stack.index, stack.start + start, stack.start + stop), local
