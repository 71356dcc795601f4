"""Means over the replicas that are under way: in legs, each a collective, while something else is done."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from curvadion.sharding.flat import Cut
from curvadion.sharding.group import Work
from curvadion_kernels import Ops


class Codec(Protocol):
    """What rounds a flat buffer to bytes; `curvadion.consensus.codec` has them.

    Attributes:
        block: the length of a buffer must be a multiple of it.
        bits_per_value: on the wire, scales included.
    """

    @property
    def block(self) -> int: ...

    @property
    def bits_per_value(self) -> float: ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes (uint8) of a flat tensor, those of each block together, in order."""

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of such bytes, flat."""


@runtime_checkable
class Fused(Codec, Protocol):
    """A codec with operations of the kernels, which spare passes over the buffers."""

    def on(self, ops: Ops) -> "Fused":
        """Return the same codec with operations from this place."""

    def encode_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Do what `round_` says, at once."""

    def decode_(self, values: Tensor, payloads: Tensor) -> None:
        """Replace the values by the mean of those of the payloads, one a row, which may lie apart."""


# Blocks are rounded by so many values at a time, so that what a codec needs on its way stays small.
CHUNK = 1 << 22


def _chunk(codec: Codec) -> int:
    return max(1, CHUNK // codec.block) * codec.block


def round_(codec: Codec, residual: Tensor, x: Tensor) -> Tensor:
    """Return the bytes of residual + x, and make what they lack the residual.

    Args:
        residual: flat, its length a multiple of the codec's block.
        x: flat, at most as long; behind its end nothing is added.
    """
    payloads, begin = [], 0
    for kept in residual.split(_chunk(codec)):
        part = x[begin : begin + len(kept)]
        begin += len(kept)
        if isinstance(codec, Fused):
            payloads.append(codec.encode_(kept, part))
            continue
        kept[: len(part)].add_(part)
        payloads.append(codec.encode(kept))
        kept.sub_(codec.decode(payloads[-1], kept.dtype))
    return torch.cat(payloads) if len(payloads) > 1 else payloads[0]


def unrounded(codec: Codec, payload: Tensor, length: int, dtype: torch.dtype, count: int = 1) -> Tensor:
    """Return the mean of the values of `count` payloads of flat tensors of this length, one behind the
    other."""
    values = payload.new_empty(length, dtype=dtype)
    blocks = payload.view(count, length // codec.block, -1)
    chunk = _chunk(codec)
    for mean, rows in zip(values.split(chunk), blocks.split(chunk // codec.block, dim=1), strict=True):
        if isinstance(codec, Fused):
            codec.decode_(mean, rows.flatten(1))
            continue
        mean.copy_(codec.decode(rows[0].reshape(-1), dtype))
        for row in rows[1:]:
            mean.add_(codec.decode(row.reshape(-1), dtype))
        mean.div_(count)
    return values


class Residuals:
    """What rounding has kept back so far (error feedback), one pair of flat buffers for each buffer that is
    sent.

    The first is what this replica's own contribution lacks, the second what the mean lacks in the part that
    this replica rounds for all.

    Attributes:
        pairs: one for each buffer.
        in_use: on all ranks alike, also on those that hold nothing of any buffer.
        given: the share of the first that this replica's tensors have been moved by, so that it is in what
            they send next.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.given = 0.0
        self._place: tuple[int, int] | None = None  # this replica's, among how many

    @property
    def in_use(self) -> bool:
        return self._place is not None

    def take_back(self, share: float = 1.0) -> None:
        """mine <- (1 - share given) mine: what is in the tensors, of which `share` is sent, is owed there
        alone."""
        if self.given:
            for mine, _ in self.pairs:
                mine.mul_(1 - share * self.given)
            self.given = 0.0

    def belong(self, rank: int, replicas: int) -> None:
        """Make them those of this replica among so many. Where it was another one, or among others, parts
        have other bounds and owners from now on: what the mean lacked goes into this replica's own."""
        if self._place not in (None, (rank, replicas)):
            self.fold(replicas)
        self._place = rank, replicas

    def fold(self, replicas: int) -> None:
        """mine <- mine + K ours, ours <- 0, so that the mean over so many replicas is to lack the same."""
        if self._place is None:
            return
        rank, _ = self._place
        for number, (mine, ours) in enumerate(self.pairs):
            mine[rank * len(ours) : (rank + 1) * len(ours)].add_(ours, alpha=replicas)
            self.pairs[number] = mine, ours[:0]

    def of(self, number: int, mine: int, ours: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pair of the buffer with this number, of these lengths; zeros at first."""
        if number == len(self.pairs):
            self.pairs.append((like.new_zeros(0), like.new_zeros(0)))
        pair = self.pairs[number]
        self.pairs[number] = _resized(pair[0], mine, like), _resized(pair[1], ours, like)
        return self.pairs[number]

    def copy(self) -> "Residuals":
        """Return the same, in memory of its own."""
        other = Residuals()
        other.pairs = [(mine.clone(), ours.clone()) for mine, ours in self.pairs]
        other.given, other._place = self.given, self._place
        return other

    def become(self, other: "Residuals") -> None:
        """Be what another is."""
        self.pairs, self.given, self._place = other.pairs, other.given, other._place

    def clear(self) -> None:
        """Forget them."""
        self.become(Residuals())


def _resized(x: Tensor, length: int, like: Tensor) -> Tensor:
    """Return a buffer of this length: what is cut off or put on is padding."""
    if len(x) == length:
        return x
    other = like.new_zeros(length)
    other[: len(x)] = x[:length]
    return other


class Replicas(Protocol):
    """What a journey asks of the exchange."""

    @property
    def replicas(self) -> int: ...

    def over_replicas(
        self, collective: str, purpose: str, *args: Tensor | ReduceOp.RedOpType, wait: bool = False
    ) -> Work:
        """Count a collective over the replicas, and start it."""


class Journey(Protocol):
    """A flat buffer on its way to its mean over the replicas; its first leg has started.

    Attributes:
        legs: how often it travels.
    """

    legs: int

    def next_leg(self) -> Tensor | None:
        """Wait for the leg that is under way; return the mean, or start the next leg."""

    def wait(self) -> None:
        """Wait for the leg that is under way, and do nothing with what has come."""


class Nothing:
    """A buffer that is its own mean, as an empty one is: as many legs as the others, because what follows
    involves ranks that have something."""

    def __init__(self, piece: Tensor, legs: int):
        self._piece, self._left, self.legs = piece, legs, legs

    def next_leg(self) -> Tensor | None:
        self._left -= 1
        return None if self._left else self._piece

    def wait(self) -> None:
        """Return: nothing is under way."""


class Mean:
    """One all-reduce, in `payload_dtype`; without copy the piece may be overwritten."""

    legs = 1

    def __init__(
        self,
        exchange: Replicas,
        piece: Tensor,
        purpose: str,
        payload_dtype: torch.dtype | None,
        copy: bool,
        wait: bool = False,
    ):
        self._sent, self._dtype = piece.to(payload_dtype or piece.dtype, copy=copy), piece.dtype
        self._replicas = exchange.replicas
        self._work = exchange.over_replicas("all_reduce", purpose, self._sent, ReduceOp.SUM, wait=wait)

    def next_leg(self) -> Tensor:
        self._work.wait()
        return self._sent.to(self._dtype).div_(self._replicas)

    def wait(self) -> None:
        self._work.wait()


class RoundedMean:
    """Each replica its part of the mean, then all parts to all, in a codec's bytes and with error feedback.

    While it is under way it holds bytes only.
    """

    legs = 2

    def __init__(
        self, exchange: Replicas, piece: Tensor, purpose: str, codec: Codec, number: int, kept: Residuals
    ):
        self._exchange, self._purpose, self._codec = exchange, purpose, codec
        self._numel, self._dtype = piece.numel(), piece.dtype
        self._length = self._numel + -self._numel % (codec.block * exchange.replicas)
        mine, self._ours = kept.of(number, self._length, self._length // exchange.replicas, piece)
        self._sent = round_(codec, mine, piece)
        self._received: Tensor | None = torch.empty_like(self._sent)
        self._work = exchange.over_replicas("all_to_all", purpose, self._received, self._sent)

    def next_leg(self) -> Tensor | None:
        self._work.wait()
        if self._received is None:
            return unrounded(self._codec, self._sent, self._length, self._dtype)[: self._numel]
        replicas = self._exchange.replicas
        part = unrounded(self._codec, self._received, len(self._ours), self._dtype, replicas)
        self._received = None
        part = round_(self._codec, self._ours, part)
        self._work = self._exchange.over_replicas("all_gather", self._purpose, self._sent, part)
        return None

    def wait(self) -> None:
        self._work.wait()


class AtHome:
    """A buffer that goes nowhere, for there is one replica: made when it is asked for, unless it is kept."""

    legs = 1

    def __init__(self, make: Callable[[], Tensor], own: Tensor | None):
        self._make, self._own = make, own

    def next_leg(self) -> Tensor:
        return self._make() if self._own is None else self._own.clone()

    def wait(self) -> None:
        """Return: nothing is under way."""


class Arrival(NamedTuple):
    """A buffer whose mean is there.

    Attributes:
        indices: of the tensors in it.
        mean: flat, to do with as one likes.
        own: what this replica put in, if it was to be kept.
        residual: what rounding keeps back of it, to be read, if it was to be shown and there is any.
    """

    indices: list[int]
    mean: Tensor
    own: Tensor | None
    residual: Tensor | None


@dataclass
class _Trip:
    """A buffer under way.

    Attributes:
        own: what this replica put in, None if it is not to be kept.
        residual: of this rank's piece, None if it is not to be shown.
        mean: what came of it, if it arrived before it was asked for.
    """

    cut: Cut
    journey: Journey
    own: Tensor | None
    residual: Tensor | None
    mean: Tensor | None = None


class UnderWay:
    """A mean over the replicas that travels in legs, while something else is done.

    The first leg has started. All ranks call `start_next_leg` and exhaust `arrivals` at the same places among
    their collectives.

    Args:
        join: gathers a buffer from the pieces of it that the ranks of a replica hold.
    """

    def __init__(self, join: Callable[[Cut, Tensor], Tensor]):
        self._join = join
        self._trips: deque[_Trip] = deque()

    def add(self, cut: Cut, journey: Journey, own: Tensor | None, residual: Tensor | None) -> None:
        """Take along one more buffer."""
        self._trips.append(_Trip(cut, journey, own, residual))

    def start_next_leg(self) -> None:
        """Wait for the leg that is under way, and start the next one if there is one."""
        for trip in self._trips:
            if trip.mean is None and (mean := trip.journey.next_leg()) is not None:
                trip.mean = self._join(trip.cut, mean)

    def come_home(self) -> None:
        """Wait for all legs; what has come stays bytes until `arrivals`."""
        for leg in range(1, max((trip.journey.legs for trip in self._trips), default=1)):
            for trip in self._trips:
                if leg < trip.journey.legs:
                    trip.journey.next_leg()
        for trip in self._trips:
            trip.journey.wait()

    def arrivals(self) -> Iterator[Arrival]:
        """Wait for all of it, and yield buffer by buffer what came, while those after it are still bytes."""
        while self._trips:
            for _ in range(len(self._trips)):
                trip = self._trips.popleft()
                whole = trip.mean
                if whole is None and (mean := trip.journey.next_leg()) is not None:
                    whole = self._join(trip.cut, mean)
                    del mean
                if whole is None:
                    self._trips.append(trip)
                    continue
                left = None if trip.residual is None else self._join(trip.cut, trip.residual)
                arrival = Arrival(trip.cut.indices, whole, trip.own, left)
                del trip, whole, left
                yield arrival
                del arrival

    def let_pass(self) -> None:
        """Wait for what is left of it, and want none of it."""
        for _ in self.arrivals():
            pass
