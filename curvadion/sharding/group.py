"""Groups of ranks: what is asked of one, torch.distributed's, and one whose ranks are the threads of this
process."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

# torch 2.13 renamed these two; 2.11 has the old names only.
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Wait until its result may be used."""


class Group(Protocol):
    """The ranks of one collective. All of them make the same calls in the same order, with tensors of equal
    sizes.

    Attributes:
        size, rank: how many there are, and which one this is.
        ranks: their global ranks; empty where there are none.
    """

    size: int
    rank: int
    ranks: list[int]

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType) -> Work:
        """Start replacing the tensor by the sum or the maximum of all ranks' tensors."""

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
    ) -> Work:
        """Start sending the k-th part of `sent` to rank k: of `size` equal ones, or of parts of these sizes."""

    def all_gather(self, whole: Tensor, piece: Tensor) -> Work:
        """Start putting the pieces of all ranks, one after the other, into `whole`."""

    def reduce_scatter(self, piece: Tensor, whole: Tensor) -> Work:
        """Start putting this rank's part of the sum of all `whole` into `piece`."""

    def broadcast(self, tensor: Tensor) -> Work:
        """Start replacing the tensor by rank 0's."""


class TorchGroup:
    """A process group of torch.distributed."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.ranks: list[int] = dist.get_process_group_ranks(group)

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType) -> Work:
        return dist.all_reduce(tensor, op=op, group=self.group, async_op=True)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
    ) -> Work:
        return dist.all_to_all_single(
            received, sent, received_sizes, sent_sizes, group=self.group, async_op=True
        )

    def all_gather(self, whole: Tensor, piece: Tensor) -> Work:
        return _all_gather(whole, piece, group=self.group, async_op=True)

    def reduce_scatter(self, piece: Tensor, whole: Tensor) -> Work:
        return _reduce_scatter(piece, whole, group=self.group, async_op=True)

    def broadcast(self, tensor: Tensor) -> Work:
        return dist.broadcast(tensor, group=self.group, group_src=0, async_op=True)


class _Done:
    def wait(self) -> None:
        """Return: it is done."""


class ThreadGroup:
    """One rank of a group whose ranks are threads of this process, each with tensors of its own.

    For simulations: K optimizers in K threads, `CurvaDion(..., replicate_mesh=group)`, take the steps of K
    processes. `ThreadGroup.of(K)` returns one for each thread. Sums are taken in rank order. A thread that
    gives up calls `abort`, and the others' next collective raises threading.BrokenBarrierError.
    """

    def __init__(self, size: int, rank: int, barrier: threading.Barrier, box: list[Any]):
        self.size, self.rank, self.ranks = size, rank, list[int]()
        self._barrier, self._box = barrier, box

    @staticmethod
    def of(size: int) -> "list[ThreadGroup]":
        """Return the ranks of a new group."""
        box: list[Any] = [None] * size
        barrier = threading.Barrier(size, action=lambda: _perform(box))
        return [ThreadGroup(size, rank, barrier, box) for rank in range(size)]

    def abort(self) -> None:
        """Let the collectives of the other ranks raise rather than wait for this one."""
        self._barrier.abort()

    def _meet(self, kind: str, mine: Tensor, target: Tensor, sizes: list[int] | None = None) -> Work:
        self._box[self.rank] = kind, mine, target, sizes
        self._barrier.wait()
        return _Done()

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType) -> Work:
        return self._meet("max" if op == ReduceOp.MAX else "sum", tensor, tensor)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
    ) -> Work:
        kind = "all_to_all" if sent_sizes is None else "all_to_all_uneven"
        return self._meet(kind, sent, received, sent_sizes)

    def all_gather(self, whole: Tensor, piece: Tensor) -> Work:
        return self._meet("all_gather", piece, whole)

    def reduce_scatter(self, piece: Tensor, whole: Tensor) -> Work:
        return self._meet("reduce_scatter", whole, piece)

    def broadcast(self, tensor: Tensor) -> Work:
        return self._meet("broadcast", tensor, tensor)


@torch.no_grad()
def _perform(box: list[Any]) -> None:
    """Do a collective for all ranks, once all are there; run by one of their threads."""
    kinds, given, targets, sizes = zip(*box, strict=True)
    uneven = kinds[0] == "all_to_all_uneven"
    if len(set(kinds)) > 1 or len({(0 if uneven else t.numel(), t.dtype) for t in given}) > 1:
        what = [f"{kind} of {t.numel()} {t.dtype}" for kind, t in zip(kinds, given, strict=True)]
        raise RuntimeError(
            f"all ranks must take part in the same collective; got {', '.join(what)}; step them together"
        )
    kind, size = kinds[0], len(box)
    if kind in ("sum", "reduce_scatter"):
        total = given[0].clone()
        for other in given[1:]:
            total += other
        parts = total.chunk(size) if kind == "reduce_scatter" else [total] * size
    elif kind == "max":
        parts = [torch.stack(given).amax(0)] * size
    elif kind == "all_gather":
        parts = [torch.cat(given)] * size
    elif kind in ("all_to_all", "all_to_all_uneven"):
        pieces = [t.split(s) if uneven else t.chunk(size) for t, s in zip(given, sizes, strict=True)]
        parts = [torch.cat([theirs[rank] for theirs in pieces]) for rank in range(size)]
    else:
        parts = [given[0].clone()] * size
    for target, part in zip(targets, parts, strict=True):
        target.copy_(part)
