"""consensus="average" and "none": a synchronized step is one that all replicas take alike, Dion's with
means."""

import math

from torch.profiler import record_function

from curvadion.consensus.base import Consensus
from curvadion.rules import RULES, local_step
from curvadion.rules.base import Step
from curvadion.rules.dion import dion_step
from curvadion.rules.scalar import mean_gradients, scalar_step
from curvadion.state.batch import Batch


class Average(Consensus):
    """After local steps X_i <- E_i[X_i], moments too, Q <- Q_0; then P, R and AdamW's gradients averaged."""

    group_options = ("update_scale",)
    uses_Q = True

    def step(self, step: Step, *, synchronize: bool) -> None:
        if not synchronize:
            return local_step(step, begun=True)
        with record_function("curvadion::synchronized_step"):
            average = self.averages and step.schedule.apart
            step.store.make_common(step.X, step.exchange, average=average)
            dion_step(step, step.store.batches, synchronized=True)
            scalar_step(step, mean_gradients(step))

    def bytes_sent(self, step: Step, index: int, batch: Batch | None, *, apart: bool) -> float:
        layout = step.table.layouts[index] if batch is None else batch.layout
        numel, dtype = math.prod(layout.shape), step.table.params[index].dtype
        parameter, wire = numel * dtype.itemsize if apart and self.averages else 0, step.payload_dtype
        if batch is None:
            moments = step.store.moments[index].values() if parameter else ()
            return (
                numel * (wire or dtype).itemsize + parameter + sum(numel * m.dtype.itemsize for m in moments)
            )
        m, n, Q = max(batch.layout.shape), min(batch.layout.shape), batch.right_factor.dtype.itemsize
        rule = RULES[step.groups[batch.group]["local_update"]]
        own_Q = n * batch.rank * Q if apart and rule.uses_Q else 0
        spans = {"matrix": numel, "rows": batch.layout.shape[0], "columns": batch.layout.shape[1]}
        kept = sum(spans[s.spread] * batch.kept[s.name].dtype.itemsize for s in batch.specs if parameter)
        # Every rank that has rows of P says whether the matrix has a gradient.
        flags = step.exchange.shards.count(batch.rows)
        factors = ((m + n) * batch.rank + flags) * (wire.itemsize if wire else Q)
        return factors + parameter + kept + own_Q


class Drifting(Average):
    """The literal formula: parameters are never averaged, and drift."""

    leaves_apart = True
    averages = False
