"""The only module that talks to other ranks. Counts every call and byte, by axis and purpose.

Who calls what, in which order, in one optimizer step. All ranks of all replicas run the same list; they branch only on the reduced
gate key, and a missing gradient contributes zeros.

    1. if due: agreement         MAX of six int64 over the replicas, then over the shards
    2. if any: partial gradients SUM over the axes they are partial on
    3. norms and flags           one SUM over all shards
    4. gate                      one MAX of one int64 over the replicas; with gate_lag a local step reads it in the next step
    5. synchronized step         parameters, moments     mean over replicas   (only if a local step happened since)
                                 Q                       replica 0's          (only if a local Dion step happened since)
                                 P                       sum over shards, mean over replicas
                                 Gram matrices           two SUMs over the shards of P's rows ("qr": the whole P instead)
                                 R                       sum over shards, mean over replicas
                                 column norms            one SUM over the shards of R's rows
                                 Gram matrices           two SUMs over the shards of R's rows (right_factor="qr" only)
                                 AdamW and Lion gradients mean over replicas
       local step                "dion" matrices: P, Gram, R, column norms as above, over the shards only
                                 "muon" matrices: the short side gathered; norms and in each round Gram matrices, one SUM over the shards
                                                         of the long side
       synchronized step with consensus="outer": a local step, then
                                 pseudo-gradients        mean over replicas: one SUM in 32 bits; in fewer, each replica its part of
                                                         the mean (all-to-all), then all parts to all (all-gather); with outer_delay
                                                         the first is sent in this step, the second half of the delay later

What crosses the replicas leaves each replica once, not once per shard rank: a factor that is a partial sum on S shard ranks is
reduce-scattered over them, a tensor that is copied on them is sliced, each rank exchanges its piece with its peers in the other
replicas, and the pieces are gathered inside the replica. Flat buffers: one call per set of axes and dtype, whatever the number of
matrices, in buckets of at most BUCKET_BYTES. A sum over several axes is one collective after the other, so that the groups of the
DeviceMesh suffice and none has to be made.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from curvadion.layout import Axes, ShardMesh
from curvadion.payload import BLOCK, Codec, padded

BUCKET_BYTES = 1 << 28

# torch 2.13 renamed these two; 2.11 has the old names only.
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_all_to_all: Callable[..., Any] = dist.all_to_all_single

# Yields when something was sent that it would have to wait for; returns what came of it.
Legs = Generator[None, None, Tensor]
Key = tuple[str, str]
PURPOSES = {
    "replicate": (
        *("check", "gate", "factors", "gradients", "parameters", "pseudo_gradients", "moments", "right_factor", "momentum", "norms"),
    ),
    "shard": (
        *("check", "partial_gradients", "norms", "gram", "column_norms"),
        # their legs inside a replica
        *("factors", "gradients", "parameters", "pseudo_gradients", "moments", "right_factor", "momentum"),
    ),
}


# How often a byte of the buffer that a rank hands to a collective of k ranks leaves it, on average over the ranks, with the algorithms that
# move the least (ring, pairwise exchange): Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.
WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda k: 2 * (k - 1) / k,
    "reduce_scatter": lambda k: (k - 1) / k,
    "all_gather": lambda k: k - 1,
    "all_to_all": lambda k: (k - 1) / k,
    "broadcast": lambda k: (k - 1) / k,
}


def _nothing_yet() -> dict[Key, int]:
    return {(axis, purpose): 0 for axis, purposes in PURPOSES.items() for purpose in purposes}


def _nothing_sent() -> dict[Key, float]:
    return dict.fromkeys(_nothing_yet(), 0.0)


@dataclass
class Ledger:
    """Calls and bytes of this rank by (axis, purpose), axis "replicate" or "shard"; the same keys on every rank.

    Attributes:
        calls: collectives.
        bytes: of the buffers that this rank handed to them.
        wire: bytes that leave this rank for it, see `WIRE`: what collectives of different kinds can be compared by.
        last_step, last_step_wire: `bytes` and `wire` of the last step.
    """

    calls: dict[Key, int] = field(default_factory=_nothing_yet)
    bytes: dict[Key, int] = field(default_factory=_nothing_yet)
    wire: dict[Key, float] = field(default_factory=_nothing_sent)
    last_step: dict[Key, int] = field(default_factory=_nothing_yet)
    last_step_wire: dict[Key, float] = field(default_factory=_nothing_sent)
    _before: tuple[dict[Key, int], dict[Key, float]] = field(default_factory=lambda: (_nothing_yet(), _nothing_sent()))

    def record(self, collective: str, ranks: int, axis: str, purpose: str, sent: Tensor) -> None:
        """Count one collective of `ranks` ranks."""
        nbytes = sent.numel() * sent.element_size()
        self.calls[axis, purpose] += 1
        self.bytes[axis, purpose] += nbytes
        self.wire[axis, purpose] += nbytes * WIRE[collective](ranks)

    def begin_step(self) -> None:
        """Remember the totals; `end_step` counts from here."""
        self._before = dict(self.bytes), dict(self.wire)

    def end_step(self) -> None:
        """Make `last_step` and `last_step_wire` what was sent since `begin_step`."""
        before, before_wire = self._before
        self.last_step = {key: total - before[key] for key, total in self.bytes.items()}
        self.last_step_wire = {key: total - before_wire[key] for key, total in self.wire.items()}


class Residuals:
    """What rounding has kept back so far (error feedback), one pair of flat buffers for each buffer that is sent.

    The first is what this replica's own contribution lacks, the second what the mean lacks in the part that this replica rounds for all.
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


