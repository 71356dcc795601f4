"""Orthogonalization of Dion's P on shards: of each matrix on one rank, its owner, or on all ranks."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from curvadion.algebra.power_iteration import orthogonalize, orthonormal_columns
from curvadion.algebra.side import Tensors
from curvadion.rules.base import Step
from curvadion.rules.orthonormal import Cost, Rates, cost_alone
from curvadion.sharding.ledger import WIRE
from curvadion.sharding.owners import Owners, Spread, Stack
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
    ranks. On a synchronized step P is equal in all replicas, and so is what their owners make of it: those of
    each replica by itself, or one among the ranks of all.

    Args:
        P: (B, local m, r) of each batch, equal on all ranks that have the same rows.
    """
    alike = list(range(len(P)))
    for owners in step.crews(synchronized=synchronized):
        owned = [i for i in alike if _has_owner(step, owners, batches, i, P[i], method)]
        alike = [i for i in alike if i not in owned]
        plan = owners.plan(
            [_spread(owners, batches[i]) for i in owned],
            [batches[i].members for i in owned],
            [P[i].dtype for i in owned],
        )

        def at_home(k: int, whole: Tensor, owned: list[int] = owned) -> Tensor:
            return orthogonalize([whole], method=method, floor=floors[owned[k]])[0]

        def shards(stack: Stack, owned: list[int] = owned) -> Tensor:
            return stack.of(P[owned[stack.index]])

        for arrived in owners.carry_out(plan, shards, at_home):
            for stack, basis in arrived:
                shards(stack).copy_(basis)
    if alike:
        side = step.rows([batches[i] for i in alike], synchronized=synchronized)
        bases, _ = orthonormal_columns([P[i] for i in alike], side, method, [floors[i] for i in alike])
        for i, basis in zip(alike, bases, strict=True):
            P[i] = basis
    return P


def flops(m: float, r: float) -> float:
    """Return the FLOPs of one P: two Gram matrices, two triangular solves, three Cholesky factorizations."""
    return 6 * m * r**2 + r**3


def _spread(owners: Owners, batch: Batch) -> Spread:
    """Return how P of the matrices of a batch is spread over the ranks of a crew."""
    layout, r = batch.layout, batch.rank
    key, dim = ("P", id(layout), r), batch.layout.long
    if key not in owners.spreads:
        regions = tuple(
            Region((part.offset[dim], 0), (part.shape[dim], r)) for part in owners.crew.regions(layout)
        )
        shape = (layout.shape[dim], r)
        owners.spreads[key] = Spread(shape, regions, batch.rows, flops(*shape))
    return owners.spreads[key]


def _has_owner(
    step: Step, owners: Owners, batches: Sequence[Batch], index: int, P: Tensor, method: str
) -> bool:
    """Say whether each P of a batch goes to one rank of a crew, or all ranks of each replica work on it
    together: what takes less time. Matrices of which some ranks have nothing, as of experts, have no owner.

    Args:
        batches: all; with fewer matrices than ranks, some ranks have nothing to do.
        index: of the batch.
    """
    if batches[index].layout.apart:
        return False
    if owners.when != "auto":
        return owners.when == "always"
    batch, total = batches[index], sum(len(b.members) for b in batches if not b.layout.apart)

    def cost(crew: Owners) -> tuple[float, float]:
        rates = replace(Rates.of(step.exchange.device), replicas=crew.bandwidth)
        parts = crew.crew.count(batch.rows)
        of = _spread(crew, batch), parts, P.element_size(), total, method, rates
        return seconds(*of, replicas=crew.crew.replicas)

    alone, together = cost(owners)
    if owners is step.common_owners and step.owners.ranks > 1:
        together = min(together, cost(step.owners)[0])
    return alone <= together


def owner_pays(spread: Spread, parts: int, itemsize: int, total: int, method: str, rates: Rates) -> bool:
    """Say whether P had better be with one owner than with all ranks together; arguments as of `seconds`."""
    alone, together = seconds(spread, parts, itemsize, total, method, rates)
    return alone <= together


def seconds(
    spread: Spread,
    parts: int,
    itemsize: int,
    total: int,
    method: str,
    rates: Rates,
    replicas: int = 1,
) -> tuple[float, float]:
    """Return how long each rank takes for one P on average: with one owner, and all of a replica together.

    Args:
        parts: into how many its rows are split.
        itemsize: bytes of an element.
        total: how many matrices there are.
        replicas: among whose ranks there is one owner.
    """
    m, r = spread.shape
    # Householder needs the whole matrix on all ranks; Cholesky QR two Gram matrices, the first in float64.
    whole = method == "qr"
    summed = WIRE["all_reduce"](parts) * (itemsize * m * r if whole else (8 + itemsize) * r * r)
    together = Cost(flops(m if whole else m / parts, r), summed)
    alone = replace(cost_alone(spread, itemsize, parts, total, replicas), flops=0.0)
    alone += Cost(max(1 / len(spread.regions), 1 / total) * flops(m, r))
    exact = replace(rates, flops=rates.float64)
    return alone.seconds(exact), together.seconds(exact)
