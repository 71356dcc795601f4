"""local_update="dion2": Muon's update of the rows or columns whose momentum is largest."""

import torch
from torch import Tensor

from curvadion.rules.base import Rule, Step, slices_first
from curvadion.rules.orthonormal import ITERATION, Slices, orthonormalized
from curvadion.sharding.blocks import output_dim
from curvadion.sharding.layout import Layout
from curvadion.state.batch import Batch
from curvadion_kernels.reference import compute_dtype


class Dion2(Rule):
    """An orthonormalized update of k slices of the momentum: rows if rows <= columns, else columns; with
    weight_layout="in_out" of a square matrix columns, which are its outputs.

        K       = the k slices of m_i with the largest L1 norms; of equal ones the first
        O       = newton_schulz(m_i[K])                                 (k, columns)  or  (rows, k)
        M_i[K]  <- mu m_i[K],  M_i <- m_i elsewhere                     what was not used does not decay
        X       <- (1 - lr wd) X,  X[K] <- X[K] - lr_local scale O

    k is the rank of "dion": rank_fraction of the shorter side, rounded up to rank_multiple_of. For k = all
    it is "muon". Norms are of whole slices, so that K does not depend on how the matrix is sharded.

    Source: Ahn, Amsel, Langford, "Dion2: A Simple Method to Shrink Matrix in Muon", arXiv:2512.16928; side,
    norm, decay and scale (of the whole matrix) as in its code, github.com/microsoft/dion, dion/dion2.py. That
    selects along the sharded dimension where there is one, in each shard by itself.
    """

    own_options = (*ITERATION, "update_scale")
    uses_rank = True

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        dims = [_side(b.layout, output_dim(step.groups[b.group])) for b in batches]
        short, long = step.side(batches, dims), step.side(batches, [1 - dim for dim in dims])
        momenta = [slices_first(b.momentum, dim) for b, dim in zip(batches, dims, strict=True)]
        M = [m.to(compute_dtype(m.dtype)) for m in momenta]
        # In float64 sums of float32 hardly depend on their order, and near ties not on the layout.
        sizes = long.sum([m.abs().sum(-1, keepdim=True, dtype=torch.float64) for m in M], "norms")
        pairs = zip(short.gather(sizes), batches, strict=True)
        chosen = [_largest(size.squeeze(-1), b.rank) for size, b in pairs]
        # Where the shorter side is sharded, each rank contributes the chosen slices that it has, and all get
        # all k: no more than k slices travel and are multiplied on any layout; "muon" gathers the whole side.
        parts = zip(M, chosen, batches, dims, strict=True)
        selected = short.sum([_select(m, c, b.layout, dim) for m, c, b, dim in parts], "gram")
        slices = [Slices(c.shape[1], dim) for c, dim in zip(chosen, dims, strict=True)]
        for arrived in orthonormalized(step, batches, lambda stack: stack.of(selected[stack.index]), slices):
            for stack, direction in arrived:
                b, dim, c = batches[stack.index].part(stack), dims[stack.index], stack.of(chosen[stack.index])
                m = stack.of(momenta[stack.index])
                place = b.layout.take(_places(c, b.layout.shape[dim]), dim, 1).unsqueeze(-1)
                # One slice of zeros more is what those that were not chosen take.
                update = torch.nn.functional.pad(direction, (0, 0, 0, 1)).gather(1, place.expand_as(m))
                step.move(b, slices_first(update, dim))
                decay = torch.ones_like(place, dtype=compute_dtype(m.dtype))
                m.mul_(decay.masked_fill_(place < c.shape[1], step.groups[b.group]["momentum"]))


def _side(layout: Layout, outputs: int) -> int:
    """Return the dimension of the slices: the shorter one, of equal ones that of the outputs."""
    return outputs if layout.shape[outputs] <= layout.shape[1 - outputs] else 1 - outputs


def _largest(sizes: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest in each row, ascending, (B, k); of equal ones the first."""
    # Not topk, which leaves open which of equal ones it takes.
    return sizes.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values


def _places(chosen: Tensor, count: int) -> Tensor:
    """Return where each of `count` slices is among the chosen ones, k if it is none of them, (B, count)."""
    k = chosen.shape[1]
    places = chosen.new_full((chosen.shape[0], count), k)
    return places.scatter_(1, chosen, torch.arange(k, device=chosen.device).expand_as(chosen))


def _select(m: Tensor, chosen: Tensor, layout: Layout, dim: int) -> Tensor:
    """Return the chosen slices that this rank has, zeros in place of the others.

    Args:
        m: (B, local slices, .).
        chosen: (B, k), indices of slices of the whole matrix.
    """
    if not m.shape[1]:
        return m.new_zeros(*chosen.shape, m.shape[2])
    index = chosen - layout.offset[dim]
    slices = m.gather(1, index.clamp(0, m.shape[1] - 1).unsqueeze(-1).expand(-1, -1, m.shape[2]))
    return torch.where(((index >= 0) & (index < m.shape[1])).unsqueeze(-1), slices, 0.0)