class UnderWay:
    """A mean over the replicas that travels in legs, while something else is done.

    The first leg starts at once. All ranks call `start_next_leg` and `arrived` at the same places among their collectives.
    """

    def __init__(self, legs: Generator[None, None, list[Tensor]]):
        self._legs: Generator[None, None, list[Tensor]] | None = legs
        self._mean: list[Tensor] = []
        self.start_next_leg()

    def start_next_leg(self) -> None:
        """Wait for the leg that is under way, and start the next one if there is one."""
        if self._legs is not None:
            try:
                next(self._legs)
            except StopIteration as end:
                self._legs, self._mean = None, end.value

    def arrived(self) -> list[Tensor]:
        """Wait for all of it, and return the mean."""
        while self._legs is not None:
            self.start_next_leg()
        return self._mean


@dataclass
class Answer:
    """The reduced gate key on its way to the host.

    Attributes:
        key: where it will be.
        wait: returns when it is there; None if it is there already.
    """

    key: Tensor
    wait: Callable[[], object] | None = None

    def read(self) -> int:
        """Wait for the key, and return it."""
        if self.wait is not None:
            self.wait()
        return int(self.key)


@dataclass(frozen=True)
class _Cut:
    """How a flat buffer was cut up inside a replica, so that each rank sends its piece.

    Attributes:
        indices: of the tensors in the buffer.
        split, copies: axes along which it was cut, because it was a partial sum or the same there.
        parts: what is left after each of these cuts.
    """

    indices: list[int]
    split: Axes
    copies: Axes
    parts: list["_Part"]


