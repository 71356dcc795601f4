"""What a signal of the gate is."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from curvadion.allowed import Option
from curvadion.gate.schedule import Plan
from curvadion.rules.base import Step
from curvadion_kernels.reference import FAILED_KEY, NONFINITE_BIT, SYNCHRONIZE_BIT


class Reading(NamedTuple):
    """What a signal makes of a step, on the device.

    Attributes:
        norm, rmmc: (L,) float32, ||m_t|| and RMMC of every matrix.
        key: this replica's gate key, a 0-d int64.
    """

    norm: Tensor
    rmmc: Tensor
    key: Tensor

    def opening(self, where: Tensor) -> "Reading":
        """Return it with a key that opens the gate where this 0-d bool is true."""
        return self._replace(key=self._with(SYNCHRONIZE_BIT, where))

    def troubled(self, where: Tensor) -> "Reading":
        """Return it with a key that says "not finite" where this 0-d bool is true."""
        return self._replace(key=self._with(NONFINITE_BIT, where))

    def _with(self, bit: int, where: Tensor) -> Tensor:
        # "A rank could not do its part" must stay what it is.
        return torch.where(self.key == FAILED_KEY, self.key, self.key | where * bit)


def measure(step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
    """Return norms and RMMC, and a key that opens the gate where a matrix exceeds its group's tau.

    Args:
        message: see `Signal`.
    """
    tau = step.numbers.on_device("tau", taus, step.table.group_of_matrix, torch.float32)
    return Reading(*step.ops.gate_key(message, step.store.last_norm, tau, hold_closed=plan.hold_closed))


class Signal:
    """Decides on the device whether this step should be synchronized. One object for each optimizer.

    The message that all signals start from, (L + 2,) float32 and summed over the shards: squared norms of the
    momenta; ranks that saw a non-finite value (NaN: a rank failed); ranks that must synchronize.

    Args:
        options: the optimizer's, by name.

    Attributes:
        options: options of the optimizer that it declares; refused with another signal.
        needs_equal_replicas: it means something only if replicas are equal after a synchronized step.
        waits_for_replicas: it communicates between replicas in every step that asks, which the step waits
            for; refused with gate_lag=1, which is there to wait for nothing.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    needs_equal_replicas = False
    waits_for_replicas = False

    def __init__(self, options: Mapping[str, Any]):
        """Take what it needs of the options."""

    def opens(self, step: Step, reading: Reading, taus: list[float]) -> Tensor:
        """Return whether this replica wants the step synchronized, a 0-d bool on the device.

        Called in every step that asks, on all ranks of all replicas; collectives are allowed.

        Args:
            reading: norms and RMMC of this step.
            taus: the threshold of every group of `step.groups`.
        """
        raise NotImplementedError

    def attach(self, step: Step) -> None:
        """Make ready for these parameters, at construction and after a group was added."""

    def read(self, step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
        """Return what the gate needs to know; collectives are allowed where plan.ask or plan.ask_later."""
        reading = measure(step, message, [math.inf] * len(taus), plan)
        if not (plan.ask or plan.ask_later):
            return reading
        return reading.opening(self.opens(step, reading, taus) & (not plan.hold_closed))

    def took(self, step: Step, synchronized: bool) -> None:
        """Learn that a step was taken; collectives over the shards are allowed where it was synchronized."""

    def forget(self) -> None:
        """Start anew: replicas are equal."""

    def values(self) -> dict[str, Any]:
        """Return numbers of the last time it was asked, by name, 0-d tensors on the device."""
        return {}
