"""Muon's orthogonalization by Newton-Schulz iteration, on local shards: pure mathematics, no ranks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.iteration import Iteration
from curvadion.algebra.side import LOCAL, Side, Tensors
from curvadion.formats import name_of
from curvadion_kernels import reference
from curvadion_kernels.reference import compute_dtype

DEFAULT = Iteration()
LEAST_SQUARE = (
    torch.finfo(torch.float32).tiny ** 2
)  # below it M is as good as zero: such numbers have few digits and decay no further


def iteration_of(group: Mapping[str, Any], momentum: Tensor) -> Iteration:
    """Return what a group asks for.

    Without a dtype, momenta in bfloat16 are iterated in bfloat16 on a CPU that has units for its products
    too: they are several times as fast as float32's there, and the momenta have no more digits.
    """
    dtype = group["newton_schulz_dtype"]
    if dtype is None and momentum.dtype == torch.bfloat16 and momentum.is_cpu and cpu_multiplies_bfloat16():
        dtype = torch.bfloat16
    name, method = None if dtype is None else name_of(dtype), group["newton_schulz_method"]
    return Iteration(group["newton_schulz"], group["newton_schulz_steps"], name, method)


def arithmetic(how: Iteration, M: Tensor) -> torch.dtype:
    """Return the dtype in which M is iterated."""
    if how.dtype is not None:
        return getattr(torch, how.dtype)
    wide = compute_dtype(M.dtype)
    return torch.bfloat16 if M.is_cuda and wide == torch.float32 else wide


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix units for bfloat16 that this process may use.

    Asks the CPU what it can do, and times nothing: all ranks must come to the same answer, also on a machine
    that is busy.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.cpu._init_amx()


def newton_schulz(
    M: Sequence[Tensor],
    how: Iteration = DEFAULT,
    *,
    rows: Side = LOCAL,
    columns: Side = LOCAL,
    product: Callable[..., Tensor] = reference.symmetric_product,
) -> Tensors:
    """Return U f(S) V^T for each M = U S V^T, all singular values f(s) near 1 (see `Iteration`); next to 0
    for ||M||_F < 1.2e-38.

        Y <- M / ||M||_F,    each round:  G = Y^T Y,   Y <- Y (a I + b G + c G^2)

    G is n x n and summed over the shards of the long side in each round. The iteration forgives rounding,
    because each round starts from Y. Several rounds on one G, where the whole matrix is here, are

        Q <- I,   each round:  Z = a I + b G + c G^2,   Q <- Q Z,   G <- Z G Z;   then Y <- Y Q

    Args:
        M: batches (B, m, n) with m the longer side of the whole matrix; local shards.
        how: the polynomials, the number of rounds, and their arithmetic.
        rows, columns: how m and n are spread over ranks.
        product: returns alpha A^T A + beta A.

    Returns: batches of the same shapes and dtypes.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the iteration;
    Zhang, Amsel, Chen, Dao, "Gram Newton-Schulz", 2026, for several rounds on one G, and starting anew.
    """
    if not M:
        return []
    with torch.autocast(M[0].device.type, enabled=False):
        whole = [w.mT for w in columns.gather([m.mT for m in M])]
        wide = [compute_dtype(w.dtype) for w in whole]
        # Of any size from 1e-38 to 1e38: squares in float64.
        norms = [torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True, dtype=torch.float64) for w in whole]
        squared = rows.sum([norm.square() for norm in norms], "gram")
        scales = [
            torch.where(s > LEAST_SQUARE, s, 1.0).rsqrt().to(dtype)
            for s, dtype in zip(squared, wide, strict=True)
        ]
        Y = [
            torch.mul(w, scale, out=torch.empty_like(w, dtype=arithmetic(how, w)))  # in one pass
            for w, scale in zip(whole, scales, strict=True)
        ]
        del whole
        alone = rows is LOCAL  # else all ranks, whatever their shards, sum equally often
        segments = [
            how.segments(y.shape[1], y.shape[2], name_of(y.dtype))
            if alone
            else [[triple] for triple in how.rounds]
            for y in Y
        ]
        for number in range(how.steps):
            here = [k for k, cut in enumerate(segments) if number < len(cut)]
            grams = [product(Y[k]) for k in here]
            if not alone:
                grams = rows.sum([gram.to(wide[k]) for k, gram in zip(here, grams, strict=True)], "gram")
            for k, gram in zip(here, grams, strict=True):
                Y[k] = _advance(Y[k], gram.to(Y[k].dtype), segments[k][number], product)
        result = [y.to(m.dtype).mT for y, m in zip(Y, M, strict=True)]
    return [y.mT for y in columns.take(result)]


def _advance(
    Y: Tensor, G: Tensor, rounds: Sequence[tuple[float, ...]], product: Callable[..., Tensor]
) -> Tensor:
    """Return Y after these rounds, given G = Y^T Y."""
    if len(rounds) == 1:
        [(a, b, c)] = rounds
        return torch.baddbmm(Y, Y, product(G, alpha=c, beta=b), beta=a)
    Q: Tensor | None = None
    for number, (a, b, c) in enumerate(rounds, 1):
        # Without a I, whose rounding would be all others'. Of whole products: later G are symmetric but for
        # rounding, of which one triangle alone would make several times the error.
        Z = reference.symmetric_product(G, alpha=c, beta=b)
        if number < len(rounds):
            GZ = torch.baddbmm(G, G, Z, beta=a)
            G = torch.baddbmm(GZ, GZ, Z, beta=a)
        if Q is None:
            Q = Z
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = torch.baddbmm(Q, Q, Z, beta=a)
    assert Q is not None, "there are rounds"
    return Y @ Q
