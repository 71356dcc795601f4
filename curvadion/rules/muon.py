"""local_update="muon": M_i <- mu m_i, X_i <- (1 - lr wd) X_i - lr_local scale newton_schulz(m_i)."""

import torch
from torch import Tensor

from curvadion.rules.base import Rule, Step
from curvadion.rules.orthonormal import ITERATION, orthonormalized
from curvadion.state.batch import Batch
from curvadion.state.store import or_zeros
from curvadion_kernels.reference import compute_dtype


class Muon(Rule):
    """An orthonormalized momentum of full rank; with nesterov, of G_i + mu m_i in place of m_i.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Where the momentum
    is an average there, (1 - mu) m_i and with Nesterov (1 - mu) (G_i + mu m_i), the direction is the same.
    """

    own_options = (*ITERATION, "nesterov", "update_scale")

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        for arrived in orthonormalized(
            step, batches, lambda stack: ahead(step, batches[stack.index].part(stack))
        ):
            parts = [batches[stack.index].part(stack) for stack, _ in arrived]
            self.move(step, parts, [direction for _, direction in arrived])
        step.postpone_decay(batches)

    def move(self, step: Step, batches: list[Batch], directions: list[Tensor]) -> None:
        """Move the X of these batches along orthonormal directions, (B, rows, columns)."""
        for b, direction in zip(batches, directions, strict=True):
            step.move(b, direction)


def ahead(step: Step, batch: Batch) -> Tensor:
    """Return m_i, or with nesterov G_i + mu m_i, where the next step's momentum will be without its gradient:
    (B, rows, columns)."""
    group, M = step.groups[batch.group], batch.momentum
    if not group["nesterov"]:
        return M
    X = step.matrices(batch)
    G = torch.stack([or_zeros(g, x) for g, x in zip(step.gradients(batch), X, strict=True)])
    wide = compute_dtype(M.dtype)
    return torch.add(G.to(wide), M.to(wide), alpha=group["momentum"])