@dataclass(frozen=True)
class _Part:
    """One of `parts` equal pieces of a flat buffer of `numel` elements; the last ones may be short or empty."""

    numel: int
    parts: int
    index: int

    @property
    def chunk(self) -> int:
        return -(-self.numel // self.parts)

    @property
    def length(self) -> int:
        return max(0, min(self.chunk, self.numel - self.index * self.chunk))

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of the buffer."""
        return flat.narrow(0, min(self.index * self.chunk, self.numel), self.length)


class Collectives:
    """Sums over the shards of one replica, means over the replicas.

    Args:
        shards: the mesh of one replica.
        replicate_group: this rank's peers in all replicas; None for one replica.
        device: where small messages live.
        ledger: where to count.
    """

    def __init__(self, shards: ShardMesh, replicate_group: ProcessGroup | None, device: torch.device, ledger: Ledger):
        self.shards = shards
        self.device = device
        self.ledger = ledger
        self._group = replicate_group
        self._aside: torch.cuda.Stream | None = None
        self.replicas = dist.get_world_size(replicate_group) if replicate_group is not None else 1

    # ---- inside one replica

    def sum_over_shards(self, tensors: Sequence[Tensor], axes: Sequence[Axes], purpose: str) -> list[Tensor]:
        """Return each tensor summed over its axes, in flat buffers; the same object where it has none."""
        result = list(tensors)
        for (over,), indices in _buckets(tensors, [(a,) for a in axes]):
            if over:
                flat = _flatten(tensors, indices)
                for axis in over:
                    self._all_reduce(flat, self.shards.group(axis), ReduceOp.SUM, ("shard", purpose))
                _unflatten(flat, tensors, indices, result)
        return result

    def sum_over_all_shards(self, tensor: Tensor, purpose: str) -> Tensor:
        """Return the tensor summed over the whole replica."""
        return self.sum_over_shards([tensor], [self.shards.axes], purpose)[0]

    # ---- between replicas

    def mean_over_replicas(
        self,
        tensors: Sequence[Tensor],
        partial: Sequence[Axes],
        copied: Sequence[Axes],
        purpose: str,
        *,
        payload_dtype: torch.dtype | None = None,
        keep_own: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return (own, mean): each tensor summed over the axes where it is partial, and the mean of that over the replicas.

        Args:
            partial: for each tensor, the axes over which it is a partial sum.
            copied: for each tensor, the axes over which it is the same.
            payload_dtype: dtype on the wire between replicas, None for the tensor's own.
            keep_own: whether the caller wants `own`; without it, `own` is unspecified.
        """
        if self.replicas == 1:
            own = self.sum_over_shards(tensors, partial, purpose)
            return own, own

        own, mean = list(tensors), list(tensors)
        for cut, whole, piece in self._pieces(tensors, partial, copied, purpose):
            mean_of_piece = _to_the_end(self._mean(piece, purpose, payload_dtype, copy=keep_own))
            _unflatten(self._join(cut, mean_of_piece, purpose), tensors, cut.indices, mean)
            if keep_own:
                _unflatten(self._gather(whole, cut.split, cut.parts[: len(cut.split)], purpose), tensors, cut.indices, own)
        return own, mean

    def average_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str) -> None:
        """Replace tensors by their mean over the replicas, one bucket after the other."""
        if self.replicas > 1:
            self._replace(tensors, copied, purpose, lambda piece: _to_the_end(self._mean(piece, purpose)))

    def start_mean_over_replicas(
        self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str, codec: Codec | None, residuals: Residuals
    ) -> UnderWay:
        """Send tensors on their way to their mean over the replicas, in few bits: bitwise the same in all replicas.

            c_i  = C(d_i + e_i),        e_i <- d_i + e_i - c_i              first leg: the k-th part of c_i to replica k,
            mean = C(E_i[c_i] + f),     f   <- E_i[c_i] + f - mean          second: which rounds the mean of that part and sends it to all

        Each replica sends what an all-reduce of so many bits would send. Compute and residuals are in the tensors' dtype.

        Args:
            tensors: d_i, local shards.
            copied: for each tensor, the axes over which it is the same.
            codec: C; None to round nothing: one all-reduce, one leg.
            residuals: e_i and f; the same object for the same list of tensors.
        """

        def legs() -> Generator[None, None, list[Tensor]]:
            result, numbers = list(tensors), itertools.count()
            if self.replicas == 1:
                return result
            residuals.in_use = codec is not None

            def bring(cut: _Cut, piece: Tensor) -> Generator[None, None, None]:
                legs = self._rounded_mean(piece, purpose, codec, residuals, numbers) if codec else self._mean(piece, purpose)
                del piece  # what is under way holds no more than it must
                _unflatten(self._join(cut, (yield from legs), purpose), tensors, cut.indices, result)

            def goes_on(journey: Generator[None, None, None]) -> bool:
                return next(journey, True) is None

            journeys = (bring(cut, piece) for cut, _, piece in self._pieces(tensors, [()] * len(tensors), copied, purpose))
            under_way = [journey for journey in journeys if goes_on(journey)]
            while under_way:
                yield
                under_way = [journey for journey in under_way if goes_on(journey)]
            return result

        return UnderWay(legs())

    def settle_residuals_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], residuals: Residuals) -> None:
        """x_i <- x_i - e_i - K f, so that the mean of the x_i lacks nothing any more; residuals become zero. No communication
        between replicas."""
        if not residuals.in_use:
            return
        pairs = iter(residuals.pairs)

        def settle(piece: Tensor) -> Tensor:
            mine, ours = next(pairs)
            start = dist.get_rank(self._group) * len(ours)
            mine[start : start + len(ours)].add_(ours, alpha=self.replicas)
            return piece - mine[: piece.numel()]

        self._replace(tensors, copied, "pseudo_gradients", settle)
        residuals.clear()

    def broadcast_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str) -> None:
        """Replace tensors by replica 0's."""

        def broadcast(piece: Tensor) -> Tensor:
            self.ledger.record("broadcast", self.replicas, "replicate", purpose, piece)
            dist.broadcast(piece, group=self._group, group_src=0)
            return piece

        if self.replicas > 1:
            self._replace(tensors, copied, purpose, broadcast)

    def max_over_replicas(self, key: Tensor) -> Tensor:
        """Return the MAX of the gate key over the replicas."""
        if self.replicas > 1:
            self._all_reduce(key, self._group, ReduceOp.MAX, ("replicate", "gate"))
        return key

    def start_max_over_replicas(self, key: Tensor) -> Answer:
        """Start the MAX of the gate key over the replicas."""
        sent = key.clone()
        if self.replicas == 1:
            return Answer(sent)
        if not key.is_cuda:
            return Answer(sent, self._all_reduce(sent, self._group, ReduceOp.MAX, ("replicate", "gate"), async_op=True).wait)
        self._aside = self._aside or torch.cuda.Stream(key.device)  # so that the host can wait for it and not for what the device does
        self._aside.wait_stream(torch.cuda.current_stream(key.device))
        with torch.cuda.stream(self._aside):
            self._all_reduce(sent, self._group, ReduceOp.MAX, ("replicate", "gate"), async_op=True).wait()
            host = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
            host.copy_(sent, non_blocking=True)
            sent.record_stream(self._aside)
            return Answer(host, self._aside.record_event().synchronize)

    def agree(self, step: int, config: int, weights: int) -> list[str]:
        """Return which of step, config and weights differ somewhere: the same answer on every rank.

        MAX of x and of -x over the replicas, then over the shards; only the peers in other replicas hold comparable weights.
        """
        message = torch.tensor([step, -step, config, -config, weights, -weights], dtype=torch.int64)
        message = message.to(self.device)
        if self.replicas > 1:
            self._all_reduce(message, self._group, ReduceOp.MAX, ("replicate", "check"))
        different = int(message[4] != -message[5])
        message[4], message[5] = different, -different
        for axis in self.shards.axes:
            self._all_reduce(message, self.shards.group(axis), ReduceOp.MAX, ("shard", "check"))
        found = message.tolist()
        names = [("step", found[0] != -found[1]), ("config", found[2] != -found[3]), ("weights", found[4] != 0)]
        return [name for name, differs in names if differs]

    # ---- how it is done

    def _mean(self, piece: Tensor, purpose: str, payload_dtype: torch.dtype | None = None, *, copy: bool = False) -> Legs:
        """Return the mean over the replicas; without copy the piece may be overwritten."""
        if not piece.numel():  # one leg all the same: what follows involves ranks that have something to send
            yield
            return piece
        sent = piece.to(payload_dtype or piece.dtype, copy=copy)
        work = self._all_reduce(sent, self._group, ReduceOp.SUM, ("replicate", purpose), async_op=True)
        yield
        work.wait()
        return sent.to(piece.dtype).div_(self.replicas)

    def _rounded_mean(self, piece: Tensor, purpose: str, codec: Codec, residuals: Residuals, numbers: Iterator[int]) -> Legs:
        """Return what `start_mean_over_replicas` says, for the buffer with the next number."""
        if not piece.numel():
            yield
            yield
            return piece
        numel, dtype = piece.numel(), piece.dtype
        flat = padded(piece, BLOCK * self.replicas)
        mine, ours = residuals.of(next(numbers), flat.numel(), flat.numel() // self.replicas, flat)
        mine.add_(flat)
        del piece, flat  # so that what is under way holds bytes only
        sent = codec.encode(mine)
        mine.sub_(codec.decode(sent, dtype))
        received = torch.empty_like(sent)
        self.ledger.record("all_to_all", self.replicas, "replicate", purpose, sent)
        work = _all_to_all(received, sent, group=self._group, async_op=True)
        yield
        work.wait()
        ours.add_(codec.decode(received, dtype).view(self.replicas, -1).mean(0))
        part = codec.encode(ours)
        ours.sub_(codec.decode(part, dtype))
        self.ledger.record("all_gather", self.replicas, "replicate", purpose, part)
        work = _all_gather(sent, part, group=self._group, async_op=True)
        yield
        work.wait()
        return codec.decode(sent, dtype)[:numel]

    def _replace(self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str, exchange: Callable[[Tensor], Tensor]) -> None:
        for cut, _, piece in self._pieces(tensors, [()] * len(tensors), copied, purpose):
            values = list(tensors)
            _unflatten(self._join(cut, exchange(piece) if piece.numel() else piece, purpose), tensors, cut.indices, values)
            torch._foreach_copy_([tensors[i] for i in cut.indices], [values[i] for i in cut.indices])

    def _pieces(
        self, tensors: Sequence[Tensor], partial: Sequence[Axes], copied: Sequence[Axes], purpose: str
    ) -> Iterator[tuple[_Cut, Tensor, Tensor]]:
        """Yield, for each flat buffer, how it was cut, what summing over the `partial` axes leaves of it here, and this rank's piece of
        that; the same piece is with its peers in the other replicas, also if it is empty."""
        for (split, copies), indices in _buckets(tensors, list(zip(partial, copied, strict=True))):
            mine = _flatten(tensors, indices)
            parts = []
            for axis in split:
                parts.append(self._part(mine.numel(), axis))
                mine = self._scatter_sum(mine, axis, parts[-1], purpose)
            piece = mine
            for axis in copies:
                parts.append(self._part(piece.numel(), axis))
                piece = parts[-1].of(piece)
            yield _Cut(indices, split, copies, parts), mine, piece

    def _join(self, cut: _Cut, piece: Tensor, purpose: str) -> Tensor:
        """Return the buffer of which this is the piece."""
        return self._gather(piece, [*cut.split, *cut.copies], cut.parts, purpose)

    def _part(self, numel: int, axis: int) -> _Part:
        group = self.shards.group(axis)
        return _Part(numel, dist.get_world_size(group), dist.get_rank(group))

    def _scatter_sum(self, flat: Tensor, axis: int, part: _Part, purpose: str) -> Tensor:
        """Return this rank's part of the sum of the flat buffers."""
        flat = _pad(flat, part.chunk * part.parts)
        piece = flat.new_empty(part.chunk)
        self.ledger.record("reduce_scatter", part.parts, "shard", purpose, flat)
        _reduce_scatter(piece, flat, group=self.shards.group(axis))
        return piece[: part.length]

    def _gather(self, piece: Tensor, axes: Sequence[int], parts: Sequence[_Part], purpose: str) -> Tensor:
        """Return the buffer of which the pieces are the parts, taken along one axis after the other."""
        for axis, part in reversed(list(zip(axes, parts, strict=True))):
            piece = _pad(piece, part.chunk)
            whole = piece.new_empty(part.parts * part.chunk)
            self.ledger.record("all_gather", part.parts, "shard", purpose, piece)
            _all_gather(whole, piece, group=self.shards.group(axis))
            piece = whole[: part.numel]
        return piece

    def _all_reduce(self, tensor: Tensor, group: ProcessGroup | None, op: ReduceOp.RedOpType, key: Key, *, async_op: bool = False) -> Any:
        """Count and start it; return what waits for it if it is asynchronous."""
        self.ledger.record("all_reduce", dist.get_world_size(group), *key, tensor)
        return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def _to_the_end(legs: Legs) -> Tensor:
    """Go all legs, one after the other, and return what came of it."""
    while True:
        try:
            next(legs)
        except StopIteration as end:
            return end.value


def _buckets(tensors: Sequence[Tensor], keys: Sequence[tuple[Axes, ...]]) -> Iterator[tuple[tuple[Axes, ...], list[int]]]:
    """Yield (axes, indices of the tensors of one flat buffer), in an order that depends on axes, dtypes and sizes alone."""
    order: dict[tuple, list[int]] = {}
    for i, (t, key) in enumerate(zip(tensors, keys, strict=True)):
        order.setdefault((key, str(t.dtype)), []).append(i)
    for (key, _), indices in sorted(order.items()):
        bucket: list[int] = []
        size = 0
        for i in indices:
            nbytes = tensors[i].numel() * tensors[i].element_size()
            if bucket and size + nbytes > BUCKET_BYTES:
                yield key, bucket
                bucket, size = [], 0
            bucket.append(i)
            size += nbytes
        yield key, bucket


def _pad(flat: Tensor, numel: int) -> Tensor:
    """Return the buffer with zeros at its end, contiguous."""
    return torch.nn.functional.pad(flat, (0, numel - flat.numel())) if flat.numel() < numel else flat.contiguous()


def _flatten(tensors: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([tensors[i].reshape(-1) for i in indices])


def _unflatten(flat: Tensor, like: Sequence[Tensor], indices: Sequence[int], result: list[Tensor]) -> None:
    """Put views of the flat buffer, shaped like the tensors it was made of, into `result`."""
    start = 0
    for i in indices:
        end = start + like[i].numel()
        result[i] = flat[start:end].view(like[i].shape)
        start = end
