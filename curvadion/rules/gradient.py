"""local_update="gradient", the paper's text: M_i <- mu m_i,  X_i <- (1 - lr wd) X_i - lr_local G_i."""

from torch import Tensor

from curvadion.rules.base import Rule, Step, local_lr, shrinkage
from curvadion.state.batch import Batch
from curvadion_kernels.reference import SYNCHRONIZE_BIT


class Gradient(Rule):
    """A plain gradient step, which the device takes by itself if the gate's key says "local"."""

    own_options = ()

    def begin(self, step: Step, key: Tensor | int | None) -> None:
        members = step.store.matrices_with("gradient", step.groups)
        if isinstance(key, int):  # in a dry run
            if key >= SYNCHRONIZE_BIT:
                return
            key = None
        if not members:
            return
        of = [step.table.group_of[i] for i in members]
        step.ops.local_step_(
            step.X.take(members),
            step.G.take(members),
            decay=step.numbers.each("local_decay", [shrinkage(group) for group in step.groups], of),
            step_size=step.numbers.each("local_step_size", [local_lr(group) for group in step.groups], of),
            key=key,
        )

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        if not begun:  # the key has kept it from happening
            self.begin(step, None)
        step.postpone_decay(batches)
