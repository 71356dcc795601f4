"""Groups of ranks: what is asked of one, torch.distributed's, and one whose ranks are the threads of this
process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, Store  # type: ignore[attr-defined]  # not in its stubs

from curvadion.sharding.lost import follow_job

# torch 2.13 renamed these two; 2.11 has the old names only.
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


T = TypeVar("T")


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Wait until its result may be used."""


class AllToAll(Protocol):
    """The ranks of an all-to-all; see `Group`."""

    size: int
    rank: int
    ranks: list[int]

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
        *,
        wait: bool = False,
    ) -> Work:
        """Start sending the k-th part of `sent` to rank k: of `size` equal ones, or parts of these sizes."""


class Group(AllToAll, Protocol):
    """The ranks of one collective. All of them make the same calls in the same order, with tensors of equal
    sizes.

    Each call is waited for with `wait` of what it returns, also one that was made with wait=True: then the
    result may be used at once, in order with what the device does next, and NCCL needs no other stream.

    Attributes:
        size, rank: how many there are, and which one this is.
        ranks: their global ranks; empty where there are none.
        elastic: others may be in it after a failure, see `curvadion.sharding.elastic`.
        share: what this rank counts for in a mean, 1 on average.
    """

    elastic: bool
    share: float

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType, *, wait: bool = False) -> Work:
        """Start replacing the tensor by the sum or the maximum of all ranks' tensors."""

    def all_gather(self, whole: Tensor, piece: Tensor, *, wait: bool = False) -> Work:
        """Start putting the pieces of all ranks, one after the other, into `whole`."""

    def reduce_scatter(self, piece: Tensor, whole: Tensor, *, wait: bool = False) -> Work:
        """Start putting this rank's part of the sum of all `whole` into `piece`."""

    def broadcast(self, tensor: Tensor, *, wait: bool = False) -> Work:
        """Start replacing the tensor by rank 0's."""

    def settled(self) -> bool:
        """Return whether all that was started since this was called last has come to its end, on every rank
        of every replica alike. If not, an elastic group has others in it by now."""


class _Done:
    def wait(self) -> None:
        """Return: it is done."""


DONE = _Done()


class _Fixed:
    """A group that stays what it is: where a collective fails, so does the call."""

    elastic = False
    share = 1.0

    def settled(self) -> bool:
        return True


class TorchGroup(_Fixed):
    """A process group of torch.distributed.

    Args:
        group: the group.
        ranks: the global ranks; None asks torch.distributed, which has to know the group. Its timeout is then
            the job's, see `follow_job`.
    """

    def __init__(self, group: ProcessGroup, ranks: list[int] | None = None):
        if ranks is None:
            follow_job(group)
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self.ranks: list[int] = dist.get_process_group_ranks(group) if ranks is None else ranks

    @staticmethod
    def meet(store: Store, rank: int, size: int, *, connect: float, timeout: float) -> "TorchGroup":
        """Return a gloo group of all that meet at a store, whatever other groups there are.

        Args:
            connect, timeout: seconds to wait for the others here, and in each collective.

        Raises RuntimeError if they do not come.
        """
        group = ProcessGroup(store, rank, size)
        group._set_default_backend(ProcessGroup.BackendType.GLOO)
        gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=connect))
        gloo._set_default_timeout(timedelta(seconds=timeout))
        group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        return TorchGroup(group, ranks=[])

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType, *, wait: bool = False) -> Work:
        return dist.all_reduce(tensor, op=op, group=self.group, async_op=not wait) or DONE

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
        *,
        wait: bool = False,
    ) -> Work:
        work = dist.all_to_all_single(
            received, sent, received_sizes, sent_sizes, group=self.group, async_op=not wait
        )
        return work or DONE

    def all_gather(self, whole: Tensor, piece: Tensor, *, wait: bool = False) -> Work:
        return _all_gather(whole, piece, group=self.group, async_op=not wait) or DONE

    def reduce_scatter(self, piece: Tensor, whole: Tensor, *, wait: bool = False) -> Work:
        return _reduce_scatter(piece, whole, group=self.group, async_op=not wait) or DONE

    def broadcast(self, tensor: Tensor, *, wait: bool = False) -> Work:
        return dist.broadcast(tensor, group=self.group, group_src=0, async_op=not wait) or DONE


