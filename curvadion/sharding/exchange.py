"""All that one rank tells others in a step. Counts every call and byte, by axis and purpose.

Who calls what, in which order, in one optimizer step. All ranks of all replicas run the same list; they
branch only on the reduced gate key, and a missing gradient contributes zeros.

    1. if due: agreement      MAX of six int64 over the replicas, then over the shards; after a MAX
                              of one over the replicas, with which a gate's key may be paired
    2. if partial: gradients  SUM over the axes they are partial on
    3. norms and flags        one SUM over all shards
    4. gate="drift"           if asked: SUM of two numbers over the shards, mean over the replicas
       gate                   one MAX of one int64 over the replicas; with gate_lag read one step later.
                              If it says that a rank could not do its part, with gate_lag=0: agreement, on
                              whether all could not
    5. synchronized step      parameters, moments      mean over replicas   (only after a local step)
                              Q                        replica 0's          (only after a local Dion step)
                              P                        sum over shards, mean over replicas
                              P                        where that is cheaper, to its owners and back: two
                                                       all-to-alls a bucket, see `owners`. First those with
                                                       owners among the ranks of all replicas (replica_gbit),
                                                       over all of them; then those with owners in the replica
                              Gram matrices            of other P, two SUMs over the shards of its rows ("qr":
                                                       all of P)
                              R                        sum over shards, mean over replicas
                              column norms             one SUM over the shards of R's rows
                              Gram matrices            two SUMs over the shards of R's rows ("qr" only)
                              AdamW, Lion gradients    mean over replicas
       local step             each rule's own, over the shards only, in the order of RULES:
                              "dion"                   P, Gram, R, column norms as above
                              "muon"                   matrices to their owners, updates back: two all-to-alls
                                                       a bucket, see `owners`. Where that is dearer: the short
                                                       side gathered; norms and in each round Gram matrices,
                                                       one SUM over the shards of the long side
                              "normuon"                as "muon"; norms of rows and of matrices: two SUMs
                                                       after each bucket
                              "dion2"                  norms of slices: summed, gathered; slices; as "muon"
       synchronized step with consensus="outer": a local step, then
                              pseudo-gradients         mean over replicas: one SUM in 32 bits; in fewer, each
                                                       replica its part of the mean (all-to-all), then all
                                                       parts to all (all-gather); with outer_delay the
                                                       first in this step, the second half of the delay
                                                       later

What crosses the replicas leaves each replica once, not once per shard rank: a factor that is a partial sum on
S shard ranks is reduce-scattered over them, a tensor that is copied on them is sliced, each rank exchanges
its piece with its peers in the other replicas, and the pieces are gathered inside the replica. A SUM whose
bits must be those that other groups of ranks get is an all-to-all and an all-gather where it has more than
two summands: backends promise an order of summation within one call, not from one group to the next. Flat
buffers: one call per set of axes and dtype, whatever the number of matrices, in buckets of at most
BUCKET_BYTES. A sum over several axes is one collective after the other, so that the groups of the DeviceMesh
suffice and none has to be made.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError, ReduceOp

from curvadion.sharding.crew import Crew
from curvadion.sharding.dry import has_no_values
from curvadion.sharding.flat import Cut, Part, buckets, flatten, pad, unflatten
from curvadion.sharding.group import AllToAll, Group, Work
from curvadion.sharding.journey import AtHome, Codec, Journey, Mean, Nothing, Residuals, RoundedMean, UnderWay
from curvadion.sharding.layout import ShardMesh
from curvadion.sharding.ledger import Key, Ledger
from curvadion.sharding.lost import Place, explained, meet
from curvadion.sharding.region import Axes
from curvadion_kernels.reference import CHECK_KEY


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
        """Wait for the key, and return it; in a dry run "local"."""
        if self.wait is not None:
            self.wait()
        return 0 if has_no_values(self.key) else int(self.key)


@dataclass
class Told:
    """A collective under way whose errors say what it was."""

    work: Work
    explain: Callable[[Exception], Exception | None]

    def wait(self) -> object:
        """Wait until its result may be used."""
        try:
            return self.work.wait()
        except (RuntimeError, DistError) as error:
            if (lost := self.explain(error)) is None:
                raise
            raise lost from error


class Exchange:
    """Sums over the shards of one replica, means over the replicas.

    Args:
        shards: the mesh of one replica.
        peers: this rank and its peers in the other replicas; None for one replica.
        device: where small messages live.
        ledger: where to count.

    Attributes:
        replicas: how many there are.
        place: where this rank is, for messages.
    """

    def __init__(self, shards: ShardMesh, peers: Group | None, device: torch.device, ledger: Ledger):
        self.shards = shards
        self.device = device
        self.ledger = ledger
        self._peers = peers
        self._aside: torch.cuda.Stream | None = None
        self.place = Place()

    @property
    def replicas(self) -> int:
        """How many replicas there are: always, or for the time being."""
        return self._peers.size if self._peers is not None else 1

    # ---- inside one replica

    def sum_over_shards(
        self, tensors: Sequence[Tensor], axes: Sequence[Axes], purpose: str, *, alike: bool = False
    ) -> list[Tensor]:
        """Return each tensor summed over its axes, in flat buffers; the same object where it has none.

        Args:
            alike: ranks that sum the same numbers in another group, such as another replica, must get the
                same bits.
        """
        result = list(tensors)
        for (over,), indices in buckets(tensors, [(a,) for a in axes]):
            if over:
                flat = flatten(tensors, indices)
                for axis in over:  # after the first, groups side by side sum the same numbers
                    flat = self._sum(flat, axis, purpose, alike=alike or axis != over[0])
                unflatten(flat, tensors, indices, result)
        return result

    def _sum(self, flat: Tensor, axis: int, purpose: str, *, alike: bool) -> Tensor:
        """Return the sum of the flat buffers along an axis; alike, in the order of the ranks."""
        part = self._part(flat.numel(), axis)
        if part.parts == 2 or not alike:
            self._along(axis, "all_reduce", purpose, flat, ReduceOp.SUM)
            return flat
        sent = pad(flat, part.chunk * part.parts)
        received = torch.empty_like(sent)
        self._along(axis, "all_to_all", purpose, received, sent)
        return self._gather(received.view(part.parts, -1).sum(0), [axis], [part], purpose)

    def sum_over_all_shards(self, tensor: Tensor, purpose: str, *, alike: bool = False) -> Tensor:
        """Return the tensor summed over the whole replica."""
        return self.sum_over_shards([tensor], [self.shards.axes], purpose, alike=alike)[0]

    def start_all_to_all(
        self,
        crew: Crew,
        sent: Tensor,
        sent_counts: Sequence[int],
        received: Tensor,
        received_counts: Sequence[int],
        purpose: str,
    ) -> Work:
        """Start sending each rank of a crew its part of a flat buffer, as many elements as said."""
        size = sent.element_size()
        inside = sum(n for n, near in zip(sent_counts, crew.inside, strict=True) if near)
        for axis, parts, there in (
            ("shard", sent[:inside], bool(self.shards.axes)),
            ("replicate", sent[inside:], crew.replicas > 1),
        ):
            if there:  # one call that two axes have a part of counts for both
                self.ledger.record("all_to_all_uneven", crew.size, axis, purpose, parts.nbytes)
        # As bytes, which every backend sends, whatever the dtype.
        sizes = ([n * size for n in received_counts], [n * size for n in sent_counts])
        flat = received.view(torch.uint8), sent.view(torch.uint8)
        return self._start(crew.group, "all_to_all", "shards", purpose, *flat, *sizes)

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
        """Return (own, mean): each tensor summed over the axes where it is partial, and the mean over
        replicas.

        Args:
            partial: for each tensor, the axes over which it is a partial sum.
            copied: for each tensor, the axes over which it is the same.
            payload_dtype: dtype on the wire between replicas, None for the tensor's own.
            keep_own: whether the caller wants `own`; without it, `own` is unspecified.
        """
        if self.replicas == 1:
            own = self.sum_over_shards(tensors, partial, purpose, alike=any(copied))
            return own, own

        own, mean = list(tensors), list(tensors)
        for cut, whole, piece in self._pieces(tensors, partial, copied, purpose):
            mean_of_piece = self._mean(piece, purpose, payload_dtype, copy=keep_own)
            unflatten(self.join(cut, mean_of_piece, purpose), tensors, cut.indices, mean)
            if keep_own:
                summed = self._gather(whole, cut.split, cut.parts[: len(cut.split)], purpose)
                unflatten(summed, tensors, cut.indices, own)
        return own, mean

    def average_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str) -> None:
        """Replace tensors by their mean over the replicas, one bucket after the other."""
        if self.replicas > 1:
            self._replace(tensors, copied, purpose, lambda piece: self._mean(piece, purpose))

    def start_mean_over_replicas(
        self,
        tensors: Sequence[Tensor],
        copied: Sequence[Axes],
        purpose: str,
        codec: Codec | None,
        kept: Residuals,
        journey: type[RoundedMean] = RoundedMean,
        *,
        make: Callable[[list[int]], Tensor] | None = None,
        keep_own: bool = False,
        show_residuals: bool = False,
    ) -> UnderWay:
        """Send tensors on their way to their mean over the replicas, in few bits: bitwise the same in all
        replicas.

            c_i  = C(d_i + e_i),        e_i <- d_i + e_i - c_i      first leg: k-th part of c_i to replica k,
            mean = C(E_i[c_i] + f),     f   <- E_i[c_i] + f - mean  second: which rounds the mean of it and
                                                                    sends it to all

        Each replica sends what an all-reduce of so many bits would send. Compute and residuals are in the
        tensors' dtype.

        Args:
            tensors: d_i, local shards; with `make` only their shapes and dtypes count.
            copied: for each tensor, the axes over which it is the same.
            codec: C; None to round nothing: one all-reduce, one leg.
            kept: e_i and f; the same object for the same list of tensors. If it says that the share `given`
                of e_i is in the d_i by now, e_i is as much less.
            journey: how a rounded buffer comes to its mean, where it is not as above.
            make: returns the flat buffer of the tensors with these indices; with one replica only when what
                arrived is asked for, unless `keep_own`.
            keep_own: whether the caller wants to see again what this replica put in.
            show_residuals: whether it wants to see e_i on arrival, where something was rounded; gathered
                inside the replica as the mean is.
        """
        make = make or partial(flatten, tensors)
        while True:
            before = kept.copy() if self.elastic else kept
            under_way = UnderWay(partial(self.join, purpose=purpose))
            for trip in self._departures(tensors, copied, purpose, codec, kept, journey, make, keep_own):
                under_way.add(*trip[:3], trip[3] if show_residuals else None)
            if not self.elastic:
                return under_way
            under_way.come_home()
            if self.settled():
                return under_way
            kept.become(before)  # and once more, between those that are left

    def _departures(
        self,
        tensors: Sequence[Tensor],
        copied: Sequence[Axes],
        purpose: str,
        codec: Codec | None,
        kept: Residuals,
        journey: type[RoundedMean],
        make: Callable[[list[int]], Tensor],
        keep_own: bool,
    ) -> Iterator[tuple[Cut, Journey, Tensor | None, Tensor | None]]:
        """Start the first legs; yield how each buffer was cut, its journey, what this replica put in, and
        the residual of this rank's piece."""
        if self.replicas == 1 and kept.in_use:  # alone by now: all that others were owed
            kept.take_back()
            kept.fold(1)
            pairs = iter(kept.pairs)
            for cut, _, piece in self._pieces(tensors, [()] * len(tensors), copied, purpose, make):
                owed = piece + next(pairs)[0][: piece.numel()] if piece.numel() else piece
                yield cut, Nothing(owed, legs=1), None, None
            kept.clear()
            return
        if self._peers is None or self.replicas == 1:
            for (_, _), indices in buckets(tensors, [((), ())] * len(tensors)):
                own = make(indices) if keep_own else None
                yield Cut(indices, (), (), []), AtHome(partial(make, indices), own), own, None
            return
        number, share = 0, self._peers.share
        kept.take_back(share)
        if codec is not None:
            kept.belong(self._peers.rank, self.replicas)
        for cut, flat, piece in self._pieces(tensors, [()] * len(tensors), copied, purpose, make):
            own = flat if keep_own else None
            if share != 1.0:
                piece = piece * share
            if not piece.numel():
                yield cut, Nothing(piece, legs=1 if codec is None else journey.legs), own, piece
            elif codec is None:
                yield cut, Mean(self, piece, purpose, None, copy=keep_own), own, None
            else:
                trip = journey(self, piece, purpose, codec, number, kept)
                yield cut, trip, own, kept.pairs[number][0][: piece.numel()]
                number += 1

    @property
    def elastic(self) -> bool:
        """Whether replicas may leave and come back."""
        return self._peers is not None and self._peers.elastic

    def settled(self) -> bool:
        """Return whether all that has crossed replicas since this was called last has come to its end on all
        ranks; if not, there are other replicas by now, and it has to be done again."""
        return self._peers is None or self._peers.settled()

    def settle_residuals_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], kept: Residuals) -> None:
        """x_i <- x_i - e_i - K f, so that the mean of the x_i lacks nothing any more; residuals become zero.

        No communication between replicas. Of e_i without the share `given`, which is in the x_i.
        """
        if not kept.in_use:
            return
        kept.take_back()
        kept.fold(self.replicas)
        pairs = iter(kept.pairs)

        def settle(piece: Tensor) -> Tensor:
            mine, _ = next(pairs)
            return piece - mine[: piece.numel()]

        self._replace(tensors, copied, "pseudo_gradients", settle)
        kept.clear()

    def broadcast_(self, tensors: Sequence[Tensor], copied: Sequence[Axes], purpose: str) -> None:
        """Replace tensors by replica 0's."""

        def broadcast(piece: Tensor) -> Tensor:
            self.over_replicas("broadcast", purpose, piece, wait=True)
            return piece

        if self.replicas > 1:
            self._replace(tensors, copied, purpose, broadcast)

    def max_over_replicas(self, key: Tensor, purpose: str = "gate") -> Tensor:
        """Return the MAX of the gate key over the replicas."""
        if self.replicas > 1:
            self.over_replicas("all_reduce", purpose, key, ReduceOp.MAX, wait=True)
        return key

    def announce_check(self) -> int:
        """Tell the replicas that `agree` is next, in the form of a gate key, with which it may be paired;
        return the MAX of what they had to say."""
        key = torch.tensor(CHECK_KEY, dtype=torch.int64, device=self.device)
        told = self.max_over_replicas(key, "check")
        return CHECK_KEY if has_no_values(told) else int(told)

    def start_max_over_replicas(self, key: Tensor) -> Answer:
        """Start the MAX of the gate key over the replicas."""
        sent = key.clone()
        if self.replicas == 1:
            return Answer(sent)
        if not key.is_cuda:
            return Answer(sent, self.over_replicas("all_reduce", "gate", sent, ReduceOp.MAX).wait)
        # A stream of its own, so that the host can wait for it and not for what the device does.
        self._aside = self._aside or torch.cuda.Stream(key.device)
        self._aside.wait_stream(torch.cuda.current_stream(key.device))
        with torch.cuda.stream(self._aside):
            self.over_replicas("all_reduce", "gate", sent, ReduceOp.MAX, wait=True)
            host = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
            host.copy_(sent, non_blocking=True)
            sent.record_stream(self._aside)
            return Answer(host, self._aside.record_event().synchronize)

    def agree(self, step: int, config: int, weights: int, *, seen: int = 1, gradients: int = 0) -> list[str]:
        """Return what holds somewhere, the same answer on every rank: "step", "config", "weights" differ;
        "no gradient" was seen by anybody; or "equal gradients" were, not all zero, by all replicas.

        MAX of x and of -x over the replicas, then over the shards; only the peers in other replicas hold
        comparable weights. Where steps are equal, so are the high bits of what carries them, and the low ones
        tell the largest `seen`; likewise weights and gradients. A dry run finds nothing.

        Args:
            weights, gradients: hashes; 31 bits of each are compared.
            seen: by this rank: 0, no gradient; 2, one that is not zero; else 1.
        """
        count, both = step << 2 | seen, weights >> 31 << 31 | gradients >> 31
        message = torch.tensor([count, -count, config, -config, both, -both], dtype=torch.int64)
        message = message.to(self.device)
        if self.replicas > 1:
            self.over_replicas("all_reduce", "check", message, ReduceOp.MAX, wait=True)
        most, least = message[4].clone(), -message[5]
        message[4], message[5] = (most >> 31 != least >> 31).to(message), (most != least).to(message)
        for axis in self.shards.axes:
            self._along(axis, "all_reduce", "check", message, ReduceOp.MAX)
        if has_no_values(message):
            return []
        found = message.tolist()
        holds = {
            "step": found[0] >> 2 != -found[1] >> 2,
            "config": found[2] != -found[3],
            "weights": found[4] != 0,
            "no gradient": found[0] & 3 == 0,
            "equal gradients": found[0] & 3 == 2 and not found[5] and self.replicas > 1,
        }
        return [name for name, does in holds.items() if does]

    def differing(self, hashes: Sequence[int]) -> list[int]:
        """Return the positions of the numbers that differ between replicas somewhere: the same on every
        rank."""
        message = torch.tensor([*hashes, *(-h for h in hashes)], dtype=torch.int64).to(self.device)
        if self.replicas > 1:
            self.over_replicas("all_reduce", "check", message, ReduceOp.MAX, wait=True)
        most, least = message.view(2, -1)
        differs = (most != -least).to(torch.int64)
        for axis in self.shards.axes:
            self._along(axis, "all_reduce", "check", differs, ReduceOp.MAX)
        return differs.nonzero().flatten().tolist()

    # ---- how it is done

    def over_replicas(
        self, collective: str, purpose: str, *args: Tensor | ReduceOp.RedOpType, wait: bool = False
    ) -> Work:
        """Count a collective over the replicas, and start it; the arguments are the `Group` method's."""
        assert self._peers is not None, "nothing crosses replicas where there is one"
        self._count(collective, self._peers, ("replicate", purpose), *args)
        return self._start(self._peers, collective, "replicas", purpose, *args, wait=wait)

    def _along(self, axis: int, collective: str, purpose: str, *args: Tensor | ReduceOp.RedOpType) -> None:
        """Do and count a collective inside the replica, along one axis."""
        group = self.shards.group(axis)
        self._count(collective, group, ("shard", purpose), *args)
        self._start(group, collective, "shards", purpose, *args, wait=True)

    def _start(
        self, group: AllToAll, collective: str, over: str, purpose: str, *args: Any, wait: bool = False
    ) -> Work:
        def explain(error: Exception) -> Exception | None:
            what = f'the {collective} of "{purpose}" over the {over}'
            return explained(error, self.place, what, group.ranks)

        try:
            return Told(getattr(group, collective)(*args, wait=wait), explain)
        except (RuntimeError, DistError) as error:
            if (lost := explain(error)) is None:
                raise
            raise lost from error

    def meet(self, what: str) -> None:
        """Wait until all ranks of this replica have come here; no collective, see `lost.meet`."""
        meet(self.place, self.shards.ranks if self.shards.axes else (), what)

    def _count(self, collective: str, group: Group, key: Key, *args: Tensor | ReduceOp.RedOpType) -> None:
        sent = [t for t in args if isinstance(t, Tensor)][-1]  # where there are two, the first receives
        self.ledger.record(collective, group.size, *key, sent.nbytes)

    def _mean(
        self, piece: Tensor, purpose: str, payload_dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> Tensor:
        """Return the mean over the replicas; without copy the piece may be overwritten."""
        if not piece.numel():
            return piece
        return Mean(self, piece, purpose, payload_dtype, copy, wait=True).next_leg()

    def _replace(
        self,
        tensors: Sequence[Tensor],
        copied: Sequence[Axes],
        purpose: str,
        exchange: Callable[[Tensor], Tensor],
    ) -> None:
        for cut, _, piece in self._pieces(tensors, [()] * len(tensors), copied, purpose):
            values = list(tensors)
            whole = self.join(cut, exchange(piece) if piece.numel() else piece, purpose)
            unflatten(whole, tensors, cut.indices, values)
            torch._foreach_copy_([tensors[i] for i in cut.indices], [values[i] for i in cut.indices])

    def _pieces(
        self,
        tensors: Sequence[Tensor],
        partial: Sequence[Axes],
        copied: Sequence[Axes],
        purpose: str,
        make: Callable[[list[int]], Tensor] | None = None,
    ) -> Iterator[tuple[Cut, Tensor, Tensor]]:
        """Yield, for each flat buffer, how it was cut, what summing over the `partial` axes leaves of it
        here, and this rank's piece of that; the same piece is with its peers in the other replicas, also if
        it is empty."""
        for (split, copies), indices in buckets(tensors, list(zip(partial, copied, strict=True))):
            mine = flatten(tensors, indices) if make is None else make(indices)
            parts = []
            for axis in split:
                parts.append(self._part(mine.numel(), axis))
                mine = self._scatter_sum(mine, axis, parts[-1], purpose)
            piece = mine
            for axis in copies:
                parts.append(self._part(piece.numel(), axis))
                piece = parts[-1].of(piece)
            yield Cut(indices, split, copies, parts), mine, piece

    def join(self, cut: Cut, piece: Tensor, purpose: str) -> Tensor:
        """Return the buffer of which this is the piece."""
        return self._gather(piece, [*cut.split, *cut.copies], cut.parts, purpose)

    def _part(self, numel: int, axis: int) -> Part:
        group = self.shards.group(axis)
        return Part(numel, group.size, group.rank)

    def _scatter_sum(self, flat: Tensor, axis: int, part: Part, purpose: str) -> Tensor:
        """Return this rank's part of the sum of the flat buffers."""
        piece = flat.new_empty(part.chunk)
        self._along(axis, "reduce_scatter", purpose, piece, pad(flat, part.chunk * part.parts))
        return piece[: part.length]

    def _gather(self, piece: Tensor, axes: Sequence[int], parts: Sequence[Part], purpose: str) -> Tensor:
        """Return the buffer of which the pieces are the parts, taken along one axis after the other."""
        for axis, part in reversed(list(zip(axes, parts, strict=True))):
            whole = piece.new_empty(part.parts * part.chunk)
            self._along(axis, "all_gather", purpose, whole, pad(piece, part.chunk))
            piece = whole[: part.numel]
        return piece
