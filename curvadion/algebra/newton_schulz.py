"""Muon's orthogonalization by Newton-Schulz iteration, on local shards: pure mathematics, no ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvadion.algebra.side import LOCAL, Side, Tensors
from curvadion_kernels.reference import compute_dtype

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
LEAST_SQUARE = (
    torch.finfo(torch.float32).tiny ** 2
)  # below it M is as good as zero: such numbers have few digits and decay no further


def working_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype in which products of such matrices are computed: bfloat16 for float32 on a GPU."""
    wide = compute_dtype(matrix.dtype)
    return torch.bfloat16 if matrix.is_cuda and wide == torch.float32 else wide


def flops(m: float, n: float) -> float:
    """Return the FLOPs of the iteration on (m, n) with m >= n or the other way round."""
    long, short = max(m, n), min(m, n)
    return STEPS * (4 * long * short**2 + 2 * short**3)


def newton_schulz(M: Sequence[Tensor], *, rows: Side = LOCAL, columns: Side = LOCAL) -> Tensors:
    """Return U f(S) V^T for each M = U S V^T, all singular values f(s) near 1 (0.68 to 1.20 above 3e-3 of the
    norm); next to 0 for ||M||_F < 1.2e-38.

        Y <- M / ||M||_F,    5 times:  G = Y^T Y,   Y <- Y (a I + b G + c G^2)

    G is n x n and summed over the shards of the long side in each round. In bfloat16 on a GPU, as is usual,
    in M's dtype elsewhere; the iteration forgives rounding, because each round starts from Y.

    Args:
        M: batches (B, m, n) with m the longer side of the whole matrix; local shards.
        rows, columns: how m and n are spread over ranks.

    Returns: batches of the same shapes and dtypes.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the iteration
    and a, b, c.
    """
    if not M:
        return []
    with torch.autocast(M[0].device.type, enabled=False):
        whole = [w.mT for w in columns.gather([m.mT for m in M])]
        # Of any size from 1e-38 to 1e38: squares in float64, and the root of 1 / ||M|| twice, for 1 / ||M||
        # itself may overflow float32.
        norms = [torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True, dtype=torch.float64) for w in whole]
        squared = rows.sum([norm.square() for norm in norms], "gram")
        roots = [
            torch.where(s > LEAST_SQUARE, s, 1.0).pow(-0.25).to(w.dtype)
            for w, s in zip(whole, squared, strict=True)
        ]
        Y = [w * root * root for w, root in zip(whole, roots, strict=True)]
        Y = [y.to(working_dtype(y)) if y.dtype == torch.float32 else y for y in Y]
        for _ in range(STEPS):
            grams = rows.sum([(y.mT @ y).to(w.dtype) for y, w in zip(Y, whole, strict=True)], "gram")
            for k, gram in enumerate(grams):
                G = gram.to(Y[k].dtype)
                Y[k] = torch.baddbmm(Y[k], Y[k], torch.baddbmm(G, G, G, beta=B, alpha=C), beta=A)
        result = [y.to(m.dtype).mT for y, m in zip(Y, M, strict=True)]
    return [y.mT for y in columns.take(result)]
