"""local_update="muon": M_i <- mu m_i, X_i <- (1 - lr wd) X_i - lr_local sqrt(rows/columns) newton_schulz(m_i)"""

from collections.abc import Sequence

from curvadion.algebra.newton_schulz import newton_schulz
from curvadion.algebra.side import Tensors
from curvadion.rules.base import Rule, Step
from curvadion.state.batch import Batch


class Muon(Rule):
    """An orthonormalized momentum of full rank."""

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        for b, direction in zip(batches, orthonormalized(step, batches, [b.M for b in batches]), strict=True):
            step.move(b, direction)
        step.postpone_decay(batches)


def orthonormalized(step: Step, batches: Sequence[Batch], M: Tensors) -> Tensors:
    """Return newton_schulz(M) of matrices in the orientation of `Batch.M`, in that of X: (B, rows,
    columns)."""
    directions = newton_schulz(M, rows=step.rows(batches), columns=step.columns(batches))
    return [d.mT if b.layout.transposed else d for b, d in zip(batches, directions, strict=True)]
