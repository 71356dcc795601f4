"""Matrices that are alike, stacked, so that one product serves them all; and what a local rule keeps for
them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvadion.algebra.power_iteration import initial_right_factor, rank_of
from curvadion.sharding.layout import Axes, Layout, ShardMesh
from curvadion.sharding.owners import Stack
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

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """Return the shape of this rank's part."""
        return layout.local_shape if self.spread == "matrix" else (layout.local_shape[self.dim],)

    @property
    def dim(self) -> int:
        """The dimension of the matrix whose numbers these are; 0 for all of it."""
        return 1 if self.spread == "columns" else 0

    def wrap(self, local: Tensor, layout: Layout) -> Tensor:
        """Return it as the user sees it."""
        return layout.wrap(local) if self.spread == "matrix" else layout.wrap_along(local, self.dim)

    def copied(self, layout: Layout, shards: ShardMesh) -> Axes:
        """Return the axes over which it is the same."""
        return layout.copied if self.spread == "matrix" else shards.complement(layout.sharded[self.dim])


@dataclass
class Batch:
    """Matrices of one group with one shape, dtype and layout, stacked.

    Attributes:
        group: index of the parameter group.
        params: positions in the optimizer's list of parameters.
        layout: of each of them.
        momentum: (B, rows, cols), local shards.
        rank: r, of P, Q and R.
        Q: (B, n, r), local rows; None where neither the local rule nor the consensus uses it.
        specs, kept: what the local rule keeps; by name, (B, *local shape).
        common_Q: whether Q is the same on all replicas.
        decay: factor of the momentum that was left for the next pass over it.
    """

    group: int
    params: list[int]
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
            params=self.params[stack.start : stack.stop],
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


def make_batches(
    table: Table,
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[tuple[StateSpec, ...]],
    uses_Q: Sequence[bool],
    momentum_dtype: torch.dtype | None,
) -> list[Batch]:
    """Stack matrices that are equal in group, shape, dtype and layout, with their first state; the same on
    all ranks.

    Args:
        specs, uses_Q: for each group, what its local rule keeps, and whether there is a Q.
    """
    alike: dict[Any, list[int]] = {}
    for i in table.matrices:
        layout = table.layouts[i]
        key = (table.group_of[i], layout.shape, layout.sharded, str(layout.placements), table.params[i].dtype)
        alike.setdefault(key, []).append(i)
    batches = []
    for stack in alike.values():
        like, layout, index = table.params[stack[0]], table.layouts[stack[0]], table.group_of[stack[0]]
        group, dtype = groups[index], momentum_dtype or like.dtype
        r = rank_of(min(layout.shape), group["rank_fraction"], group["rank_multiple_of"])
        momentum = torch.zeros((len(stack), *layout.local_shape), dtype=dtype, device=like.device)
        wide = compute_dtype(dtype)
        Q = None
        if uses_Q[index]:
            Q = momentum.new_empty((len(stack), layout.local_shape[layout.short], r), dtype=wide)
            for q, i in zip(Q, () if like.is_meta else stack, strict=False):
                q.copy_(first_right_factor(table.names[i], layout, r))
        kept = {
            spec.name: momentum.new_zeros((len(stack), *spec.local_shape(layout)), dtype=wide)
            for spec in specs[index]
        }
        batches.append(Batch(index, stack, layout, momentum, r, Q, tuple(specs[index]), kept))
    return batches


def first_right_factor(name: str, layout: Layout, r: int) -> Tensor:
    """Return this rank's rows of the first Q of a matrix."""
    return layout.take(initial_right_factor(name, min(layout.shape), r), layout.short, 0)