def gather(value: T) -> list[T]:
    """Return what all ranks give, in rank order; every rank calls it. Without a process group this one's."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _Messages:
    """Messages under way, and what they are copied from and to."""

    def __init__(self, works: Sequence[Any], *tensors: Tensor):
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class Pairwise:
    """Some ranks of the world, without a group of their own: their all-to-all is a batch of messages from
    rank to rank, as in NCCL any is, over the world's communicator, which nobody else has to join.

    torch allows that to some of the ranks once there is that communicator: from the start where
    init_process_group got a device_id.
    """

    def __init__(self, ranks: list[int], rank: int):
        self.size, self.rank, self.ranks = len(ranks), rank, ranks

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
        *,
        wait: bool = False,
    ) -> Work:
        def parts(whole: Tensor, sizes: list[int] | None) -> Sequence[Tensor]:
            return whole.split(sizes or whole.numel() // self.size)

        messages = []
        pairs = zip(parts(sent, sent_sizes), parts(received, received_sizes), strict=True)
        for k, (out, into) in enumerate(pairs):
            if k == self.rank:
                into.copy_(out)
                continue
            if out.numel():
                messages.append(dist.P2POp(dist.isend, out, self.ranks[k]))
            if into.numel():
                messages.append(dist.P2POp(dist.irecv, into, self.ranks[k]))
        work = _Messages(dist.batch_isend_irecv(messages) if messages else (), sent, received)
        if wait:
            work.wait()
        return work


def within_replica() -> tuple[int, int]:
    """Return this rank and the number of ranks of the default process group, which holds one replica where
    replicas may leave; 0 and 1 without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def computing_threads(count: int) -> ThreadPoolExecutor:
    """Return so many threads, in each of which torch computes with as many threads as in this one.

    By itself each would start a pool of OpenMP's default size for its matrix products, and a process that is
    forked afterwards may wait for such a pool for ever.
    """
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


class ThreadGroup(_Fixed):
    """One rank of a group whose ranks are threads of this process, each with tensors of its own.

    For simulations: K optimizers in K threads, `CurvaDion(..., replicate_mesh=group)`, take the steps of K
    processes. `ThreadGroup.run(K, replica)` lets each of K threads call replica(group) with its own.

    Sums are ((t_0 + t_1) + t_2) + ... in rank order, in the tensors' dtype. Two ranks are summed by gloo in
    the same way, bitwise; more are added in another order by gloo and NCCL, which differs from one part of a
    buffer to the next, so that results agree to rounding only. Maxima and copies are exact.

    A thread must not leave the others waiting: used as a context manager, as `run` does, the group lets
    their next collective raise threading.BrokenBarrierError if its body raises.
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

    @staticmethod
    def run(size: int, replica: "Callable[[ThreadGroup], T]") -> list[T]:
        """Return [replica(group of rank 0), replica(group of rank 1), ...], each called in a thread of its
        own.

        If one raises, the others' collectives do too, and then so does this, what that one raised.
        """

        def guarded(group: ThreadGroup) -> T:
            with group:
                return replica(group)

        with computing_threads(size) as threads:
            return results_of([threads.submit(guarded, group) for group in ThreadGroup.of(size)])

    def __enter__(self) -> "ThreadGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()

    def abort(self) -> None:
        """Let the collectives of the other ranks raise rather than wait for this one."""
        self._barrier.abort()

    def _meet(self, kind: str, mine: Tensor, target: Tensor, sizes: list[int] | None = None) -> Work:
        self._box[self.rank] = kind, mine, target, sizes
        if mine.is_cuda:  # another thread, on a stream of its own, reads and writes them
            torch.cuda.current_stream(mine.device).synchronize()
        self._barrier.wait()
        return DONE

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType, *, wait: bool = False) -> Work:
        return self._meet("max" if op == ReduceOp.MAX else "sum", tensor, tensor)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
        *,
        wait: bool = False,
    ) -> Work:
        kind = "all_to_all" if sent_sizes is None else "all_to_all_uneven"
        return self._meet(kind, sent, received, sent_sizes)

    def all_gather(self, whole: Tensor, piece: Tensor, *, wait: bool = False) -> Work:
        return self._meet("all_gather", piece, whole)

    def reduce_scatter(self, piece: Tensor, whole: Tensor, *, wait: bool = False) -> Work:
        return self._meet("reduce_scatter", whole, piece)

    def broadcast(self, tensor: Tensor, *, wait: bool = False) -> Work:
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
    for device in {target.device for target in targets if target.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def results_of(replicas: Sequence[Future[T]]) -> list[T]:
    """Wait for all replicas, and return their results; raise what one raised, rather than what it broke."""
    wait(replicas)
    errors = [error for replica in replicas if (error := replica.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [replica.result() for replica in replicas]


def is_first_rank() -> bool:
    """Say whether this is rank 0 of the job."""
    return within_replica()[0] == 0
