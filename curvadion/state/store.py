"""Optimizer state as tensors: stacked for the arithmetic, and one by one in `optimizer.state` for everybody
else."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from curvadion.algebra.scalar import MOMENTS
from curvadion.gate.schedule import Schedule
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.layout import local_tensor, reshard_gathered_modules
from curvadion.state.batch import Alike, Batch, StateSpec, stack, start_right_factors
from curvadion.state.numbers import Numbers
from curvadion.state.table import Table
from curvadion_kernels import Ops
from curvadion_kernels.fixed import Views
from curvadion_kernels.reference import NO_NORM, Fixed, compute_dtype, scale_

States = dict[Tensor, dict[str, Tensor]]


class Store:
    """All state of this rank.

    Args:
        table: the parameters.
        groups: their groups.
        specs, uses_Q: for each group, what its local rule keeps, and whether there is a Q.
        momentum_dtype: of momentum and moments; None for the parameter's own.
        outer_momentum: whether there is a U of every parameter.
        before: `optimizer.state` so far, whose values go on where there is still a place for them; it is
            left as it was.
        own_Q: parameters whose Q in it is this replica's own.

    Attributes:
        states: what `optimizer.state` is to hold.
        alike: the parameters of the matrices, stacked.
        kinds, batch_of: the matrices, stacked, the same list on all ranks; and the index of each matrix's.
        batches: those of which this rank has some matrices.
        momenta: M of every matrix, views of the batches'.
        last_norm: (L,) float32, the norms that the gate saw on the previous step.
        counters: (3, parameters) float32 on the CPU: steps, local steps in a row, synchronized steps.
        moments: of AdamW and Lion, by parameter and key.
        outer_momenta: U of every parameter, none without outer momentum.
        live: (L,) bool, the matrices whose gradient in this step is not missing or zero on all ranks of the
            replica.
    """

    def __init__(
        self,
        table: Table,
        groups: Sequence[Mapping[str, Any]],
        specs: Sequence[tuple[StateSpec, ...]],
        uses_Q: Sequence[bool],
        *,
        momentum_dtype: torch.dtype | None,
        outer_momentum: bool,
        before: Mapping[Tensor, Mapping[str, Any]],
        own_Q: Collection[Tensor] = (),
    ):
        self.table, self.states = table, States()
        self.last_norm = torch.full((len(table.matrices),), NO_NORM, dtype=torch.float32, device=table.device)
        self.counters = torch.zeros(3, len(table.params), dtype=torch.float32, device="cpu")
        self.alike: list[Alike] = stack(table, groups, specs, uses_Q, momentum_dtype)
        self.kinds: list[Batch] = [b for alike in self.alike for b in alike.batches]
        self.batches = [b for b in self.kinds if b.members]
        stored = {i: m for a in self.alike for i, m in zip(a.params, a.stored["momentum"][0], strict=True)}
        whole = table.cut(Fixed(stored.get(i) for i in range(len(table.params))))
        stacks = [(b.members, b.momentum) for b in self.batches]
        here = {k for members, _ in stacks for k in members}
        stacks += [([k], m.unsqueeze(0)) for k, m in enumerate(whole) if k not in here]
        self.momenta = Views.of(stacks)
        first, kinds = dict[int, int](), 0
        for alike in self.alike:
            first |= dict.fromkeys(alike.params, kinds)
            kinds += len(alike.batches)
        self.batch_of = [first[m.param] + table.blocks[m.param].run_of[m.block] for m in table.matrices]
        self.live = torch.ones(len(table.matrices), dtype=torch.bool, device=table.device)
        self._places: dict[tuple[int, ...], Tensor] = {}  # in `live`, of a batch's matrices
        self.moments: dict[int, dict[str, Tensor]] = {}
        self._members: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}
        self.outer_momenta: Fixed[Tensor] = Fixed()
        if outer_momentum:
            locals_ = [local_tensor(p) for p in table.params]
            self.outer_momenta = Fixed(torch.zeros_like(x, dtype=compute_dtype(x.dtype)) for x in locals_)

        for alike in self.alike:
            for b in alike.batches:
                b.common_Q = b.Q is None or not any(table.params[i] in own_Q for i in alike.params)
            for i, tensors in alike.states():
                start, blocks = table.first_matrix[i], table.blocks[i]
                norms = self.last_norm[start : start + blocks.count]
                self._set(i, before, last_norm=norms[0] if blocks.single else norms, **tensors)
        for i in table.scalars:
            layout, dtype = table.layouts[i], momentum_dtype or table.params[i].dtype
            keys = MOMENTS[groups[table.group_of[i]]["algorithm"]]
            if dtype == torch.float16 and "exp_avg_sq" in keys:
                raise ValueError(
                    "AdamW's second moment must not be float16, where squares of gradients below 1e-4 are 0 "
                    f"and those above 255 infinite; got float16 for {table.names[i]!r}; pass "
                    "momentum_dtype=torch.float32"
                )
            self.moments[i] = {
                key: torch.zeros(layout.local_shape, dtype=dtype, device=table.device) for key in keys
            }
            self._set(i, before, **{key: layout.wrap(value) for key, value in self.moments[i].items()})

    def _set(self, i: int, before: Mapping[Tensor, Mapping[str, Any]], **tensors: Tensor) -> None:
        """Make the tensors the state of parameter i, with the values of its state so far where there is
        one."""
        p = self.table.params[i]
        if self.outer_momenta:
            tensors["outer_momentum"] = self.table.layouts[i].wrap(self.outer_momenta[i])
        fresh = {
            "step": self.counters[0, i],
            "synchronized_steps": self.counters[2, i],
            "local_steps": self.counters[1, i],
            **tensors,
        }
        for key, value in before.get(p, {}).items():
            if key in fresh:  # not what a rule has kept that is no longer its group's
                assign(fresh[key], value)
        self.states[p] = fresh

    def start_right_factors(self, index: int) -> None:
        """Give the matrices of a parameter their first Q again."""
        for b in self.batches:
            start_right_factors(self.table, b, only=index)

    @property
    def own_Q(self) -> set[Tensor]:
        """The parameters whose Q is this replica's own, as local Dion steps leave it."""
        differ = [k for b in self.batches if not b.common_Q for k in b.members]
        return {self.table.params[self.table.matrices[k].param] for k in differ}

    def live_in(self, batch: Batch) -> Tensor | None:
        """Return which matrices of a batch have a gradient in this step: (B,) float64, 1 or 0; None if it is
        known that all have one, as it is in a dry run."""
        if self.table.dry or self._all_live():
            return None
        members = tuple(batch.members)
        if members not in self._places:
            self._places[members] = torch.tensor(members, device="cpu").to(self.live.device)
        return self.live.index_select(0, self._places[members]).to(torch.float64)

    def _all_live(self) -> bool:
        """Say so where it is known; a GPU would have to be waited for."""
        return self.live.is_cpu and bool(self.live.all())

    def matrices_with(self, rule: str, groups: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return the positions of the parameters of matrices whose group's local rule this is: the same
        object when asked again."""
        rules = tuple(group["local_update"] for group in groups)
        if (rule, rules) not in self._members:
            of = self.table.group_of
            self._members[rule, rules] = tuple(i for i in self.table.weights if rules[of[i]] == rule)
        return self._members[rule, rules]

    # ---- counters

    def count(self, schedule: Schedule) -> None:
        """Count a step that the schedule has counted."""
        self.counters[0] += 1
        self.write_counters(schedule)

    def write_counters(self, schedule: Schedule) -> None:
        """Put into the state what the schedule counts, but for the steps themselves."""
        self.counters[1].fill_(schedule.local_steps)
        self.counters[2].fill_(schedule.synchronized_steps)

    def loaded(self, schedule: Schedule) -> None:
        """Let the schedule go on from the state that was loaded, whose Q are common."""
        for b in self.batches:
            b.common_Q = True
        steps, local, synchronized = self.counters.amax(dim=1).tolist() if self.table.params else (0, 0, 0)
        schedule.steps, schedule.local_steps, schedule.synchronized_steps = (
            int(steps),
            int(local),
            int(synchronized),
        )

    def counts_as(self, schedule: Schedule) -> bool:
        """Say whether the state counts the steps that the schedule counts."""
        counted = [schedule.steps, schedule.local_steps, schedule.synchronized_steps]
        return not self.table.params or self.counters.amax(dim=1).tolist() == counted

    # ---- momentum

    def settle(self) -> None:
        """Apply the decay that was left for the next pass over the momenta: M <- c M."""
        late = [b for b in self.batches if b.decay != 1.0]
        if late:
            with torch.no_grad():
                scale_([b.momentum for b in late], [b.decay for b in late])
            for b in late:
                b.decay = 1.0

    def accumulate(
        self,
        G: Fixed[Tensor | None],
        ops: Ops,
        numbers: Numbers,
        *,
        store: bool,
        also: Sequence[Tensor] = (),
    ) -> Tensor:
        """m_i <- M_i + G_i; return ||m_i||^2 of every matrix, whether another gradient is not finite, and
        which gradients of matrices are not zero.

        With store=False only the message, for a step that may be skipped. `also` is looked at as gradients
        are.
        """
        if ops.kernels == "reference":
            self.settle()  # the same bits, stack by stack, where the kernels below go over single matrices
        # What was postponed so far.
        decay = numbers.each("decay", [b.decay for b in self.kinds], self.batch_of)
        if store:
            for b in self.batches:
                b.decay = 1.0
        watch, matrices = [*G.take(self.table.scalars).present, *also], self.table.cut(G)
        message = ops.momentum_norm_(self.momenta, matrices, decay=decay, watch=watch, store=store)
        return message.to(self.table.device)

    def _momentum_norms(self, ops: Ops, exchange: Exchange) -> Tensor:
        """Return ||M_i||_F of every matrix, (L,) float32."""
        nothing = [None] * len(self.momenta)
        sumsq = ops.momentum_norm_(self.momenta, nothing, store=False)[: len(nothing)].to(self.table.device)
        return exchange.sum_over_all_shards(sumsq * self.table.owned, "norms", alike=True).sqrt()

    # ---- between replicas

    def make_common(self, X: Sequence[Tensor], exchange: Exchange, *, average: bool) -> None:
        """X_i <- E_i[X_i], the same for moments, if asked; Q <- replica 0's where the replicas' Q differ."""
        table = self.table
        if average:
            exchange.average_(X, table.copied, "parameters")
            moments = [
                (moment, table.copied[i]) for i in table.scalars for moment in self.moments[i].values()
            ]
            moments += [
                (b.kept[spec.name], spec.copied(b.layout, table.shards))
                for b in self.batches
                for spec in b.specs
            ]
            exchange.average_([m for m, _ in moments], [copied for _, copied in moments], "moments")
        differ = [b for b in self.batches if not b.common_Q]
        copied = [table.shards.complement(b.columns + b.layout.apart) for b in differ]
        exchange.broadcast_([b.right_factor for b in differ], copied, "right_factor")
        for b in differ:
            b.common_Q = True

    def average_momentum(self, ops: Ops, exchange: Exchange) -> None:
        """M_i <- E_i[M_i], and the norms that the gate saw last by as much: ||E_i[M_i]|| / E_i[||M_i||]."""
        norms = self._momentum_norms(ops, exchange)
        momenta = [b.momentum for b in self.batches]
        exchange.average_(momenta, [b.layout.copied for b in self.batches], "momentum")
        of_mean = self._momentum_norms(ops, exchange)
        together = torch.stack([norms, self.last_norm])
        _, [mean] = exchange.mean_over_replicas([together], [()], [self.table.shards.axes], "norms")
        mean_norm, last = mean
        ratio = torch.where(mean_norm > 0, of_mean / mean_norm, 0.0)
        self.last_norm.copy_(torch.where(last < 0, NO_NORM, last * ratio))


@contextmanager
def averaged(table: Table, exchange: Exchange) -> Iterator[None]:
    """Hold the mean over replicas of the parameters inside the context, this replica's own after it."""
    with torch.no_grad():
        X = [local_tensor(p) for p in table.params]
        own = [x.clone() for x in X]
        exchange.average_(X, table.copied, "parameters")
        while not exchange.settled():  # between fewer replicas by now
            copy_into(X, own)
            exchange.average_(X, table.copied, "parameters")
        reshard_gathered_modules()
    try:
        yield
    finally:
        with torch.no_grad():
            copy_into([local_tensor(p) for p in table.params], own)
            reshard_gathered_modules()


def assign(target: Tensor, value: Any) -> None:
    """Copy a saved value into a state tensor in place; the target keeps its dtype, device and placement."""
    if isinstance(target, DTensor):
        if not isinstance(value, DTensor):
            mesh, placements = target.device_mesh, target.placements
            value = distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
        elif value.placements != target.placements:
            value = value.redistribute(target.device_mesh, target.placements)
    local_tensor(target).copy_(local_tensor(value) if isinstance(value, Tensor) else torch.as_tensor(value))


def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors in place."""
    if targets:
        torch._foreach_copy_(list(targets), list(values))


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient, zeros where there is none."""
    return torch.zeros_like(like) if grad is None else grad
