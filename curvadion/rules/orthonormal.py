"""Newton-Schulz on matrices that are sharded: of each on one rank, its owner, or on all ranks at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvadion.algebra.iteration import Iteration
from curvadion.algebra.newton_schulz import arithmetic, iteration_of, newton_schulz
from curvadion.algebra.side import LOCAL
from curvadion.costs import Rates, cost_alone, cost_together, owner_pays
from curvadion.formats import name_of
from curvadion.rules.base import Step
from curvadion.sharding.dealing import Spread
from curvadion.sharding.owners import Stack
from curvadion.sharding.region import Region
from curvadion.state.batch import Batch
from curvadion_kernels.reference import compute_dtype

# The options of a group that `iteration_of` reads.
ITERATION = ("newton_schulz", "newton_schulz_steps", "newton_schulz_dtype", "newton_schulz_method")


@dataclass(frozen=True)
class Slices:
    """So many rows (along=0) or columns (1) of a matrix, as the rows of another one."""

    number: int
    along: int


def orthonormalized(
    step: Step,
    batches: Sequence[Batch],
    matrices: Callable[[Stack], Tensor],
    slices: Sequence[Slices] = (),
) -> Iterator[list[tuple[Stack, Tensor]]]:
    """Yield newton_schulz of the matrices of all batches, some at a time, iterated as their groups ask.

    Args:
        matrices: returns this rank's part, (b, rows, columns), of those in a stack, whose `index` is a
            batch's.
        slices: for each batch, if they are slices of its matrices: (b, count, local length), the same on all
            ranks that have the same part of their length.

    Yields: (stack, this rank's part of what came out, of the same shape).
    """
    hows = [iteration_of(step.groups[b.group], b.momentum) for b in batches]
    cut: Sequence[Slices | None] = slices or [None] * len(batches)
    may = [i for i, b in enumerate(batches) if not b.layout.apart]  # others are where they are worked on
    spreads = {i: _spread(step, batches[i], cut[i], hows[i]) for i in may}
    wire = [step.owners.dtype or arithmetic(how, b.momentum) for b, how in zip(batches, hows, strict=True)]
    total = sum(len(batches[i].members) for i in may)
    owned, alike = [], dict[Iteration, list[int]]()
    for i, (b, how) in enumerate(zip(batches, hows, strict=True)):
        if i in spreads and _has_owner(step, b, spreads[i], how, wire[i], total, cut[i]):
            owned.append(i)
        else:
            alike.setdefault(how, []).append(i)

    def at_home(i: int, whole: Tensor) -> Tensor:
        flat = whole.shape[1] < whole.shape[2]
        tall, product = whole.mT if flat else whole, step.ops.symmetric_product
        [direction] = newton_schulz([tall], hows[owned[i]], product=product)
        return direction.mT if flat else direction

    plan = step.owners.plan(
        [spreads[i] for i in owned], [batches[i].members for i in owned], [wire[i] for i in owned]
    )
    for arrived in step.owners.carry_out(
        plan, lambda stack: matrices(replace(stack, index=owned[stack.index])), at_home
    ):
        yield [(replace(stack, index=owned[stack.index]), direction) for stack, direction in arrived]
    # In an order of their own: ranks without some experts lack an iteration, or have another one first.
    for how in sorted(alike, key=repr):
        members = alike[how]
        stacks = [Stack(i, 0, len(batches[i].members)) for i in members]
        yield list(zip(stacks, _together(step, how, batches, stacks, matrices, slices), strict=True))


def _together(
    step: Step,
    how: Iteration,
    batches: Sequence[Batch],
    stacks: Sequence[Stack],
    matrices: Callable[[Stack], Tensor],
    slices: Sequence[Slices],
) -> list[Tensor]:
    """Return newton_schulz of matrices on which all ranks work at once."""
    chosen = [batches[stack.index] for stack in stacks]
    if slices:
        along = [slices[stack.index].along for stack in stacks]
        flat, rows, columns = [True] * len(along), step.side(chosen, [1 - dim for dim in along]), LOCAL
    else:
        flat, rows, columns = [b.layout.transposed for b in chosen], step.rows(chosen), step.columns(chosen)
    M = [m.mT if f else m for f, m in zip(flat, map(matrices, stacks), strict=True)]
    wide, product = [m.to(compute_dtype(m.dtype)) for m in M], step.ops.symmetric_product
    directions = newton_schulz(wide, how, rows=rows, columns=columns, product=product)
    return [d.mT if f else d for f, d in zip(flat, directions, strict=True)]


def _spread(step: Step, batch: Batch, slices: Slices | None, how: Iteration) -> Spread:
    """Return how the matrices of a batch are spread over the ranks of the replica, or slices of them."""
    dtype = arithmetic(how, batch.momentum)
    key = (id(batch.layout), slices, how, dtype)
    spreads = step.owners.spreads
    if key not in spreads:
        layout = batch.layout
        regions, split, (rows, columns) = step.exchange.shards.regions(layout), layout.split, layout.shape
        if slices is not None:
            dim = 1 - slices.along
            regions = tuple(Region((0, r.offset[dim]), (slices.number, r.shape[dim])) for r in regions)
            split, (rows, columns) = layout.sharded[dim], (slices.number, layout.shape[dim])
        flops = how.flops(rows, columns, name_of(dtype))
        spreads[key] = Spread((rows, columns), regions, split, flops)
    return spreads[key]


def _has_owner(
    step: Step,
    batch: Batch,
    spread: Spread,
    how: Iteration,
    wire: torch.dtype,
    total: int,
    slices: Slices | None,
) -> bool:
    """Say whether each matrix goes to one rank, or all ranks work on it together: what takes less time.

    Args:
        total: how many matrices there are; with fewer than ranks, some ranks have nothing to do.
    """
    ranks = step.owners.ranks
    if ranks == 1 or step.owners.when != "auto":
        return ranks == 1 or step.owners.when == "always"
    count, sharded = step.exchange.shards.count, batch.layout.sharded
    dim = 1 - slices.along if slices is not None else batch.layout.long
    long, short = count(sharded[dim]), count(sharded[1 - dim]) if slices is None else 1
    return owner_pays(
        cost_alone(spread, wire.itemsize, count(spread.split), total),
        cost_together(how, max(spread.shape), min(spread.shape), long, short),
        Rates.of(step.exchange.device.type),
    )
