"""Orthogonalization of Dion's P on shards: of each matrix on one rank, its owner, or on all ranks."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from curvadion.algebra.power_iteration import orthogonalize, orthonormal_columns
from curvadion.algebra.side import Tensors
from curvadion.costs import Rates, orthogonalization, seconds_of_P
from curvadion.rules.base import Step
from curvadion.sharding.dealing import Spread
from curvadion.sharding.owners import Owners, Stack
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


def _spread(owners: Owners, batch: Batch) -> Spread:
    """Return how P of the matrices of a batch is spread over the ranks of a crew."""
    layout, r = batch.layout, batch.rank
    key, dim = ("P", id(layout), r), batch.layout.long
    if key not in owners.spreads:
        regions = tuple(
            Region((part.offset[dim], 0), (part.shape[dim], r)) for part in owners.crew.regions(layout)
        )
        shape = (layout.shape[dim], r)
        owners.spreads[key] = Spread(shape, regions, batch.rows, orthogonalization(*shape))
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
        rates = replace(Rates.of(step.exchange.device.type), replicas=crew.bandwidth)
        parts = crew.crew.count(batch.rows)
        of = _spread(crew, batch), parts, P.element_size(), total, method, rates
        return seconds_of_P(*of, replicas=crew.crew.replicas)

    alone, together = cost(owners)
    if owners is step.common_owners and step.owners.ranks > 1:
        together = min(together, cost(step.owners)[0])
    return alone <= together
