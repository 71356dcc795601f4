"""What a signal of the gate is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvadion.gate.schedule import Plan
from curvadion.rules.base import Step


class Reading(NamedTuple):
    """What a signal makes of a step, on the device.

    Attributes:
        norm, rmmc: (L,) float32, ||m_t|| and RMMC of every matrix.
        key: this replica's gate key, a 0-d int64.
    """

    norm: Tensor
    rmmc: Tensor
    key: Tensor


class Signal:
    """Decides on the device whether this step should be synchronized. One object for each optimizer.

    The message that all signals start from, (L + 2,) float32 and summed over the shards: squared norms of the
    momenta; ranks that saw a non-finite value (NaN: a rank failed); ranks that must synchronize.

    Attributes:
        needs_equal_replicas: it means something only if replicas are equal after a synchronized step.
        waits_for_replicas: it communicates between replicas in every step that asks, which the step waits
            for; refused with gate_lag=1, which is there to wait for nothing.
    """

    needs_equal_replicas = False
    waits_for_replicas = False

    def attach(self, step: Step) -> None:
        """Make ready for these parameters, at construction and after a group was added."""

    def read(self, step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
        """Return what the gate needs to know; collectives are allowed where plan.ask or plan.ask_later.

        Args:
            taus: the threshold of every group of `step.groups`.
        """
        tau = step.numbers.on_device("tau", taus, step.table.group_of_matrix, torch.float32)
        return Reading(*step.ops.gate_key(message, step.store.last_norm, tau, hold_closed=plan.hold_closed))

    def took(self, step: Step, synchronized: bool) -> None:
        """Learn that a step was taken; collectives over the shards are allowed where it was synchronized."""

    def forget(self) -> None:
        """Start anew: replicas are equal."""

    def values(self) -> dict[str, Any]:
        """Return numbers of the last time it was asked, by name, 0-d tensors on the device."""
        return {}
