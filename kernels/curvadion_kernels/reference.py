"""Plain-torch reference of every hot operation of CurvaDion: the definition that a fused kernel must reproduce.

Runs wherever torch runs. Low-precision tensors are computed in float32 (float64 stays float64) and rounded once, when they
are stored. Nothing here talks to other ranks, and nothing here reads a device value back to the host.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# The gate's message, one int64 whose MAX over the replicas is the gate (non-negative floats order like integers):
#   bit 62       a non-finite value was seen
#   bit 61       the replicas must synchronize
#   bits 30..60  the float32 bits of the largest RMMC
#   bits 0..29   INDEX_MASK - (index of that matrix), so that ties go to the lowest index; 0 when no RMMC is defined
NONFINITE_BIT = 1 << 62
SYNCHRONIZE_BIT = 1 << 61
INDEX_BITS = 30
INDEX_MASK = (1 << INDEX_BITS) - 1
FAILED_KEY = (1 << 63) - 1  # larger than any regular key: a rank could not do its part of the step

NO_NORM = -1.0  # last_norm of a matrix that the gate has not seen yet


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are computed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def momentum_norm_(momenta: list[Tensor], grads: Sequence[Tensor | None], *, decay: float = 1.0) -> Tensor:
    """Accumulate the gradients into the momenta and return the squared norms of what was stored.

        m <- decay m + g,    s_l = ||m_l||_F^2

    Args:
        momenta: L local shards, any shapes, changed in place.
        grads: L gradients of the same shapes; None counts as zero.
        decay: the factor of the old momentum, common to all.

    Returns: s, shape (L,), float32. Not finite where a momentum is not.
    Bytes: one read of g, one read and one write of m.
    """
    if decay != 1.0:
        torch._foreach_mul_(momenta, decay)
    present = [(m, g) for m, g in zip(momenta, grads, strict=True) if g is not None]
    if present:
        torch._foreach_add_([m for m, _ in present], [g for _, g in present])
    if not momenta:
        return torch.zeros(0, dtype=torch.float32)
    dtype = functools.reduce(torch.promote_types, {m.dtype for m in momenta}, torch.float32)
    norms = torch._foreach_norm(momenta, 2, dtype=dtype)
    return torch.stack(norms).square().to(torch.float32)


def count_nonfinite(tensors: Sequence[Tensor]) -> Tensor | float:
    """Return how many of the tensors hold a NaN or an infinity (0-d float32, or 0.0 for no tensors).

    Bytes: one read of every tensor.
    """
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return 0.0
    largest = torch.stack([n.to(torch.float32) for n in torch._foreach_norm(tensors, float("inf"))])
    return (~largest.isfinite()).sum(dtype=torch.float32)


def gate_key(sums: Tensor, last_norm: Tensor, tau: Tensor, *, hold_closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the shard-summed squared norms into the RMMC of every matrix and this replica's gate key.

        rmmc_l = | ||m_t||_l - ||m_{t-1}||_l | / ||m_{t-1}||_l

    0 when both norms are 0; undefined (NaN), and a reason to synchronize, when there is no previous norm or it was 0.

    Args:
        sums: (L + 2,) float32: squared norms, count of non-finite tensors (NaN: a rank failed), count of ranks that must synchronize.
        last_norm: (L,) float32, the previous norms, NO_NORM where there is none.
        tau: (L,) float32 thresholds; the comparison is strict.
        hold_closed: do not synchronize on account of RMMC alone.

    Returns: (norm, rmmc, key): (L,), (L,) float32 and a 0-d int64.
    """
    count = last_norm.numel()
    norm = sums[:count].sqrt()
    rmmc = (norm - last_norm).abs() / last_norm
    rmmc = torch.where((norm == 0) & (last_norm == 0), 0.0, rmmc)
    undefined = (last_norm < 0) | ((last_norm == 0) & (norm > 0))
    rmmc = torch.where(undefined, torch.nan, rmmc)

    must = (sums[count + 1] > 0) | undefined.any()
    if not hold_closed:
        must = must | (rmmc > tau).any()
    nonfinite = (sums[count] > 0) | ~norm.isfinite().all()

    index = torch.arange(count, device=sums.device)
    bits = rmmc.nan_to_num(0.0, posinf=torch.inf).view(torch.int32).to(torch.int64)
    ranked = torch.where(rmmc.isnan(), 0, (bits << INDEX_BITS) | (INDEX_MASK - index))
    key = torch.cat([ranked, ranked.new_zeros(1)]).max()
    key = key | (must.to(torch.int64) * SYNCHRONIZE_BIT) | (nonfinite.to(torch.int64) * NONFINITE_BIT)
    return norm, rmmc, torch.where(sums[count].isnan(), FAILED_KEY, key)


def local_step_(params: Sequence[Tensor], grads: Sequence[Tensor | None], *, decay: float, step_size: float) -> None:
    """Take one gradient step: X <- decay X - step_size G, in place; a gradient of None counts as zero.

    Bytes: one read of G, one read and one write of X.
    """
    work = upcast(params)
    torch._foreach_mul_(work, decay)
    present = [(x, g) for x, g in zip(work, grads, strict=True) if g is not None]
    if present:
        torch._foreach_add_([x for x, _ in present], [g for _, g in present], alpha=-step_size)
    store_(params, work)


def low_rank_apply_(
    params: Sequence[Tensor],
    momentum: Tensor,
    P: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    transposed: bool,
    decay: float,
    step_size: float,
    momentum_decay: float,
    feedback: float,
) -> None:
    """Apply a low-rank update to B equal matrices and take it out of their momenta, in place.

        X <- decay X - step_size P Q^T
        M <- momentum_decay M - feedback P R^T

    Args:
        params: B local shards of X, (rows, cols).
        momentum: (B, rows, cols).
        P, Q, R: (B, m, r), (B, n, r), (B, n, r) with m the longer side of the whole matrix.
        transposed: the equations hold for X^T and M^T (X has more columns than rows).

    Bytes: one read and one write of X and of M; P, Q and R once.
    """
    M = momentum if momentum.dtype == P.dtype else momentum.to(P.dtype)
    if momentum_decay != 1.0:
        M.mul_(momentum_decay)
    if feedback:
        (M.mT if transposed else M).baddbmm_(P, R.mT, alpha=-feedback)
    if M is not momentum:
        momentum.copy_(M)

    work = upcast(params)
    update = Q @ P.mT if transposed else P @ Q.mT
    torch._foreach_mul_(work, decay)
    torch._foreach_add_(work, list(update.unbind()), alpha=-step_size)
    store_(params, work)


def column_sumsq(R: Tensor) -> Tensor:
    """Return the squared norms of the columns: (B, n, r) -> (B, r), in R's dtype. Bytes: one read of R."""
    return R.square().sum(dim=-2)


def upcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype they are computed in: the same object where that is its own."""
    return [t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32) for t in tensors]


def store_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Round the results of a computation on `upcast(tensors)` back into the tensors."""
    changed = [(t, v) for t, v in zip(tensors, values, strict=True) if t is not v]
    if changed:
        torch._foreach_copy_([t for t, _ in changed], [v for _, v in changed])
