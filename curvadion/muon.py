"""Muon's orthogonalization by Newton-Schulz iteration, on local shards: pure mathematics, no ranks.

The polynomials act on singular values, so that they can be taken of the Gram matrix of the short side alone: what crosses the shards
of the long side is one n x n sum, and a product with the shard comes last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvadion.dion import LOCAL, Side, Tensors

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(M: Sequence[Tensor], *, rows: Side = LOCAL, columns: Side = LOCAL) -> Tensors:
    """Return U f(S) V^T for each M = U S V^T, all singular values f(s) near 1 (0.68 to 1.13 above 3e-3 of the norm); 0 for M = 0.

        Y_0 = M / ||M||_F,    Y_{k+1} = (a I + b Y_k^T Y_k + c (Y_k^T Y_k)^2) applied to Y_k,    5 times
        with G_k = Y_k^T Y_k:  q_k = a I + b G_k + c G_k^2,   T_{k+1} = T_k q_k,   G_{k+1} = q_k G_k q_k,   Y_5 = M T_5 / ||M||_F

    Args:
        M: batches (B, m, n) with m the longer side of the whole matrix; local shards.
        rows, columns: how m and n are spread over ranks.

    Returns: batches of the same shapes.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the iteration and a, b, c.
    """
    whole = [w.mT for w in columns.gather([m.mT for m in M])]
    grams = rows.sum([w.mT @ w for w in whole], "gram")
    result = []
    for w, gram in zip(whole, grams, strict=True):
        squared_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
        squared_norm = torch.where(squared_norm > 0, squared_norm, 1.0)
        G = gram / squared_norm
        T = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G)
        for _ in range(STEPS):
            q = torch.baddbmm(G, G, G, beta=B, alpha=C)
            q.diagonal(dim1=-2, dim2=-1).add_(A)
            T, G = T @ q, q @ G @ q
        result.append((w @ (T * squared_norm.rsqrt())).mT)
    return [y.mT for y in columns.take(result)]
