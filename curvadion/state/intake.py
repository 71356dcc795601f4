"""What comes in at each step: this rank's shards of parameters and gradients, and whether they are what they
were."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.sizes import rank_of
from curvadion.allowed import check_options
from curvadion.options import GROUP_OPTIONS, check_decay
from curvadion.rules import RULES
from curvadion.sharding.blocks import cut_by
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.layout import (
    is_dense,
    local_tensor,
    local_tensors,
    partial_axes,
    usual_gradients,
)
from curvadion.sharding.region import Axes
from curvadion.state.batch import Batch
from curvadion.state.memory import repeats
from curvadion.state.store import or_zeros
from curvadion.state.table import Table
from curvadion_kernels.reference import Fixed


class Intake:
    """Reads shards of parameters and gradients; never raises over them, for other ranks have to hear of it.

    Args:
        table: the parameters as they were laid out.
        batches: the matrices, stacked.
        exchange: sums gradients that tensor parallelism leaves partial.
        groups: the parameter groups, as they were built.
    """

    def __init__(
        self,
        table: Table,
        batches: Sequence[Batch],
        exchange: Exchange,
        groups: Sequence[Mapping[str, Any]],
    ):
        self._table, self._batches, self._exchange = table, batches, exchange
        self._layouts = [group["weight_layout"] for group in groups]
        self._algorithms = [group["algorithm"] for group in groups]
        self._X: Fixed[Tensor] | None = None
        self._dtypes = [p.dtype for p in table.params]
        self._changed_parameters: list[str] = []  # names of those that have another shape or dtype
        self._partial: dict[int, tuple[Axes, int]] = {}  # parameters whose gradients came Partial once

    def parameters(self) -> Fixed[Tensor]:
        """Return this rank's part of all parameters: the same object as long as nobody moved them."""
        X = Fixed(local_tensors(self._table.params))
        # Looked up now: it remembers them, and the next step compares.
        addresses = () if self._table.dry else X.addresses
        before = () if self._table.dry or self._X is None else self._X.addresses
        if self._X is None or not all(map(operator.is_, X, self._X)) or addresses != before:
            self._X = X
            known = zip(self._table.names, X, self._table.layouts, self._dtypes, strict=True)
            self._changed_parameters = [
                name
                for name, x, layout, dtype in known
                if tuple(x.shape) != layout.local_shape or x.dtype != dtype
            ]
        return self._X

    def gradients(
        self, groups: Sequence[dict[str, Any]], scale: Tensor | None
    ) -> tuple[Fixed[Tensor | None], Exception | None]:
        """Return this rank's part of all gradients, None for a missing one, and what is wrong with them or
        the groups.

        Args:
            groups: the parameter groups, as the user left them.
            scale: what a GradScaler has multiplied the loss by, None for nothing.
        """
        failure: Exception | None = None
        try:
            self._check_groups(groups)
        except Exception as error:
            failure = error
        table = self._table
        grads = [p.grad for p in table.params]
        usual = None if self._partial else usual_gradients(table.params, grads, table.placements)
        G: Fixed[Tensor | None] = Fixed(usual or ())
        try:
            parts = (G.take(table.weights), G.take(table.scalars)) if usual is not None else ()
            fine = tuple(part.numels for part in parts) == table.numels and all(
                part.contiguous for part in parts
            )
        except RuntimeError:  # not strided
            fine = False
        if not fine:
            G, strange_failure = self._inspect(grads)
            failure = failure or strange_failure
        if failure is not None:  # what does not fit must not reach a kernel
            G = Fixed([None] * len(G))
        if scale is not None and G.present:
            torch._foreach_mul_(G.present, float(1 / scale))
        return G, failure

    def _inspect(self, grads: Sequence[Tensor | None]) -> tuple[Fixed[Tensor | None], Exception | None]:
        """Do what `gradients` does, one by one."""
        X = self.parameters()
        G: list[Tensor | None] = []
        failure: Exception | None = None
        for i, (p, x, g) in enumerate(zip(self._table.params, X, grads, strict=True)):
            try:
                g = self._inspect_one(i, p, x, g)
            except Exception as error:
                failure, g = failure or error, None
            G.append(g)
        self._sum_partial(X, G)
        return Fixed(G), failure

    def _inspect_one(self, i: int, p: Tensor, x: Tensor, g: Tensor | None) -> Tensor | None:
        name, shards = self._table.names[i], self._table.shards
        if not p.requires_grad:
            raise RuntimeError(self._changed(f"off for {name!r}"))
        if g is None:
            return None
        axes, divisor = partial_axes(g, p, shards)
        if axes:
            self._partial[i] = axes, divisor
        g = local_tensor(g)
        if (
            i in self._partial and not axes
        ):  # whole this time; summed all the same, for all ranks to do the same
            g = g * (self._partial[i][1] / shards.count(self._partial[i][0]))
        if not is_dense(g) or g.shape != x.shape:
            raise ValueError(
                f"a gradient must be dense and shaped like its parameter's shard {tuple(x.shape)}; got a "
                f"{type(g).__name__} of layout {g.layout}, {tuple(g.shape)} for {name!r}; use dense "
                "gradients (nn.Embedding(sparse=False))"
            )
        return g.contiguous() if repeats(g) else g

    def _changed(self, how: str) -> str:
        if self._exchange.elastic:
            return (
                "the replicas of an ElasticGroup cannot follow a change of requires_grad; it was switched "
                f"{how}; save, end all of them, and start them again with it so"
            )
        return (
            "requires_grad must not change between synchronize() and step(), where there are several ranks; "
            f"it was switched {how}; change it on every rank, and call opt.synchronize() there before the "
            "next step"
        )

    def _sum_partial(self, X: Sequence[Tensor], G: list[Tensor | None]) -> None:
        """Sum the gradients that tensor parallelism leaves Partial over the axes they are partial on."""
        members = sorted(self._partial)
        axes = [self._partial[i][0] for i in members]
        wanted = [or_zeros(G[i], X[i]) for i in members]
        summed = self._exchange.sum_over_shards(wanted, axes, "partial_gradients")
        for i, g in zip(members, summed, strict=True):
            G[i] = g / self._partial[i][1]

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise if parameters or options were changed in a way that this optimizer cannot follow."""
        current = [p for group in groups for p in group["params"]]
        if list(map(id, current)) != list(map(id, self._table.listed)):
            raise RuntimeError(
                "the parameters in param_groups must be those the optimizer was built with; they were "
                "replaced; construct CurvaDion after the model is sharded, wrapped and moved"
            )
        if self._changed_parameters:
            raise RuntimeError(
                "parameters must keep the shapes and dtypes they had at construction; "
                f"{', '.join(self._changed_parameters[:5])} changed; construct CurvaDion after the model is "
                "cast and moved"
            )
        if any(p.requires_grad for p in self._table.frozen):
            raise RuntimeError(self._changed("on for some parameter"))
        for group, cut, algorithm in zip(groups, self._table.cut_by, self._algorithms, strict=True):
            _check_there(group, GROUP_OPTIONS)
            check_options(group, GROUP_OPTIONS, " in a parameter group")
            check_decay(group)
            if group["algorithm"] != algorithm:
                raise ValueError(
                    "the algorithm of a group must stay as it was at construction, for its state is of that: "
                    f"{algorithm!r}; got {group['algorithm']!r}; construct a new optimizer to change it"
                )
            if cut_by(group) != cut:
                raise ValueError(
                    "splits, the dimension that they cut, and batch_dims must stay as they were at "
                    f"construction; got {cut_by(group)} for {cut}; construct a new optimizer for them"
                )
            if own := RULES[group["local_update"]].options:
                _check_there(group, own)
                check_options(
                    group, {k: option.allowed for k, option in own.items()}, " in a parameter group"
                )
        for b in self._batches:
            self._check_batch(b, groups[b.group])

    def _check_batch(self, b: Batch, group: Mapping[str, Any]) -> None:
        r = rank_of(min(b.layout.shape), group["rank_fraction"], group["rank_multiple_of"])
        if r != b.rank:
            raise ValueError(
                f"rank_fraction and rank_multiple_of must stay as they were at construction; got r = {r} "
                f"for {b.rank}; construct a new optimizer to change the rank"
            )
        if group["weight_layout"] != self._layouts[b.group]:
            raise ValueError(
                "weight_layout must stay as it was at construction, for state lies along the outputs: "
                f"{self._layouts[b.group]!r}; got {group['weight_layout']!r}; construct a new optimizer to "
                "change it"
            )
        rule = RULES[group["local_update"]]
        if not {spec.name for spec in rule.state} <= b.kept.keys() or (rule.uses_Q and b.Q is None):
            raise ValueError(
                "local_update may change to a rule that needs no state but what there is, or to the one it "
                f"was built with; got {group['local_update']!r}; construct a new optimizer for it"
            )


def _check_there(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if not options.keys() <= group.keys():
        missing = ", ".join(sorted(options.keys() - group.keys()))
        raise ValueError(f"a parameter group must keep its options; {missing} went missing; set them again")
