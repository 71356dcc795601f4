"""What a local rule is, and what it may look at in a step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.side import Side, Tensors
from curvadion.allowed import Option
from curvadion.gate.schedule import Schedule
from curvadion.sharding.blocks import output_dim
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.owners import Owners
from curvadion.sharding.region import Axes
from curvadion.state.batch import Batch, StateSpec
from curvadion.state.numbers import Numbers
from curvadion.state.store import Store
from curvadion.state.table import Table
from curvadion_kernels import Ops
from curvadion_kernels.reference import Fixed


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, for the rooms that take part in it.

    Attributes:
        X, G: this rank's shards of all parameters, and of their gradients (None: missing).
        groups: the parameter groups.
        table, store: which parameters there are, and their state.
        schedule: how many steps there were before this one.
        exchange: sums over shards, means over replicas.
        owners: have work done on whole matrices.
        common_owners: the same of what all replicas have alike, by the ranks of all of them; None where what
            they would send each other is dearer.
        ops, numbers: the kernels, and hyper-parameters as they want them.
        payload_dtype: of P, R and gradients between replicas; None for the tensor's own.
    """

    X: Fixed[Tensor]
    G: Fixed[Tensor | None]
    groups: Sequence[Mapping[str, Any]]
    table: Table
    store: Store
    schedule: Schedule
    exchange: Exchange
    owners: Owners
    common_owners: Owners | None
    ops: Ops
    numbers: Numbers
    payload_dtype: torch.dtype | None

    def crews(self, *, synchronized: bool) -> list[Owners]:
        """Return whom to ask for an owner, one after the other, of what on a synchronized step all replicas
        have alike."""
        common = [self.common_owners] if synchronized and self.common_owners is not None else []
        return [*common, *([self.owners] if self.owners.ranks > 1 else [])]

    def batches(self, rule: str) -> list[Batch]:
        """Return the matrices whose group's local rule this is."""
        return [b for b in self.store.batches if self.groups[b.group]["local_update"] == rule]

    def matrices(self, batch: Batch) -> list[Tensor]:
        """Return X of a batch's matrices, as views."""
        X = self.table.cut(self.X)
        return [X[k] for k in batch.members]

    def gradients(self, batch: Batch) -> list[Tensor | None]:
        """Return the gradients of a batch's matrices."""
        G = self.table.cut(self.G)
        return [G[k] for k in batch.members]

    def move(self, batch: Batch, direction: Tensor) -> None:
        """X <- (1 - lr wd) X - lr_local scale direction, with the group's `update_scale`.

        An orthonormal direction is as large as ever where the momentum has all but gone. So a matrix without
        a gradient in this step, missing or zero on all ranks of the replica, takes no step along it:
        direction is 0.

        Args:
            direction: (B, rows, columns), this rank's shards.
        """
        group, live = self.groups[batch.group], self.store.live_in(batch)
        size = local_lr(group) * scale(group, batch.layout.shape)
        self.ops.local_step_(
            self.matrices(batch),
            list(direction.contiguous().unbind()),
            decay=shrinkage(group),
            step_size=size if live is None else live * size,
        )

    def postpone_decay(self, batches: Sequence[Batch]) -> None:
        """M <- mu M, by the kernel that reads the momenta anyway, in the next step."""
        for b in batches:
            b.decay = self.groups[b.group]["momentum"]

    # ---- the shards of batches

    def side(self, batches: Sequence[Batch], dims: Sequence[int], *, synchronized: bool = False) -> Side:
        """Say how the rows of a factor, which run along dimension dims[k] of the matrices of batch k, are
        spread; synchronized, sums must be the same in all replicas, bit for bit."""
        alike = (synchronized and self.exchange.replicas > 1) or self._copied(batches)
        axes = [b.layout.sharded[dim] for b, dim in zip(batches, dims, strict=True)]

        def gather(factors: Tensors) -> Tensors:
            whole = list(factors)
            for k, (f, b, dim) in enumerate(zip(factors, batches, dims, strict=True)):
                if axes[k]:
                    whole[k] = f.new_zeros(f.shape[0], b.layout.shape[dim], f.shape[-1])
                    b.layout.take(whole[k], dim, 1).copy_(f)
            return self.exchange.sum_over_shards(whole, axes, "gram")

        return Side(
            sum=lambda tensors, purpose: self.exchange.sum_over_shards(tensors, axes, purpose, alike=alike),
            gather=gather,
            take=lambda factors: [
                b.layout.take(f, d, 1) for f, b, d in zip(factors, batches, dims, strict=True)
            ],
        )

    def _copied(self, batches: Sequence[Batch]) -> bool:
        """Say whether some of these matrices are the same on several ranks, or experts anywhere: not all
        ranks have some of those, and all are to say the same."""
        here = any(b.layout.copied for b in batches if not b.layout.apart)
        return here or self.table.some_copied_apart

    def rows(self, batches: Sequence[Batch], *, synchronized: bool = False) -> Side:
        """Say how the long sides of the matrices are spread."""
        return self.side(batches, [b.layout.long for b in batches], synchronized=synchronized)

    def columns(self, batches: Sequence[Batch], *, synchronized: bool = False) -> Side:
        """Say how the short sides of the matrices are spread."""
        return self.side(batches, [b.layout.short for b in batches], synchronized=synchronized)

    def reduction(
        self,
        batches: Sequence[Batch],
        partial: Sequence[Axes],
        *,
        synchronized: bool,
        keep_own: bool = False,
        live_only: bool = False,
    ) -> Callable[[Tensors], tuple[Tensors, Tensors]]:
        """Return what sums factors over shards where they are partial and, if synchronized, averages over
        replicas.

        Args:
            keep_own: the first of the two, without the mean, is wanted.
            live_only: of a matrix without a gradient, in any replica if synchronized, the second is 0, for
                the reason of `move`. Whether it has one travels with the factors, one number more.
        """
        copied, dtype = [b.layout.copied for b in batches], self.payload_dtype

        def total(factors: Tensors) -> tuple[Tensors, Tensors]:
            each = len(factors) // len(batches)
            if synchronized and self.exchange.replicas > 1:
                return self.exchange.mean_over_replicas(
                    factors,
                    [*partial] * each,
                    [*copied] * each,
                    "factors",
                    payload_dtype=dtype,
                    keep_own=keep_own,
                )
            alike = self._copied(batches)
            own = self.exchange.sum_over_shards(factors, [*partial] * each, "factors", alike=alike)
            return own, own

        def reduce(factors: Tensors) -> tuple[Tensors, Tensors]:
            live = [self.store.live_in(b) for b in batches] if live_only else []
            if not live:
                return total(factors)
            if not synchronized:
                own, mean = total(factors)
                return own, [f if one is None else _masked(f, one) for f, one in zip(mean, live, strict=True)]
            ones = [
                f.new_ones(len(f)) if one is None else one.to(f.dtype)
                for f, one in zip(factors, live, strict=True)
            ]
            own, mean = total([*factors, *ones])
            count = len(batches)
            pairs = zip(mean[:count], mean[count:], strict=True)
            return own[:count], [_masked(f, one > 0) for f, one in pairs]

        return reduce


