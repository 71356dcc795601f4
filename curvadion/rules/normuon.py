"""local_update="normuon": Muon's update, each row divided by the root of a running mean of its squares."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvadion.rules.base import Step, slices_first
from curvadion.rules.muon import Muon
from curvadion.sharding.blocks import output_dim
from curvadion.state.batch import Batch, StateSpec

SECOND_MOMENT = StateSpec("second_moment", "rows")


class NorMuon(Muon):
    """Muon with rows (output neurons) of like size in the long run; the whole update is as large as Muon's.

        O     = newton_schulz(m_i), with nesterov of G_i + mu m_i           (rows, columns)
        v     <- beta2 v + (1 - beta2) mean of O^2 over the columns         (rows,)
        O_hat = O / (sqrt(v) + eps), row by row                             (rows, columns)
        M_i   <- mu m_i
        X     <- (1 - lr wd) X - lr_local scale (||O||_F / ||O_hat||_F) O_hat

    beta2 is the group's betas[1], eps its eps. That v starts at zero needs no correction: 1 - beta2^t would
    be a factor of all rows, and the norms cancel it. Rows are the parameter's, even if it has fewer of them;
    with weight_layout="in_out" its columns take their place.

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, for v and O_hat.
    The paper steps by 0.2 lr sqrt(rows columns) / ||O_hat||_F, so that the root mean square of entries is
    0.2 lr; the authors' code, github.com/zichongli5/NorMuon, keeps ||O||_F, as this does: the learning rate
    means what it does with "muon". Their momentum is an average, in the code with Nesterov, here an option.
    """

    state = (SECOND_MOMENT,)

    def state_of(self, group: Mapping[str, Any]) -> tuple[StateSpec, ...]:
        return self.state if output_dim(group) == 0 else (StateSpec(SECOND_MOMENT.name, "columns"),)

    def move(self, step: Step, batches: list[Batch], directions: list[Tensor]) -> None:
        moments = [b.kept[SECOND_MOMENT.name] for b in batches]
        dims = [output_dim(step.groups[b.group]) for b in batches]
        directions = [
            slices_first(d.to(v.dtype), dim) for d, v, dim in zip(directions, moments, dims, strict=True)
        ]
        over_rows, over_columns = step.side(batches, dims), step.side(batches, [1 - dim for dim in dims])
        squares = over_columns.sum([d.square().sum(-1) for d in directions], "norms")
        factors = [_factor(step, b, s) for b, s in zip(batches, squares, strict=True)]
        # ||O||_F^2 and ||O_hat||_F^2 from the squares of rows. First the root, because the square of the
        # factor of a row of zeros may overflow.
        both = [
            torch.stack([s, (s.sqrt() * f).square()], dim=-1).sum(1)
            for s, f in zip(squares, factors, strict=True)
        ]
        norms = over_rows.sum(both, "norms")
        for b, direction, dim, factor, norm in zip(batches, directions, dims, factors, norms, strict=True):
            before, after = norm.unbind(-1)
            rescaled = torch.where(after > 0, before / after, 0.0).sqrt().unsqueeze(-1) * factor
            step.move(b, slices_first(direction * rescaled.unsqueeze(-1), dim))


def _factor(step: Step, batch: Batch, squares: Tensor) -> Tensor:
    """Update v with the sums of squares of whole rows; return 1 / (sqrt(v) + eps), 0 for 1 / 0: (B, rows)."""
    group, v = step.groups[batch.group], batch.kept[SECOND_MOMENT.name]
    beta2 = group["betas"][1]
    v.mul_(beta2).add_(squares, alpha=(1 - beta2) / batch.layout.shape[1 - output_dim(group)])
    divisor = v.sqrt() + group["eps"]
    return torch.where(divisor > 0, 1 / divisor, 0.0)
