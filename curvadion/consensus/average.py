"""consensus="average" and "none": a synchronized step is one that all replicas take alike, Dion's with
means."""

from torch.profiler import record_function

from curvadion.consensus.base import Consensus
from curvadion.rules import local_step
from curvadion.rules.base import Step
from curvadion.rules.dion import dion_step
from curvadion.rules.scalar import mean_gradients, scalar_step


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


class Drifting(Average):
    """The literal formula: parameters are never averaged, and drift."""

    leaves_apart = True
    averages = False
