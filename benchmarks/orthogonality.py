"""How accurate the ways to make P orthonormal are, on matrices of float32 with known spectra.

    python benchmarks/orthogonality.py [--rows 768] [--rank 512]

Prints, for each kind of matrix A and each way, the largest entry of |P^T P - I| over live columns; the
largest part of a column of A that is not in the span of as many columns of P, relative to the largest column;
and how many columns are live. Dion takes for noise what is below the rounding of a product.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from curvadion.algebra.power_iteration import noise_floor, orthogonalize


def with_condition(rows: int, rank: int, condition: float) -> Tensor:
    """Return a matrix whose singular values fall geometrically from 1 to 1 / condition."""
    U, V = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64)).Q for n in (rows, rank))
    return U * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ V.T


def kinds(rows: int, rank: int) -> dict[str, Tensor]:
    """Return the matrices, by what they are."""
    found = {f"condition {c:.0e}": with_condition(rows, rank, c) for c in (1e0, 1e3, 1e5, 1e7)}
    half = torch.randn(rows, rank // 2, dtype=torch.float64)
    found["rank r/2"] = half @ torch.randn(rank // 2, rank, dtype=torch.float64)
    found["columns of zeros"] = torch.randn(rows, rank, dtype=torch.float64)
    found["columns of zeros"][:, ::3] = 0
    found["each column twice"] = torch.randn(rows, rank, dtype=torch.float64)
    found["each column twice"][:, 1::2] = found["each column twice"][:, : rank - rank % 2 : 2]
    return found


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_qr, all in float64": lambda A: orthogonalize([A])[0],
    "cholesky_qr, as Dion uses it": lambda A: orthogonalize([A], floor=noise_floor(A))[0],
    "qr, no float64, as Dion uses it": lambda A: orthogonalize([A], method="qr", floor=noise_floor(A))[0],
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=768, help="of the matrices")
    parser.add_argument("--rank", type=int, default=512, help="columns of P")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"| {args.rows} x {args.rank}, float32 | way | P^T P - I | not in the span | live columns |")
    print("|---|---|---|---|---|")
    for kind, whole in kinds(args.rows, args.rank).items():
        A = whole.float().to(args.device)[None]
        for way, orthonormal in WAYS.items():
            P, wide = orthonormal(A)[0].double(), A[0].double()
            live = (P.norm(dim=0) > 0.5).double()
            error = float((P.T @ P - torch.diag(live)).abs().max())
            rest = (wide - P @ (P.T @ wide).triu()).norm(dim=0).max() / wide.norm(dim=0).max()
            print(f"| {kind} | {way} | {error:.0e} | {float(rest):.0e} | {int(live.sum())} |")


if __name__ == "__main__":
    main()
