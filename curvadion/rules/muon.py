"""local_update="muon": M_i <- mu m_i, X_i <- (1 - lr wd) X_i - lr_local scale newton_schulz(m_i)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvadion.algebra.newton_schulz import Iteration, newton_schulz
from curvadion.algebra.side import Tensors
from curvadion.rules.base import Rule, Step
from curvadion.state.batch import Batch
from curvadion.state.store import or_zeros

ITERATION = ("newton_schulz", "newton_schulz_steps", "newton_schulz_dtype")


class Muon(Rule):
    """An orthonormalized momentum of full rank; with nesterov, of G_i + mu m_i in place of m_i.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Where the momentum
    is an average there, (1 - mu) m_i and with Nesterov (1 - mu) (G_i + mu m_i), the direction is the same.
    """

    own_options = (*ITERATION, "nesterov", "update_scale")

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        for b, direction in zip(batches, orthonormalized(step, batches), strict=True):
            step.move(b, direction)
        step.postpone_decay(batches)


def orthonormalized(step: Step, batches: Sequence[Batch]) -> Tensors:
    """Return newton_schulz of what `ahead` returns, in the orientation of X: (B, rows, columns)."""
    directions: dict[int, Tensor] = {}
    for how, members in by_iteration(step, batches):
        chosen = [batches[k] for k in members]
        M = [ahead(step, b) for b in chosen]
        sides = {"rows": step.rows(chosen), "columns": step.columns(chosen)}
        found = newton_schulz(M, how, **sides, product=step.ops.symmetric_product)
        directions |= zip(members, found, strict=True)
    return [directions[k].mT if b.layout.transposed else directions[k] for k, b in enumerate(batches)]


def by_iteration(step: Step, batches: Sequence[Batch]) -> list[tuple[Iteration, list[int]]]:
    """Return the positions of the batches that are iterated alike, in the same order on all ranks."""
    alike: dict[Iteration, list[int]] = {}
    for k, b in enumerate(batches):
        alike.setdefault(Iteration.of(step.groups[b.group], b.momentum), []).append(k)
    return list(alike.items())


def ahead(step: Step, batch: Batch) -> Tensor:
    """Return m_i, or with nesterov G_i + mu m_i, where the next step's momentum will be without its gradient:
    in the orientation and dtype of `Batch.M`."""
    group, M = step.groups[batch.group], batch.M
    if not group["nesterov"]:
        return M
    X = [step.X[i] for i in batch.params]
    G = torch.stack([or_zeros(g, x) for g, x in zip(step.gradients(batch), X, strict=True)]).to(M.dtype)
    return torch.add(G.mT if batch.layout.transposed else G, M, alpha=group["momentum"])
