"""What a user sees of an optimizer between its steps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from curvadion import metrics
from curvadion.consensus import Consensus
from curvadion.explain import Explanation, explain
from curvadion.gate.ask import Gate
from curvadion.gate.schedule import Schedule
from curvadion.gate.trouble import Trouble
from curvadion.rooms import Rooms
from curvadion.sharding.ledger import Ledger


class View(torch.optim.Optimizer):
    """An optimizer of rooms as it looks from outside. Nothing here communicates."""

    _rooms: Rooms | None = None
    _schedule: Schedule
    _gate: Gate
    _trouble: Trouble
    _consensus: Consensus
    _inside: str  # the context that parameters are exchanged in for the time being, as it is called

    @property
    def _built(self) -> Rooms:
        assert self._rooms is not None, "built in __init__"
        return self._rooms

    @property
    def replicas(self) -> int:
        """The number K of replicas."""
        return self._built.exchange.replicas

    @property
    def diverged(self) -> bool:
        """Whether replicas may differ: any step since `synchronize()`, a load or `discard_divergence()`."""
        return self._schedule.diverged

    @property
    def in_consensus(self) -> bool:
        """Whether somebody is inside `consensus()` or `common_state()`, where the parameters are those that
        the replicas have in common."""
        return bool(self._inside)

    @property
    def ledger(self) -> Ledger:
        """Calls and bytes of this rank, by (axis, purpose), since construction."""
        return self._built.exchange.ledger

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as in every torch optimizer; M with all decay, also what a kernel postponed."""
        if self._rooms is not None:
            self._built.store.settle()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    @property
    def kernels(self) -> str:
        """Where the hot operations run: "triton" or "reference"."""
        return self._built.ops.kernels

    @property
    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `metrics()["curvadion/rmmc_argmax"]`.

        An unnamed one has its position for a name; a name that was there before gets its position appended.
        """
        return list(self._built.table.matrix_names)

    @property
    def owners(self) -> dict[str, int]:
        """The global rank that orthonormalizes each matrix of Muon steps, or makes factors of each of Dion
        steps, for its replica or for all of them; as far as steps have been taken, and without those on which
        all ranks work together."""
        built = self._built
        crews = [built.owners] if built.common_owners is None else [built.owners, built.common_owners]
        found = {k: crew.crew.members[owner] for crew in crews for k, owner in crew.owner_of.items()}
        return {built.table.matrices[k].name: rank for k, rank in sorted(found.items())}

    def explain(self) -> Explanation:
        """Return what becomes of each parameter, a list of `Row`; str() of it is a table.

        Names, shapes, groups, rules, learning rates, ranks, owners, and bytes between replicas; see
        `assert_routing` for tests.
        """
        apart = self.replicas > 1 and self._schedule.options.max_local_steps != 0
        return explain(self.param_groups, self._built, self._consensus, self.owners, apart=apart)

    def named_rmmc(self) -> dict[str, float]:
        """Return each matrix's RMMC of the last step on this replica, or NaN; reads from the device."""
        return dict(zip(self.matrix_names, self._gate.rmmc.tolist(), strict=True))

    def gate_values(self) -> dict[str, float]:
        """Return what the gate's signal saw when it was asked last, by name; reads from the device.

        "variance" with gate="drift"; nothing with "rmmc", which `named_rmmc` and `metrics` tell.
        """
        return {name: float(value) for name, value in self._gate.signal.values().items()}

    def drift(self) -> tuple[float, float] | None:
        """Return what this rank's part of the last outer step says about how far apart replicas were.

        Sums of squares of (X_0 - X_i) - D, this replica's own way minus the common one, and of D; reads from
        the device. Summed over the shards, the root of their ratio is the relative distance of this replica
        from the mean. None without consensus="outer" and before its first step.
        """
        apart = self._consensus.drift()
        if apart is None:
            return None
        own, common = apart.tolist()
        return own, common

    def metrics(self) -> dict[str, float]:
        """Return what the last step did and totals since construction, by the keys of `metrics.collect`.

        Floats; no collective, no device access.
        """
        rooms = (self._schedule, self._gate.decision, self._trouble, self.ledger, self.param_groups)
        return metrics.collect(*rooms, dense_bytes=self._built.dense_bytes, replicas=self.replicas)
