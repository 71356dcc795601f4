"""Dion's mathematics on local shards: power iteration, orthogonalization, the right factor. No ranks in here.

Every function works on lists of batches, one batch (B, ., .) per shape, so that a reduction can serve all
matrices in one call. What is summed over other ranks comes in as an argument: a `Side` tells how one side of
the matrices is spread, and the default `Side()` is the identity, so that one process is no special case.

Letters as in the paper (Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295): M (m x n)
momentum with m >= n, Q (n x r) right factor of the last step, P (m x r) orthonormal left factor, R (n x r)
right factor of this step.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from curvadion.algebra.newton_schulz import LEAST_SQUARE
from curvadion.algebra.side import LOCAL, Side, Tensors, same_twice
from curvadion.algebra.sizes import piece_elements
from curvadion_kernels import reference

# Shift of the Gram matrix relative to its trace: above the rounding of a float64 Gram matrix, below (1e-7)^2,
# so that columns stay independent up to condition 1e7 and a dependent one cannot leak into those that follow
# it.
GRAM_SHIFT = 1e-15
# A column counts as independent in the second pass if this much of its squared norm, 1 by then, is left after
# those before it.
INDEPENDENT = 1e-2
# What is left of a column, relative to the largest one, below which it is rounding noise: in units of the
# product's rounding ...
NOISE_ULPS = 64
# ... and, where every entry was rounded to a coarser format than it was summed in, in units of that format's.
COARSE_NOISE_ULPS = 2


@dataclass(frozen=True)
class Factors:
    """What power iteration makes of one batch.

    Attributes:
        P: (B, m, r), orthonormal columns or zero ones.
        R: (B, n, r), this replica's R_i.
        Q: (B, n, r), the new right factor.
        scale: (B, r), where Q is R diag(scale) in all columns that P has, and 0 in others; else None.
    """

    P: Tensor
    R: Tensor
    Q: Tensor
    scale: Tensor | None


def initial_right_factor(name: str, n: int, r: int) -> Tensor:
    """Return the first Q (n x r, float32, unit columns): a function of the parameter's canonical name and the
    shape alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    Q = torch.randn(
        n, r, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    # Not norm(): down columns it takes ten times as long. In float64, so that any order of the sum gives
    # these.
    return Q.div_(Q.square().sum(dim=0, dtype=torch.float64).sqrt_().to(Q.dtype))


def power_iteration(
    M: Sequence[Tensor],
    Q: Sequence[Tensor],
    *,
    columns: Side = LOCAL,
    orthonormal_P: Callable[[Tensors, Sequence[float]], Tensors] | None = None,
    reduce_P: Callable[[Tensors], tuple[Tensors, Tensors]] = same_twice,
    reduce_R: Callable[[Tensors], tuple[Tensors, Tensors]] = same_twice,
    orthogonalization: str = "cholesky_qr",
    right_factor: str = "column_norm",
    payload_dtype: torch.dtype | None = None,
    column_sumsq: Callable[[Tensor], Tensor] = reference.column_sumsq,
) -> list[Factors]:
    """Take one step of power iteration from Q and return P, R_i and the new Q of each batch.

        P   = orthogonalize( E_i[ M_i Q ] )
        R_i = M_i^T P,    R = E_i[ R_i ]
        Q   = column_normalize(R)  or  orthogonalize(R)

    Of any size from 1e-38 to 1e38: squares are float64, of R's columns and in Gram matrices.

    Columns of P that depend on the ones before them, or whose column of R is numerically zero (or dependent,
    for "qr"), are zero in the returned P (they contribute nothing) and keep their old column of Q (it stays
    usable).

    Args:
        M: batches (B, m, n) of momenta, m on the longer side of the whole matrix; local shards.
        Q: batches (B, n, r).
        columns: how n is spread over ranks.
        orthonormal_P: orthogonalizes P, given a floor for each batch, where m is spread over ranks or others
            do it; may overwrite P.
        reduce_P: the sum over the ranks that split n (own), then the mean over replicas; returns (own, mean).
        reduce_R: the sum over the ranks that split m (own, R_i), then the mean over replicas (R); returns
            (R_i, R).
        payload_dtype: what the reductions round P and R to, None if they do not.
        column_sumsq: the kernel.
    """
    floors = [noise_floor(m, payload_dtype) for m in M]
    Q = [q.to(m.dtype) for m, q in zip(M, Q, strict=True)]
    _, P = reduce_P([m @ q for m, q in zip(M, Q, strict=True)])
    with record_function("curvadion::orthogonalize"):
        if orthonormal_P is not None:
            P = orthonormal_P(P, floors)
        else:
            P, _ = orthonormal_columns(P, LOCAL, orthogonalization, floors)
    own, R = reduce_R([m.mT @ p for m, p in zip(M, P, strict=True)])

    sumsq = columns.sum([column_sumsq(r) for r in R], "column_norms")
    live = [
        (s > (floor**2 * s.amax(-1, keepdim=True)).clamp(min=LEAST_SQUARE)).unsqueeze(-2)
        for s, floor in zip(sumsq, floors, strict=True)
    ]
    scales: list[Tensor | None] = [None] * len(R)
    if right_factor == "qr":
        with record_function("curvadion::orthogonalize"):
            new, independent = orthonormal_columns(R, columns, orthogonalization, floors)
        live = [a & b for a, b in zip(live, independent, strict=True)]
    else:
        lengths = [_inverse_root(s, r.dtype) for s, r in zip(sumsq, R, strict=True)]
        new = [r * s.unsqueeze(-2) for r, s in zip(R, lengths, strict=True)]
        scales = [s if r_i is r else None for s, r_i, r in zip(lengths, own, R, strict=True)]
    return [
        Factors(
            p.mul_(alive),
            r_i,
            torch.where(alive, q, old),
            None if scale is None else scale * alive.squeeze(-2),
        )
        for p, r_i, alive, q, old, scale in zip(P, own, live, new, Q, scales, strict=True)
    ]


def noise_floor(M: Tensor, payload_dtype: torch.dtype | None = None) -> float:
    """Return the relative size below which a column of a product with M is rounding noise.

    Knows of TF32 and bfloat16 products on CUDA (`torch.set_float32_matmul_precision`) and of factors rounded
    to `payload_dtype`.
    """
    coarse = [payload_dtype] if payload_dtype is not None else []
    floor = max(
        [NOISE_ULPS * torch.finfo(M.dtype).eps]
        + [COARSE_NOISE_ULPS * torch.finfo(dtype).eps for dtype in coarse]
    )
    if M.is_cuda and M.dtype == torch.float32:
        eps = {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(torch.backends.cuda.matmul.fp32_precision, 0.0)
        floor = max(floor, COARSE_NOISE_ULPS * eps)
    return floor


def _inverse_root(sumsq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / sqrt(s) in a dtype; 0 for what is as good as zero, in float32 too."""
    return torch.where(sumsq > LEAST_SQUARE, sumsq.rsqrt(), 0.0).to(dtype)


def orthogonalize(
    P: Sequence[Tensor], *, side: Side = LOCAL, method: str = "cholesky_qr", floor: float = 0.0
) -> Tensors:
    """Return orthonormal bases of the columns: P^T P = I, span(P_1..P_j) kept for every j, dependent columns
    set to zero.

    Args:
        P: batches (B, m, r), local rows, m >= r as a whole.
        side: how the rows are spread over ranks.
        method: "cholesky_qr", shifted Cholesky QR in two passes (Fukaya et al., "Shifted Cholesky QR for
            computing the QR factorization of ill-conditioned matrices", SIAM J. Sci. Comput. 42, 2020),
            accurate up to condition 1e7; only r x r matrices cross ranks. The first pass is in float64, of a
            few matrices or rows at a time; the second in P's dtype where the floor leaves it orthonormal
            columns, else in float64. "qr": Householder (`torch.linalg.qr`) on the gathered matrix, the
            reference, without float64. "auto": Householder on CPUs, where it takes half the time, of whole
            matrices.
        floor: a column is dependent if less than this, relative to the largest column, is left of it after
            those before it.
    """
    return orthonormal_columns(P, side, method, [floor] * len(P))[0]


def orthonormal_columns(
    P: Sequence[Tensor], side: Side, method: str, floors: Sequence[float]
) -> tuple[Tensors, Tensors]:
    """Return what `orthogonalize` does, with a floor for each batch, and which columns are independent of
    those before them, (B, 1, r) bool."""
    if method == "auto":
        method = "qr" if side is LOCAL and all(p.device.type == "cpu" for p in P) else "cholesky_qr"
    if method == "qr":
        pairs = [_householder(p, floor) for p, floor in zip(side.gather(list(P)), floors, strict=True)]
        return side.take([basis for basis, _ in pairs]), [live for _, live in pairs]
    bases, live = [], []
    grams = side.sum([_gram(p, torch.float64) for p in P], "gram")
    for p, gram, floor in zip(P, _handed_over(grams), floors, strict=True):
        L, kept = _first_factor(gram, floor)
        # The first pass leaves columns that are orthonormal to its rounding, unless the shift has held some
        # of them down: then the second one needs as many digits.
        enough = floor**2 > 10 * GRAM_SHIFT * L.shape[-1]
        bases.append(_solve(p, L, p.dtype if enough else torch.float64))
        live.append(kept)
        del L
    grams = side.sum([_gram(w, w.dtype) for w in bases], "gram")
    for k, gram in enumerate(_handed_over(grams)):
        L, live[k] = _second_factor(gram, live[k])
        bases[k] = _solve(bases[k], L, P[k].dtype, live[k])
    return bases, live


def pieces(number: int, elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut a stack of `number` matrices of so many elements: yield from where to where, of a size at which
    copies are cheap."""
    step = max(1, piece_elements(device.type) // max(1, elements))
    for start in range(0, number, step):
        yield start, min(start + step, number)


def _blocks(P: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, m, r) into pieces: some matrices, or some rows of one of them."""
    m, r = P.shape[1:]
    rows = max(1, min(m, piece_elements(P.device.type) // max(1, r)))
    for start, stop in pieces(len(P), m * r, P.device):
        for row in range(0, m, rows):
            yield slice(start, stop), slice(row, row + rows)


def _handed_over(tensors: Tensors) -> Iterator[Tensor]:
    """Yield tensors and keep none."""
    while tensors:
        yield tensors.pop(0)


def _gram(P: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the lower triangle of P^T P, (B, r, r), computed in this dtype piece by piece; above it are
    zeros and some of the rest."""
    r = P.shape[-1]
    width = max(128, r // 8)
    gram = P.new_zeros((len(P), r, r), dtype=dtype)
    for some, rows in _blocks(P):
        w = P[some, rows].to(dtype)
        for j in range(0, r, width):
            gram[some, j:, j : j + width].baddbmm_(w[..., j:].mT, w[..., j : j + width])
    return gram


def _solve(P: Tensor, L: Tensor, dtype: torch.dtype, live: Tensor | None = None) -> Tensor:
    """Return P L^-T in this dtype, computed in L's piece by piece; columns that are not live are zero."""

    def solved(some: slice, rows: slice) -> Tensor:
        B = P[some, rows].to(L.dtype)
        X = torch.linalg.solve_triangular(L[some].mT, B, upper=True, left=False)
        return X if live is None else X.masked_fill_(~live[some], 0.0)  # also where it is not finite

    blocks = list(_blocks(P))
    if len(blocks) == 1:
        return solved(*blocks[0]).to(dtype)
    result = torch.empty_like(P, dtype=dtype)
    for block in blocks:
        result[block] = solved(*block)
    return result


def _first_factor(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return L of G + sI = L L^T, of independent columns alone, and which those are, (B, 1, r) bool.

    Rows and columns of others are the identity's. Where G + sI is not positive definite in spite of the
    shift,
    none is independent: no direction, no update. Overwrites G.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).clone()
    L, pivots, positive = _cholesky(gram, _shifted(squares))
    live = positive & (pivots > floor**2 * squares.amax(-1, keepdim=True))
    # Elsewhere the host would have to wait for the answer, and in a dry run there is none.
    if type(gram) is Tensor and gram.is_cpu and bool(live.all()):
        return L, live.unsqueeze(-2)
    # Noise must not pass for a direction: what later columns have along it would be lost.
    L, _, positive = _cholesky(_restrict(gram, live), torch.where(live, _shifted(squares * live), 1.0))
    return L, (live & positive).unsqueeze(-2)


def _second_factor(gram: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return L of G = L L^T and which columns are independent, like `_first_factor`, of columns that are
    nearly orthonormal, or noise over a pivot that the shift has kept away from zero."""
    live = live.squeeze(-2)
    squares = torch.where(live, gram.diagonal(dim1=-2, dim2=-1), 1.0)
    if gram.dtype == torch.float64:
        _, pivots, positive = _cholesky(_restrict(gram, live), _shifted(squares))
        live = live & positive & (pivots > INDEPENDENT)
        squares = torch.where(live, squares, 1.0)
    L, _, positive = _cholesky(_restrict(gram, live), squares)
    return L, (live & positive).unsqueeze(-2)


def _restrict(gram: Tensor, live: Tensor) -> Tensor:
    """Make the rows and columns of others than live ones zero, in place."""
    return gram.masked_fill_(~(live.unsqueeze(-1) & live.unsqueeze(-2)), 0.0)


def _cholesky(gram: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L of G = L L^T, its squared pivots (what is left of each column after those before it), (B, r),
    and whether G is positive definite, (B, 1); if not, L means nothing. Replaces G's diagonal, and reads its
    lower triangle."""
    gram.diagonal(dim1=-2, dim2=-1).copy_(squares)
    L, info = torch.linalg.cholesky_ex(gram)
    return L, L.diagonal(dim1=-2, dim2=-1).square(), (info == 0).unsqueeze(-1)


def _shifted(squares: Tensor) -> Tensor:
    return squares + (GRAM_SHIFT * squares.sum(-1, keepdim=True) + torch.finfo(squares.dtype).tiny)


def _householder(P: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return Q of P = QR, columns that depend on earlier ones set to zero and out of the way of later ones,
    and which do not."""
    Q, R = torch.linalg.qr(P)
    pivots = R.diagonal(dim1=-2, dim2=-1).abs()
    live = pivots > max(NOISE_ULPS * torch.finfo(P.dtype).eps, floor) * pivots.amax(-1, keepdim=True)
    if type(live) is not Tensor or not bool(live.all()):
        # The basis vector of a dependent column is arbitrary, and later columns lose their part along it:
        # factor again, those last.
        order = torch.argsort(~live, dim=-1, stable=True).unsqueeze(-2).expand_as(P)
        Q = torch.empty_like(Q).scatter_(-1, order, torch.linalg.qr(P.gather(-1, order))[0])
    # Householder's column signs are free; a right factor must point the way its column does, so:
    # Gram-Schmidt's.
    return Q * (torch.where((Q * P).sum(-2) < 0, -1.0, 1.0) * live).unsqueeze(-2), live.unsqueeze(-2)
