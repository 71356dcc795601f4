"""Means over the replicas that are under way: in legs, each a collective, while something else is done."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from curvadion.sharding.flat import Cut, pad, unflatten
from curvadion.sharding.group import Work


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
        """Return the bytes (uint8) of a flat tensor; those of each of `size` equal parts together, in
        order."""

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of such bytes, flat."""


class Residuals:
    """What rounding has kept back so far (error feedback), one pair of flat buffers for each buffer that is
    sent.

    The first is what this replica's own contribution lacks, the second what the mean lacks in the part that
    this replica rounds for all.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.in_use = False  # on all ranks alike, also on those that hold nothing of any buffer

    def of(self, number: int, mine: int, ours: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pair of the buffer with this number, of these lengths; zeros at first."""
        if number == len(self.pairs):
            self.pairs.append((like.new_zeros(mine), like.new_zeros(ours)))
        return self.pairs[number]

    def clear(self) -> None:
        """Forget them."""
        self.pairs.clear()
        self.in_use = False


class Replicas(Protocol):
    """What a journey asks of the exchange."""

    replicas: int

    def over_replicas(
        self, collective: str, purpose: str, *args: Tensor | ReduceOp.RedOpType, wait: bool = False
    ) -> Work:
        """Count a collective over the replicas, and start it."""


class Journey(Protocol):
    """A flat buffer on its way to its mean over the replicas; its first leg has started."""

    def next_leg(self) -> Tensor | None:
        """Wait for the leg that is under way; return the mean, or start the next leg."""


class Nothing:
    """An empty buffer: as many legs as the others, because what follows involves ranks that have
    something."""

    def __init__(self, piece: Tensor, legs: int):
        self._piece, self._left = piece, legs

    def next_leg(self) -> Tensor | None:
        self._left -= 1
        return None if self._left else self._piece


class Mean:
    """One all-reduce, in `payload_dtype`; without copy the piece may be overwritten."""

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


class RoundedMean:
    """Each replica its part of the mean, then all parts to all, in a codec's bytes and with error feedback.

    While it is under way it holds bytes only.

    Attributes:
        legs: how often it travels.
    """

    legs = 2

    def __init__(
        self, exchange: Replicas, piece: Tensor, purpose: str, codec: Codec, number: int, kept: Residuals
    ):
        self._exchange, self._purpose, self._codec = exchange, purpose, codec
        self._numel, self._dtype = piece.numel(), piece.dtype
        flat = pad(piece, piece.numel() + -piece.numel() % (codec.block * exchange.replicas))
        mine, self._ours = kept.of(number, flat.numel(), flat.numel() // exchange.replicas, flat)
        mine.add_(flat)
        del flat  # a full buffer, at the peak of memory
        self._sent = codec.encode(mine)
        mine.sub_(codec.decode(self._sent, self._dtype))
        self._received: Tensor | None = torch.empty_like(self._sent)
        self._work = exchange.over_replicas("all_to_all", purpose, self._received, self._sent)

    def next_leg(self) -> Tensor | None:
        self._work.wait()
        if self._received is None:
            return self._codec.decode(self._sent, self._dtype)[: self._numel]
        parts = self._codec.decode(self._received, self._dtype)
        self._received = None
        self._ours.add_(parts.view(self._exchange.replicas, -1).mean(0))
        del parts  # as large as the buffer, and not wanted any more
        part = self._codec.encode(self._ours)
        self._ours.sub_(self._codec.decode(part, self._dtype))
        self._work = self._exchange.over_replicas("all_gather", self._purpose, self._sent, part)
        return None


class UnderWay:
    """A mean over the replicas that travels in legs, while something else is done.

    The first leg has started. All ranks call `start_next_leg` and `arrived` at the same places among their
    collectives.

    Args:
        tensors: whose mean it is.
        join: gathers a buffer from the pieces of it that the ranks of a replica hold.
    """

    def __init__(self, tensors: Sequence[Tensor], join: Callable[[Cut, Tensor], Tensor]):
        self._tensors, self._join = tensors, join
        self._mean = list(tensors)
        self._journeys: list[tuple[Cut, Journey]] = []

    def add(self, cut: Cut, journey: Journey) -> None:
        """Take along one more buffer."""
        self._journeys.append((cut, journey))

    def start_next_leg(self) -> None:
        """Wait for the leg that is under way, and start the next one if there is one."""
        left = []
        for cut, journey in self._journeys:
            mean = journey.next_leg()
            if mean is None:
                left.append((cut, journey))
            else:
                whole = self._join(cut, mean)
                unflatten(whole, self._tensors, cut.indices, self._mean)
        self._journeys = left

    def arrived(self) -> list[Tensor]:
        """Wait for all of it, and return the mean."""
        while self._journeys:
            self.start_next_leg()
        return self._mean
