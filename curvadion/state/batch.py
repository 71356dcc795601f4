"""Matrices that are alike, stacked, so that one product serves them all; and what a local rule keeps for
them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvadion.algebra.power_iteration import initial_right_factor
from curvadion.algebra.sizes import rank_of
from curvadion.sharding.blocks import Blocks, Strips
from curvadion.sharding.layout import Layout, ShardMesh
from curvadion.sharding.owners import Stack
from curvadion.sharding.region import Axes
from curvadion.state.table import Table
from curvadion_kernels.reference import compute_dtype


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a local rule keeps for every matrix; it starts at zero and is averaged where moments are.

    Attributes:
        name: its key in `optimizer.state[p]`, a file format.
        spread: "matrix": shaped and placed like the matrix. "rows", "columns": one number for each row or
            column of the matrix, (rows,) or (columns,), placed as they are.
    """

    name: str
    spread: Literal["matrix", "rows", "columns"]

    @property
    def dim(self) -> int:
        """The dimension of the matrix whose numbers these are; 0 for all of it."""
        return 1 if self.spread == "columns" else 0

    def copied(self, layout: Layout, shards: ShardMesh) -> Axes:
        """Return the axes over which it is the same."""
        if self.spread == "matrix":
            return layout.copied
        return shards.complement(layout.sharded[self.dim] + layout.apart)


@dataclass
class Batch:
    """Matrices of one group with one shape, dtype and layout, stacked.

    Attributes:
        group: index of the parameter group.
        members: positions in `Table.matrices`, of those of which this rank has a part.
        layout: of each of them.
        momentum: (B, rows, cols), local shards; a view of what is kept for whole parameters.
        rank: r, of P, Q and R.
        Q: (B, n, r), local rows; None where neither the local rule nor the consensus uses it.
        specs, kept: what the local rule keeps; by name, (B, *local shape).
        common_Q: whether Q is the same on all replicas.
        decay: factor of the momentum that was left for the next pass over it.
    """

    group: int
    members: list[int]
    layout: Layout
    momentum: Tensor
    rank: int
    Q: Tensor | None = None
    specs: tuple[StateSpec, ...] = ()
    kept: dict[str, Tensor] = field(default_factory=dict)
    common_Q: bool = True
    decay: float = 1.0

    def part(self, stack: Stack) -> "Batch":
        """Return some of the matrices, as views: to move them and what is kept, not to be kept itself."""
        return replace(
            self,
            members=self.members[stack.start : stack.stop],
            momentum=stack.of(self.momentum),
            Q=None if self.Q is None else stack.of(self.Q),
            kept={name: stack.of(tensor) for name, tensor in self.kept.items()},
        )

    @property
    def M(self) -> Tensor:
        """The momenta in the equations' orientation, (B, m, n) with m >= n, in the dtype of the
        computation."""
        M = self.momentum.mT if self.layout.transposed else self.momentum
        return M.to(compute_dtype(M.dtype))

    @property
    def right_factor(self) -> Tensor:
        """Q, of a rule or a consensus that has said that it uses it."""
        if self.Q is None:
            raise RuntimeError("there is a Q only where uses_Q says so; set it on the rule or the consensus")
        return self.Q

    @property
    def rows(self) -> Axes:
        """The axes that split m."""
        return self.layout.sharded[self.layout.long]

    @property
    def columns(self) -> Axes:
        """The axes that split n."""
        return self.layout.sharded[self.layout.short]


# The keys of Q in the state; the second where the Q of some blocks runs along the dimension that is cut.
RIGHT_FACTORS = frozenset({"Q", "Q_split"})


