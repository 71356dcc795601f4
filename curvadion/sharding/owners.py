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

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from curvadion.sharding.crew import Crew
from curvadion.sharding.dealing import BUCKET_ELEMENTS, Errand, Spread, assign, largest_first
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.group import Work
from curvadion.sharding.region import Axes, Region

Tensors = list[Tensor]


@dataclass(frozen=True)
class Stack:
    """Some of a stack of equal matrices: from `start` to `stop` of the stack with this index."""

    index: int
    start: int
    stop: int

    def of(self, stacked: Tensor) -> Tensor:
        """Return them."""
        return stacked[self.start : self.stop]


class _Block(NamedTuple):
    """A part of a tensor of some matrices of a stack, from `start` to `stop`, that travels to or from a rank;
    `tensor` counts those of an errand."""

    stack: int
    tensor: int
    rank: int
    start: int
    stop: int
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.region.shape)


class _Leg:
    """What this rank sends and receives, in the order of ranks, and to each in the order of stacks.

    Attributes:
        sent_counts, received_counts: how many elements of it, for each rank.
    """

    def __init__(self, sent: Iterable[_Block], received: Iterable[_Block], ranks: int):
        self.sent, self.received = self._ordered(sent), self._ordered(received)
        self.sent_counts = self._counts(self.sent, ranks)
        self.received_counts = self._counts(self.received, ranks)

    @staticmethod
    def _ordered(blocks: Iterable[_Block]) -> list[_Block]:
        return sorted((b for b in blocks if math.prod(b.shape)), key=lambda block: block.rank)

    @staticmethod
    def _counts(blocks: Sequence[_Block], ranks: int) -> list[int]:
        counts = [0] * ranks
        for block in blocks:
            counts[block.rank] += math.prod(block.shape)
        return counts


@dataclass
class _Bucket:
    """Matrices that travel together, as this rank sees them.

    Attributes:
        stacks: which they are.
        mine: for each stack, from where to where those are that this rank owns.
        coming, going: shards to their owners, and what came out of the work to all.
        split: whether there is something to come at all, on whichever rank.
    """

    stacks: list[Stack]
    mine: list[tuple[int, int]]
    coming: _Leg
    going: _Leg
    split: bool


