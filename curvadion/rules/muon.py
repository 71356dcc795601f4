"""local_update="muon": M_i <- mu m_i, X_i <- (1 - lr wd) X_i - lr_local sqrt(rows/columns) newton_schulz(m_i)"""

from curvadion.rules.base import Rule, Step
from curvadion.rules.orthonormal import orthonormalized
from curvadion.state.batch import Batch


class Muon(Rule):
    """An orthonormalized momentum of full rank."""

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        for some in orthonormalized(step, batches):
            for stack, direction in some:
                step.move(batches[stack.index].part(stack), direction)
        step.postpone_decay(batches)
