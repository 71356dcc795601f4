"""An optimizer whose replicas may leave and come back: what a newcomer is given, and when it is let in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.sharding.agreement import ReplicaMismatchError, hash_text
from curvadion.sharding.elastic import ElasticGroup
from curvadion.sharding.layout import local_tensor, reshard_gathered_modules
from curvadion.state.store import copy_into
from curvadion.stateful import Stateful


class Elastic(Stateful):
    """An optimizer that takes an `ElasticGroup` for its replicas."""

    _also: Mapping[str, Any] = {}

    @property
    def _elastic(self) -> ElasticGroup | None:
        return self._peers if isinstance(self._peers, ElasticGroup) else None

    @torch.no_grad()
    def join(self, **also: Any) -> int:
        """Join the other replicas of an `ElasticGroup`, once, before the first step; every rank calls it.

        Returns the number of steps taken: 0 at the start of a run, or what was loaded, or what the others
        have come to, whose state this replica has then taken over: X_0 for its parameters, U, and the first
        one's momentum, moments and options of parameter groups (lr among them). Buffers of the model are not
        the optimizer's.

        Args:
            also: what else a newcomer takes over from a peer, by name: objects with `state_dict()` and
                `load_state_dict()`, such as a learning rate schedule.

        Raises:
            ReplicaMismatchError: this replica has other parameters, options or shards than the others.
        """
        self._refuse_inside("join()")
        peers = self._elastic
        if peers is None:
            raise RuntimeError(
                "join() is for replicas that may leave and come back; got "
                f"replicate_mesh={self._peers!r}; pass replicate_mesh=ElasticGroup(...)"
            )
        if peers.shards != self._built.exchange.shards.size:
            raise ValueError(
                "every rank of a replica's process group must hold a shard of its parameters; got "
                f"{peers.shards} ranks and parameters on {self._built.exchange.shards.size}; start each "
                "replica as a job of its own"
            )
        self._also = also
        peers.join(self._schedule.steps, _HandOver(self))
        self._agreement.pending = True
        return self._schedule.steps

    def _welcome(self) -> None:
        """Let in those that waited in the step before, if it was synchronized; what the user does after a
        step, as to a schedule, has been done by now."""
        if self._elastic is not None and self._elastic.welcome(_HandOver(self)):
            self._agreement.pending = True

    def _count_anew(self) -> None:
        """Count tokens from here on for the next synchronization."""
        if self._elastic is not None:
            self._elastic.tokens = 0

    def _refuse_if_elastic(self, call: str, instead: str) -> None:
        if self._elastic is not None:
            raise RuntimeError(
                f"{call} needs all replicas from its beginning to its end, which an ElasticGroup does not "
                f"promise; {instead}"
            )


class _HandOver:
    """What a newcomer lacks, see `curvadion.sharding.elastic.HandOver`."""

    def __init__(self, optimizer: Elastic):
        self._optimizer = optimizer

    def fingerprint(self) -> int:
        optimizer, built = self._optimizer, self._optimizer._built
        groups = [
            (group["algorithm"], group["weight_layout"], cut)
            for group, cut in zip(optimizer.param_groups, built.table.cut_by, strict=True)
        ]
        ranks = [b.rank for b in built.store.kinds]
        state = [(key, tuple(x.shape), x.dtype) for key, x in self._states()]
        also = sorted(optimizer._also)
        return hash_text(repr((optimizer._options.given, built.table.describe(), groups, ranks, state, also)))

    def refuse(self) -> None:
        raise ReplicaMismatchError(
            "a replica that joins must be built as the others are: the same options, list of parameters, "
            "groups and shards, and the same names in join(); they differ; compare the command lines"
        )

    def note(self) -> dict[str, Any]:
        optimizer = self._optimizer
        optimizer._cycled.follow(optimizer.param_groups)
        return {
            "groups": [
                {k: v for k, v in group.items() if k not in ("params", "param_names")}
                for group in optimizer.param_groups
            ],
            "apart": optimizer._consensus.under_way,
            "diverged": optimizer.diverged,
            "also": {name: thing.state_dict() for name, thing in optimizer._also.items()},
        }

    def tensors(self) -> list[Tensor]:
        optimizer, built = self._optimizer, self._optimizer._built
        X_0 = optimizer._consensus.common(built.store).get("X_0", built.X())
        return [*X_0, *(x for _, x in self._states())]

    def _states(self) -> list[tuple[str, Tensor]]:
        optimizer = self._optimizer
        states = [optimizer.state[p] for p in optimizer._built.table.params]
        return [(key, local_tensor(state[key])) for state in states for key in sorted(state)]

    def take(self, tensors: Sequence[Tensor], note: dict[str, Any]) -> None:
        optimizer, X = self._optimizer, self._optimizer._built.X()
        copy_into(X, tensors[: len(X)])
        copy_into([x for _, x in self._states()], tensors[len(X) :])
        reshard_gathered_modules()
        for group, theirs in zip(optimizer.param_groups, note["groups"], strict=True):
            group.update(theirs)
        for name, state in note["also"].items():
            optimizer._also[name].load_state_dict(state)
        optimizer._start_afresh()
        if note["apart"]:
            optimizer._consensus.remember(X)
        optimizer._schedule.diverged = note["diverged"]