@dataclass
class Plan:
    """Who owns which matrix, the same on all ranks.

    Attributes:
        errands, wire: of each stack, and its dtype on the way.
        owners: for each stack, the owners of its matrices, as indices of the replica's ranks. Those of one
            owner in a bucket follow one another, so that they travel as one.
        load: the work of each rank, in FLOPs.
        buckets: in which they travel.
    """

    errands: Sequence[Errand]
    wire: Sequence[torch.dtype]
    owners: list[list[int]]
    load: list[float]
    buckets: list[_Bucket]


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
            buckets = []
            for stacks in self._cut(errands, counts, wire, bucket_elements or BUCKET_ELEMENTS):
                for s in stacks:  # equal matrices: which is whose makes no difference
                    owners[s.index][s.start : s.stop] = sorted(owners[s.index][s.start : s.stop])
                buckets.append(self._bucket(errands, stacks, owners))
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
            for i in largest_first(errands):
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
        me, ranks = self.crew.index, range(self.ranks)
        coming_out, coming_in, going_out, going_in = (list[_Block]() for _ in range(4))
        mine: list[tuple[int, int]] = []
        for s, stack in enumerate(stacks):
            owned = owners[stack.index][stack.start : stack.stop]
            runs = [(bisect_left(owned, rank), bisect_right(owned, rank)) for rank in ranks]
            mine.append(runs[me])
            for rank, run in ((rank, run) for rank, run in enumerate(runs) if rank != me):
                for tensor, spread in enumerate(errands[stack.index].takes):
                    if self._sends(me, rank, spread.split):
                        coming_out.append(_Block(s, tensor, rank, *run, spread.regions[me]))
                    if self._sends(rank, me, spread.split):
                        coming_in.append(_Block(s, tensor, rank, *runs[me], spread.regions[rank]))
                for tensor, spread in enumerate(errands[stack.index].gives):
                    going_out.append(_Block(s, tensor, rank, *runs[me], spread.regions[rank]))
                    going_in.append(_Block(s, tensor, rank, *run, spread.regions[me]))
        coming, going = _Leg(coming_out, coming_in, self.ranks), _Leg(going_out, going_in, self.ranks)
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
        self._own: list[Tensors] = []  # this rank's part of the matrices that it owns
        self._received: Tensors = []
        self._work: Work | None = None

    def _start(self, leg: _Leg, parts: Tensors) -> None:
        """Send parts, which are kept no longer, and prepare to receive."""
        device = self._owners.exchange.device
        out, into = (
            torch.empty(sum(counts), dtype=self._wire, device=device)
            for counts in (leg.sent_counts, leg.received_counts)
        )
        if parts:
            torch._foreach_copy_(_views(out, leg.sent), parts)
        parts.clear()
        self._received = _views(into, leg.received)
        self._work = self._owners.exchange.start_all_to_all(
            self._owners.crew, out, leg.sent_counts, into, leg.received_counts, self._owners.purpose
        )

    def come(self, shards: Callable[[Stack], Tensors]) -> None:
        """Send this rank's shards to the owners."""
        local = [shards(stack) for stack in self._bucket.stacks]
        self._own = [
            [x[start:stop].clone() for x in tensors]
            for tensors, (start, stop) in zip(local, self._bucket.mine, strict=True)
        ]
        if self._bucket.split:
            leg = self._bucket.coming
            self._start(leg, [local[b.stack][b.tensor][b.start : b.stop] for b in leg.sent])

    def go(self, work: Callable[[int, Tensors], Tensors]) -> None:
        """Wait for the matrices, work on them, and send all their parts."""
        whole = [
            [self._place_own(own, spread) for own, spread in zip(tensors, spreads, strict=True)]
            for tensors, spreads in zip(self._own, self._takes, strict=True)
        ]
        self._own = []
        if self._work is not None:
            self._work.wait()
            targets = [b.region.of(whole[b.stack][b.tensor]) for b in self._bucket.coming.received]
            if targets:
                torch._foreach_copy_(targets, self._received)
            del targets
            self._received = []
        done = list[Tensors]()
        for stack, (start, stop), gives in zip(
            self._bucket.stacks, self._bucket.mine, self._gives, strict=True
        ):
            tensors = whole.pop(0)
            done.append(work(stack.index, tensors) if start < stop else self._none(gives))
        self._own = [
            [spread.regions[self._me].of(d).clone() for d, spread in zip(tensors, spreads, strict=True)]
            for tensors, spreads in zip(done, self._gives, strict=True)
        ]
        leg = self._bucket.going
        parts = [b.region.of(done[b.stack][b.tensor]) for b in leg.sent]
        del done
        self._start(leg, parts)

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

    def arrive(self, at_once: int | None) -> Iterator[tuple[Stack, Tensors]]:
        """Wait for this rank's parts of all matrices, and yield them, at most so many elements at a time."""
        assert self._work is not None, "it has gone"
        self._work.wait()
        self._work = None
        there: list[list[tuple[_Block, Tensor]]] = [[] for _ in self._bucket.stacks]
        for block, part in zip(self._bucket.going.received, self._received, strict=True):
            there[block.stack].append((block, part))
        own, self._own, self._received = self._own, [], []
        for s, (stack, spreads) in enumerate(zip(self._bucket.stacks, self._gives, strict=True)):
            regions, count = [spread.regions[self._me] for spread in spreads], stack.stop - stack.start
            for tensor, (x, region) in enumerate(zip(own[s], regions, strict=True)):
                there[s].append((_Block(s, tensor, self._me, *self._bucket.mine[s], region), x))
            elements = sum(region.numel for region in regions)
            step = max(1, at_once // max(1, elements)) if at_once else count
            for start in range(0, count, step):
                stop = min(start + step, count)
                local = [
                    x.new_empty((stop - start, *region.shape))
                    for x, region in zip(own[s], regions, strict=True)
                ]
                targets, parts = Tensors(), Tensors()
                for block, part in there[s]:
                    low, high = max(start, block.start), min(stop, block.stop)
                    if low < high:
                        targets.append(local[block.tensor][low - start : high - start])
                        parts.append(part[low - block.start : high - block.start])
                if parts:
                    torch._foreach_copy_(targets, parts)
                yield Stack(stack.index, stack.start + start, stack.start + stop), local


def _views(flat: Tensor, blocks: Sequence[_Block]) -> Tensors:
    """Return the parts of a flat buffer that blocks have, one after the other."""
    parts = flat.split([math.prod(block.shape) for block in blocks])
    return [part.view(block.shape) for part, block in zip(parts, blocks, strict=True)]