def _masked(factors: Tensor, live: Tensor) -> Tensor:
    return factors * live.to(factors.dtype).view(-1, 1, 1)


def shrinkage(group: Mapping[str, Any]) -> float:
    """Return 1 - lr wd, the factor of decoupled weight decay."""
    return 1 - float(group["lr"]) * group["weight_decay"]


def local_lr(group: Mapping[str, Any]) -> float:
    """Return lr_local = lr local_lr_scale."""
    return float(group["lr"]) * group["local_lr_scale"]


# The names of the option `update_scale`: factors of an orthonormal update of rows x columns. The first makes
# it change an output as much in all shapes (Bernstein), the second its entries as large as AdamW's (Liu et
# al., "Muon is Scalable for LLM Training", arXiv:2502.16982), the third is Jordan's.
UPDATE_SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def slices_first(matrices: Tensor, dim: int) -> Tensor:
    """Return a view of (B, rows, columns) whose rows are the slices along that dimension; its own inverse."""
    return matrices.mT if dim == 1 else matrices


def scale(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """Return the factor of the learning rate that matrices of this shape ask for, sqrt(outputs / inputs) by
    default."""
    outputs = output_dim(group)
    return UPDATE_SCALES[group["update_scale"]](shape[outputs], shape[1 - outputs])


class Rule:
    """What matrices do on a local step. One object serves all: a rule keeps nothing itself.

    Attributes:
        own_options: options of a group that do not mean something under every rule, but do under this one;
            under the others they are refused.
        options: options of groups that it declares, `step.groups[batch.group][name]`.
        state: what it keeps for each matrix, `batch.kept[name]`.
        uses_Q: whether it reads and moves this replica's Q; without it there may be none.
        uses_rank: whether the rank, of rank_fraction, means something to it.
    """

    own_options: tuple[str, ...] = ("update_scale",)  # which `Step.move` heeds
    options: Mapping[str, Option] = {}
    state: tuple[StateSpec, ...] = ()
    uses_Q = False
    uses_rank = False

    def state_of(self, group: Mapping[str, Any]) -> tuple[StateSpec, ...]:
        """Return what it keeps for each matrix of a group."""
        return self.state

    def begin(self, step: Step, key: Tensor | int) -> None:
        """Enqueue what can be done before the host knows whether the step is local; the device looks at the
        key."""

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        """Move the X of these batches, and update M and what is kept; `begun`: the key has let `begin`
        happen."""
        raise NotImplementedError
