"""Dion's factors of matrices that are sharded, where all of a matrix goes to one rank, its owner.

    in   M (m x n), rows and columns of Q that the owner lacks      out  P (m x r), R (n x r), factors of its
                                                                         columns or Q (n x r): to each rank
                                                                         its rows

In place of sums of P or R over all ranks, each as large as all of it, of Gram matrices and of R's columns.
Pays where the rank is high, where R is to be orthonormal too, and where sums are not faster than other
collectives. A mean over replicas in the middle of it has no place here: then see `left_factor`.
"""

from collections.abc import Iterator, Sequence

import torch

from curvadion.algebra.power_iteration import Factors, pieces, power_iteration
from curvadion.algebra.side import Tensors
from curvadion.costs import Rates, bucket_elements, errand_of_factors, factors_have_owner
from curvadion.rules.base import Step
from curvadion.sharding.dealing import Errand
from curvadion.sharding.owners import Stack
from curvadion.state.batch import Batch
from curvadion_kernels.reference import compute_dtype


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


def orthonormal_R(step: Step, batch: Batch) -> bool:
    """Say whether the new Q of a batch is more than R with scaled columns."""
    return bool(step.groups[batch.group]["right_factor"] == "qr")


def _errand(step: Step, batch: Batch) -> Errand:
    key = (id(batch.layout), batch.rank, orthonormal_R(step, batch))
    if key not in step.owners.errands:
        regions, sharded = step.exchange.shards.regions(batch.layout), batch.layout.sharded
        step.owners.errands[key] = errand_of_factors(
            batch.layout.shape, regions, sharded, batch.rank, orthonormal_R=key[-1]
        )
    return step.owners.errands[key]


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
    return factors_have_owner(
        _errand(step, batch),
        step.exchange.shards.count,
        compute_dtype(batch.momentum.dtype).itemsize,
        total,
        step.groups[batch.group]["orthogonalization"],
        Rates.of(step.exchange.device.type),
    )
