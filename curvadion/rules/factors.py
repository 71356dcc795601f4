"""Dion's factors of matrices that are sharded, where all of a matrix goes to one rank, its owner.

    in   M (m x n), rows and columns of Q that the owner lacks      out  P (m x r), R (n x r), factors of its
                                                                         columns or Q (n x r): to each rank
                                                                         its rows

In place of sums of P or R over all ranks, each as large as all of it, of Gram matrices and of R's columns.
Pays where the rank is high, where R is to be orthonormal too, and where sums are not faster than other
collectives. A mean over replicas in the middle of it has no place here: then see `left_factor`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from curvadion.algebra.power_iteration import Factors, piece_elements, pieces, power_iteration
from curvadion.algebra.side import Tensors
from curvadion.rules import left_factor
from curvadion.rules.base import Step
from curvadion.rules.orthonormal import Rates
from curvadion.sharding.layout import Axes
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.owners import Errand, Spread, Stack
from curvadion.sharding.region import Region
from curvadion.state.batch import Batch
from curvadion_kernels.reference import compute_dtype

# Elements that a rank takes on at a time, in those of a piece: on CPUs 6 MiB in float32, on GPUs 192.
PIECES = 12


def factors_by_owners(step: Step, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Factors]]:
    """Yield this rank's part of the factors of all matrices, of some of a batch at a time.

    All ranks exhaust it: it has collectives. Of a matrix without a gradient P is 0, and Q what it was.
    """
    plan = step.owners.plan(
        [_errand(step, b) for b in batches],
        [b.members for b in batches],
        [compute_dtype(b.momentum.dtype) for b in batches],
        bucket_elements(step.exchange.device.type),
    )
    live = [step.store.live_in(b) for b in batches]

    def shards(stack: Stack) -> Tensors:
        return [stack.of(batches[stack.index].momentum), stack.of(batches[stack.index].right_factor)]

    def work(i: int, whole: Tensors) -> Tensors:
        return _of_whole(step, batches[i], whole)

    at_once = bucket_elements(step.exchange.device.type) // 4
    for stack, (P, R, right) in step.owners.carry_out_errands(plan, shards, work, at_once):
        b, one = batches[stack.index].part(stack), live[stack.index]
        old = b.right_factor.to(R.dtype)
        there = None if one is None else stack.of(one).to(P.dtype).view(-1, 1, 1)
        if there is not None:
            P.mul_(there)
        if orthonormal_R(step, b):
            yield b, Factors(P, R, right if there is None else torch.where(there > 0, right, old), None)
            continue
        if there is not None:
            right.mul_(there)
        yield b, Factors(P, R, torch.where(right > 0, R * right, old), right.squeeze(1))


def _of_whole(step: Step, batch: Batch, whole: Tensors) -> Tensors:
    """Return P, R, and Q or the factors of R's columns, of whole matrices of a batch, a few at a time."""
    group = step.groups[batch.group]
    M, Q = whole[0].mT if batch.layout.transposed else whole[0], whole[1]
    found: list[Tensors] = []
    for start, stop in pieces(len(M), M.shape[1] * Q.shape[2], M.device):
        [f] = power_iteration(
            [M[start:stop]],
            [Q[start:stop]],
            orthogonalization=group["orthogonalization"],
            right_factor=group["right_factor"],
            column_sumsq=step.ops.column_sumsq,
        )
        found.append([f.P, f.R, f.Q if f.scale is None else f.scale.unsqueeze(1)])
    return [torch.cat(some) if len(some) > 1 else some[0] for some in zip(*found, strict=True)]


def bucket_elements(device: str) -> int:
    """Return how many elements a rank takes on at a time, on this kind of device."""
    return PIECES * piece_elements(torch.device(device))


def orthonormal_R(step: Step, batch: Batch) -> bool:
    """Say whether the new Q of a batch is more than R with scaled columns."""
    return bool(step.groups[batch.group]["right_factor"] == "qr")


