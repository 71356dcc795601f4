"""Orthogonalization of Dion's P on shards: of each matrix on one rank, its owner, or on all ranks."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from curvadion.algebra.power_iteration import orthogonalize, orthonormal_columns
from curvadion.algebra.side import Tensors
from curvadion.rules.base import Step
from curvadion.rules.orthonormal import Cost, Rates, cost_alone
from curvadion.rules.orthonormal import owner_pays as owner_is_cheaper
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.owners import Spread
from curvadion.sharding.region import Region
from curvadion.state.batch import Batch


def orthonormalize(
    step: Step,
    batches: Sequence[Batch],
    P: Tensors,
    floors: Sequence[float],
    method: str,
    *,
    synchronized: bool,
) -> Tensors:
    """Return orthogonalize(P), this rank's rows. Overwrites P.

    Owners come first, then what all ranks do together, so that the order of collectives is the same on all
    ranks. On a synchronized step P is equal in all replicas, and so is what their owners make of it.

    Args:
        P: (B, local m, r) of each batch, equal on all ranks that have the same rows.
    """
    may = [i for i, b in enumerate(batches) if not b.layout.apart]
    spreads, total = {i: _spread(step, batches[i]) for i in may}, sum(len(batches[i].members) for i in may)
    owned = [i for i in may if _has_owner(step, batches[i], spreads[i], P[i], method, total)]
    plan = step.owners.plan(
        [spreads[i] for i in owned], [batches[i].members for i in owned], [P[i].dtype for i in owned]
    )

    def at_home(i: int, whole: Tensor) -> Tensor:
        return orthogonalize([whole], method=method, floor=floors[owned[i]])[0]

    for arrived in step.owners.carry_out(plan, lambda stack: stack.of(P[owned[stack.index]]), at_home):
        for stack, basis in arrived:
            stack.of(P[owned[stack.index]]).copy_(basis)
    alike = [i for i in range(len(P)) if i not in owned]
    if alike:
        side = step.rows([batches[i] for i in alike], synchronized=synchronized)
        bases, _ = orthonormal_columns([P[i] for i in alike], side, method, [floors[i] for i in alike])
        for i, basis in zip(alike, bases, strict=True):
            P[i] = basis
    return P


def flops(m: float, r: float) -> float:
    """Return the FLOPs of one P: two Gram matrices, two triangular solves, three Cholesky factorizations."""
    return 6 * m * r**2 + r**3


def _spread(step: Step, batch: Batch) -> Spread:
    """Return how P of the matrices of a batch is spread over the ranks of the replica."""
    layout, r = batch.layout, batch.rank
    key, dim = ("P", id(layout), r), batch.layout.long
    if key not in step.owners.spreads:
        regions = tuple(
            Region((part.offset[dim], 0), (part.shape[dim], r))
            for part in step.exchange.shards.regions(layout)
        )
        shape = (layout.shape[dim], r)
        step.owners.spreads[key] = Spread(shape, regions, batch.rows, flops(*shape))
    return step.owners.spreads[key]


def _has_owner(step: Step, batch: Batch, spread: Spread, P: Tensor, method: str, total: int) -> bool:
    """Say whether each P goes to one rank, or all ranks work on it together: what takes less time.

    Args:
        total: how many matrices there are; with fewer than ranks, some ranks have nothing to do.
    """
    if step.owners.when != "auto":
        return step.owners.when == "always"
    parts = step.exchange.shards.count(batch.rows)
    return owner_pays(spread, parts, P.element_size(), total, method, Rates.of(step.exchange.device))


def owner_pays(spread: Spread, parts: int, itemsize: int, total: int, method: str, rates: Rates) -> bool:
    """Say whether P had better be with one owner than with all ranks together.

    Args:
        parts: into how many its rows are split.
        itemsize: bytes of an element.
        total: how many matrices there are.
    """
    m, r = spread.shape
    # Householder needs the whole matrix on all ranks; Cholesky QR two Gram matrices, the first in float64.
    whole = method == "qr"
    summed = WIRE["all_reduce"](parts) * (itemsize * m * r if whole else (8 + itemsize) * r * r)
    together = Cost(flops(m if whole else m / parts, r), summed)
    return owner_is_cheaper(
        cost_alone(spread, itemsize, parts, total), together, replace(rates, flops=rates.float64)
    )
