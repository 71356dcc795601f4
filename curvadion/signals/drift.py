"""gate="drift": how far replicas have come apart, estimated from two numbers of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.gate.schedule import Plan
from curvadion.rules.base import Step
from curvadion.signals.base import Reading, Signal


class Drift(Signal):
    """Opens when the variance of the replicas' drift exceeds tau (the smallest of all groups).

        u_i = X_i - X_0,    Var = E||u_i||^2 - ||E u_i||^2  <=  E||u_i||^2 - (E <xi, u_i>)^2,    |xi| = 1

    X_0 are the parameters after the last synchronized step and xi is the direction from the X_0 before to
    this one, zero at first; the right-hand side is the linear estimate of FDA, never too small. Two float32
    numbers of each replica are averaged (purpose "drift" in the ledger), whenever the gate is asked; the step
    waits for them, so that gate_lag=1 would gain nothing and is refused. Two more copies of the parameters in
    memory; nothing of it is in a checkpoint, for which `synchronize()` starts anew. An X that is not finite
    counts as a gradient that is not.

    Source: Theologitis et al., "Communication-Efficient Distributed Deep Learning via Federated Dynamic
    Averaging", arXiv:2405.20988.
    """

    needs_equal_replicas = True
    waits_for_replicas = True

    def __init__(self, options: Mapping[str, Any]):
        self._X0: list[Tensor] = []
        self._direction: list[Tensor] = []  # not yet of unit length, zero in parameters beyond its end
        self._length: Tensor | None = None  # of it; None: there is none
        self._variance = torch.empty(0)  # empty before the first estimate

    def attach(self, step: Step) -> None:
        # A group that is added comes last, and what there is of the others goes on: it is common, and they
        # may be apart. The last one may have been taken back.
        del self._X0[len(step.X) :], self._direction[len(step.X) :]

    def forget(self) -> None:
        self._X0, self._direction, self._length, self._variance = [], [], None, torch.empty(0)

    def read(self, step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
        shapes = [layout.local_shape for layout in step.table.layouts]
        if len(self._X0) < len(shapes) and [tuple(x.shape) for x in step.X] == shapes:  # else the step fails
            self._X0 += [x.clone() for x in step.X[len(self._X0) :]]
        reading = super().read(step, message, taus, plan)
        asked = plan.ask or plan.ask_later
        return reading.troubled(~self._variance.isfinite()) if asked else reading

    def opens(self, step: Step, reading: Reading, taus: list[float]) -> Tensor:
        self._variance = self._estimate(step)
        pairs = zip(taus, step.groups, strict=True)
        return self._variance > min(
            (tau for tau, g in pairs if g.get("algorithm") == "dion"), default=math.inf
        )

    def _estimate(self, step: Step) -> Tensor:
        """Return E||u_i||^2 - (E <xi, u_i>)^2, a 0-d float32 that is the same on all ranks."""
        try:
            apart = self._apart(step)
            numbers = torch.stack([self._dot(step, apart, apart), self._dot(step, apart, self._direction)])
        except (RuntimeError, ValueError):  # parameters are not what they were; the others wait
            numbers = torch.full((2,), torch.nan, device=step.table.device)
        numbers = step.exchange.sum_over_all_shards(numbers, "drift")
        axes = step.table.shards.axes
        _, [mean] = step.exchange.mean_over_replicas([numbers], [()], [axes], "drift")
        along = mean[1] / self._length if self._length is not None else torch.zeros_like(mean[1])
        return mean[0] - along.square()

    def _apart(self, step: Step) -> list[Tensor]:
        """Return u_i, in float32. Raises RuntimeError if shapes are not what they were."""
        pairs = zip(step.X, self._X0, strict=True)
        if any(x.shape != x0.shape for x, x0 in pairs):
            raise RuntimeError("a parameter has another shape")
        return list(torch._foreach_sub([x.float() for x in step.X], [x0.float() for x0 in self._X0]))

    def _dot(self, step: Step, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Return this rank's part of <a, b>, what several ranks hold counted once; b is zero beyond its
        end."""
        owned = [s for s, first in zip(zip(a, b, strict=False), step.table.first, strict=False) if first]
        if not owned:
            return torch.zeros((), device=step.table.device)
        products = torch._foreach_mul(*(list(side) for side in zip(*owned, strict=True)))
        return torch.cat([product.flatten() for product in products]).sum()

    def took(self, step: Step, synchronized: bool) -> None:
        if not synchronized:
            return
        self._direction = self._apart(step)
        squared = step.exchange.sum_over_all_shards(
            self._dot(step, self._direction, self._direction), "drift"
        )
        self._length = squared.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        torch._foreach_copy_(self._X0, list(step.X))

    def values(self) -> dict[str, Any]:
        return {"variance": self._variance} if self._variance.numel() else {}
