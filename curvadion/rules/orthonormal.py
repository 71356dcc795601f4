"""Newton-Schulz on matrices that are sharded: of each on one rank, its owner, or on all ranks at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from curvadion.algebra.newton_schulz import STEPS, flops, newton_schulz, working_dtype
from curvadion.algebra.side import LOCAL
from curvadion.rules.base import Step
from curvadion.sharding.layout import Layout, Region, ShardMesh
from curvadion.sharding.owners import Spread, Stack
from curvadion.state.batch import Batch
from curvadion_kernels.reference import compute_dtype


@dataclass(frozen=True)
class Slices:
    """So many rows (along=0) or columns (1) of a matrix, as the rows of another one."""

    count: int
    along: int


@dataclass(frozen=True)
class Rates:
    """What a rank does in a second: FLOPs of products, bytes that leave it in an all-reduce and in an
    all-to-all. Round figures; they choose between two ways, so only their ratios count."""

    flops: float
    all_reduce: float
    all_to_all: float


# A GPU with bfloat16 products, NVLink inside its machine and a network card to others; a CPU core in float32.
RATES = {"cuda": Rates(5e14, 2e11, 5e10), "cpu": Rates(5e10, 1e9, 1e9)}


def orthonormalized(
    step: Step,
    batches: Sequence[Batch],
    slices: Sequence[Slices] = (),
    matrices: Callable[[Stack], Tensor] | None = None,
) -> Iterator[list[tuple[Stack, Tensor]]]:
    """Yield newton_schulz(m_i) of all matrices, some at a time.

    Args:
        slices: for each batch, if not all of the matrices is meant.
        matrices: returns this rank's part of those in a stack (its `index` is the batch's): by default of their
            momenta, (b, rows, columns). Slices are (b, count, local length), and the same on all ranks that
            have the same part of their length.

    Yields: (stack, this rank's part of what came out, of the same shape).
    """
    spreads = [_spread(step, b, *slices[i : i + 1]) for i, b in enumerate(batches)]
    total = sum(len(b.params) for b in batches)
    owned = [i for i, b in enumerate(batches) if _has_owner(step, b, spreads[i], total, *slices[i : i + 1])]
    local = matrices or (lambda stack: stack.of(batches[stack.index].momentum))
    trips = step.owners.map(
        [spreads[i] for i in owned],
        [len(batches[i].params) for i in owned],
        [step.owners.dtype or working_dtype(batches[i].momentum) for i in owned],
        lambda stack: local(replace(stack, index=owned[stack.index])),
        lambda _, whole: _newton_schulz_of_whole(whole),
    )
    for bucket in trips:
        yield [(replace(stack, index=owned[stack.index]), direction) for stack, direction in bucket]
    rest = [Stack(i, 0, len(b.params)) for i, b in enumerate(batches) if i not in owned]
    if rest:
        chosen = [batches[stack.index] for stack in rest]
        if slices:
            along = [slices[stack.index].along for stack in rest]
            flat, rows, columns = [True] * len(rest), step.side(chosen, [1 - dim for dim in along]), LOCAL
        else:
            flat, rows, columns = (
                [b.layout.transposed for b in chosen],
                step.rows(chosen),
                step.columns(chosen),
            )
        M = [m.mT if f else m for f, m in zip(flat, map(local, rest), strict=True)]
        directions = newton_schulz([m.to(compute_dtype(m.dtype)) for m in M], rows=rows, columns=columns)
        yield [(s, d.mT if f else d) for s, f, d in zip(rest, flat, directions, strict=True)]


def _newton_schulz_of_whole(matrices: Tensor) -> Tensor:
    flat = matrices.shape[1] < matrices.shape[2]
    [direction] = newton_schulz([matrices.mT if flat else matrices])
    return direction.mT if flat else direction


def _spread(step: Step, batch: Batch, slices: Slices | None = None) -> Spread:
    """Return how the matrices of a batch are spread over the ranks of the replica, or slices of them."""
    shards: ShardMesh = step.exchange.shards
    key = (id(batch.layout), slices)
    spreads = step.owners.spreads
    if key not in spreads:
        layout: Layout = batch.layout
        regions, split, shape = shards.regions(layout), layout.split, layout.shape
        if slices is not None:
            dim = 1 - slices.along
            regions = tuple(Region((0, r.offset[dim]), (slices.count, r.shape[dim])) for r in regions)
            split, shape = layout.sharded[dim], (slices.count, layout.shape[dim])
        rows, columns = shape
        spreads[key] = Spread((rows, columns), regions, split, flops(rows, columns))
    return spreads[key]


def _has_owner(step: Step, batch: Batch, spread: Spread, total: int, slices: Slices | None = None) -> bool:
    """Say whether each matrix goes to one rank, or all ranks work on it together: what takes less time.

    Args:
        total: how many matrices there are; with fewer than ranks, some ranks have nothing to do.
    """
    ranks = step.owners.ranks
    if ranks == 1 or step.owners.when != "auto":
        return ranks == 1 or step.owners.when == "always"
    rates = RATES.get(step.exchange.device.type, RATES["cuda"])
    count, sharded = step.exchange.shards.count, batch.layout.sharded
    m, n = max(spread.shape), min(spread.shape)
    dim = 1 - slices.along if slices is not None else batch.layout.long
    long, short = count(sharded[dim]), count(sharded[1 - dim]) if slices is None else 1
    parts = count(spread.split)

    share = max(1 / ranks, 1 / total)
    sent = ((step.owners.dtype or working_dtype(batch.momentum)).itemsize * m * n / parts) * (
        (parts - 1) + (ranks - 1)
    )
    alone = share * (spread.flops / rates.flops + sent / rates.all_to_all)

    summed = 2 * 4 * (STEPS * n * n * (long - 1) / long + m / long * n * (short - 1) / short)
    together = flops(m / long, n) / rates.flops + summed / rates.all_reduce
    return alone <= together