def _errand(step: Step, batch: Batch) -> Errand:
    key = (id(batch.layout), batch.rank, orthonormal_R(step, batch))
    if key not in step.owners.errands:
        regions, sharded = step.exchange.shards.regions(batch.layout), batch.layout.sharded
        step.owners.errands[key] = errand(
            batch.layout.shape, regions, sharded, batch.rank, orthonormal_R=key[-1]
        )
    return step.owners.errands[key]


def errand(
    shape: Sequence[int],
    regions: Sequence[Region],
    sharded: Sequence[Axes],
    r: int,
    *,
    orthonormal_R: bool = False,
) -> Errand:
    """Return what the owners of matrices are sent, and send back.

    Args:
        shape, regions: of a matrix, and what each rank has of it.
        sharded: the axes that split its rows, and its columns.
        r: the rank of P and R.
    """
    rows, columns = shape
    long, short = (0, 1) if rows >= columns else (1, 0)

    def factor(dim: int) -> Spread:
        parts = tuple(Region((part.offset[dim], 0), (part.shape[dim], r)) for part in regions)
        return Spread((shape[dim], r), parts, sharded[dim], 0.0)

    m, n = shape[long], shape[short]
    M = Spread((rows, columns), tuple(regions), tuple(sorted((*sharded[0], *sharded[1]))), 0.0)
    right = (
        factor(short) if orthonormal_R else Spread((1, r), (Region((0, 0), (1, r)),) * len(regions), (), 0.0)
    )
    work = products(m, n, r) + left_factor.flops(m, r) + (left_factor.flops(n, r) if orthonormal_R else 0)
    return Errand((M, factor(short)), (factor(long), factor(short), right), work)


def products(m: float, n: float, r: float) -> float:
    """Return the FLOPs of P = M Q and R = M^T P."""
    return 4 * m * n * r


def has_owner(step: Step, batch: Batch, total: int) -> bool:
    """Say whether the matrices of a batch had better go to an owner: what takes less time. Matrices of which
    some ranks have nothing, as of experts, have none.

    Args:
        total: how many matrices there are; with fewer than ranks, some ranks have nothing to do.
    """
    if batch.layout.apart:
        return False
    if step.owners.ranks == 1 or step.owners.when != "auto":
        return step.owners.ranks > 1 and step.owners.when == "always"
    return owner_pays(
        _errand(step, batch),
        step.exchange.shards.count,
        compute_dtype(batch.momentum.dtype).itemsize,
        total,
        step.groups[batch.group]["orthogonalization"],
        Rates.of(step.exchange.device),
    )


def owner_pays(
    errand: Errand, count: Callable[[Axes], int], itemsize: int, total: int, method: str, rates: Rates
) -> bool:
    """Say whether a matrix had better go to one owner, rather than that P and R are sums over all ranks.

    Args:
        count: returns how many ranks there are along axes.
        itemsize: bytes of an element.
        total: how many matrices there are.
        method: of orthogonalization.
    """
    P, R, right = errand.gives
    (m, r), n, ranks = P.shape, R.shape[0], len(P.regions)
    orthonormal_R = right.shape == R.shape

    def sent(spread: Spread, others: int) -> float:
        return itemsize * math.prod(spread.shape) / count(spread.split) * others

    leaves = sum(sent(x, count(x.split) - 1) for x in errand.takes)
    leaves += sum(sent(x, ranks - 1) for x in errand.gives)
    orthogonalized = left_factor.flops(m, r) + (left_factor.flops(n, r) if orthonormal_R else 0)
    work = products(m, n, r) / rates.flops + orthogonalized / rates.float64
    alone = max(1 / ranks, 1 / total) * (work + leaves / rates.all_to_all)

    along, across = count(P.split), count(R.split)
    summed = itemsize * r * (WIRE["all_reduce"](along) * n / across + WIRE["all_reduce"](across) * m / along)
    together = products(m, n, r) / (along * across) / rates.flops + summed / rates.all_reduce
    together += min(left_factor.seconds(P, along, itemsize, total, method, rates))
    if orthonormal_R:
        together += left_factor.seconds(R, across, itemsize, total, method, rates)[1]
    return alone < together