@dataclass
class Alike:
    """Parameters of one group that are equal in shape, dtype and layout, stacked, and their matrices.

    Attributes:
        params: positions in the optimizer's list of parameters.
        blocks: which matrices each of them is.
        stored: all state of them, (number, *local shape), by key; and which dimension of the parameter each
            dimension follows, see `Layout.wrap`.
        batches: their matrices, views of that; without any where they are all on other ranks.
    """

    params: list[int]
    blocks: Blocks
    stored: dict[str, tuple[Tensor, Sequence[int | None] | None]]
    batches: list[Batch]

    def states(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the state of each parameter as the user sees it, by key."""
        for k, i in enumerate(self.params):
            yield (
                i,
                {key: self.blocks.layout.wrap(kept[k], dims) for key, (kept, dims) in self.stored.items()},
            )


def stack(
    table: Table,
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[tuple[StateSpec, ...]],
    uses_Q: Sequence[bool],
    momentum_dtype: torch.dtype | None,
) -> list[Alike]:
    """Stack parameters that are alike, with the first state of their matrices; the same on all ranks.

    Args:
        specs, uses_Q: for each group, what its local rule keeps, and whether there is a Q.
    """
    alike: dict[Any, list[int]] = {}
    for i in table.weights:
        layout = table.layouts[i]
        key = (table.group_of[i], layout.shape, layout.sharded, str(layout.placements), table.params[i].dtype)
        alike.setdefault(key, []).append(i)
    return [_stacked(table, members, groups, specs, uses_Q, momentum_dtype) for members in alike.values()]


def _stacked(
    table: Table,
    params: list[int],
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[tuple[StateSpec, ...]],
    uses_Q: Sequence[bool],
    momentum_dtype: torch.dtype | None,
) -> Alike:
    like, blocks, index = table.params[params[0]], table.blocks[params[0]], table.group_of[params[0]]
    group, dtype, layouts = groups[index], momentum_dtype or like.dtype, blocks.layouts
    wide, every = compute_dtype(dtype), tuple(range(len(blocks.sizes)))
    ranks = [rank_of(min(x.shape), group["rank_fraction"], group["rank_multiple_of"]) for x in layouts]
    momentum = torch.zeros((len(params), *blocks.layout.local_shape), dtype=dtype, device=like.device)
    stored: dict[str, tuple[Tensor, Sequence[int | None] | None]] = {"momentum": (momentum, None)}

    strips = {spec.name: Strips(blocks, spec.dim, every) for spec in specs[index] if spec.spread != "matrix"}
    Q_of = _right_factors(blocks, ranks) if uses_Q[index] else {}
    strips |= Q_of
    for spec in specs[index]:
        if spec.spread == "matrix":
            stored[spec.name] = (torch.zeros_like(momentum, dtype=wide), None)
    for name, strip in strips.items():
        kept = momentum.new_zeros((len(params), *strip.local_shape), dtype=wide)
        stored[name] = (kept, strip.dims)

    batches = []
    for run in blocks.runs:
        kept_by = {
            spec.name: strips[spec.name].stack(stored[spec.name][0], run)
            if spec.name in strips
            else blocks.stack(stored[spec.name][0], run)
            for spec in specs[index]
        }
        Q = next((s.stack(stored[n][0], run, ranks[run[0]]) for n, s in Q_of.items() if run[0] in s.of), None)
        members = [table.first_matrix[i] + k for i in params for k in blocks.members(run)]
        stacked = blocks.stack(momentum, run)
        rank, layout = ranks[run[0]], layouts[run[0]]
        batch = Batch(index, members, layout, stacked, rank, Q, tuple(specs[index]), kept_by)
        batches.append(batch)
        start_right_factors(table, batch)
    return Alike(params, blocks, stored, batches)


def _right_factors(blocks: Blocks, ranks: Sequence[int]) -> dict[str, Strips]:
    """Return where the Q of the blocks are kept, by key: those whose rows run along the dimension that is
    cut, and the others."""
    other: dict[bool, list[int]] = {}
    for k, layout in enumerate(blocks.layouts):
        other.setdefault(layout.short == blocks.dim, []).append(k)
    found = {}
    for along, of in sorted(other.items()):
        dim = blocks.dim if along else 1 - blocks.dim
        found["Q_split" if along and len(other) > 1 else "Q"] = Strips(
            blocks, dim, tuple(of), max(ranks[k] for k in of)
        )
    return found


def start_right_factors(table: Table, batch: Batch, only: int | None = None) -> None:
    """Give the matrices of a batch, or those of one parameter, their first Q."""
    if batch.Q is None or batch.Q.is_meta:
        return
    for q, k in zip(batch.Q, batch.members, strict=True):
        matrix, layout = table.matrices[k], batch.layout
        if only in (None, matrix.param):
            Q = initial_right_factor(matrix.name, min(layout.shape), batch.rank)
            q.copy_(layout.take(Q, layout.short, 0))
