"""Muon's orthogonalization by Newton-Schulz iteration, on local shards: pure mathematics, no ranks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.side import LOCAL, Side, Tensors
from curvadion_kernels import reference
from curvadion_kernels.reference import compute_dtype

LEAST_SQUARE = (
    torch.finfo(torch.float32).tiny ** 2
)  # below it M is as good as zero: such numbers have few digits and decay no further


def _with_safety(triples: Sequence[tuple[float, float, float]], s: float) -> tuple[tuple[float, ...], ...]:
    """Return p(x / s) for each p but the last."""
    return (*((a / s, b / s**3, c / s**5) for a, b, c in triples[:-1]), triples[-1])


# The names of the option `newton_schulz`: a, b, c of each round; the last serves all further ones.
POLYNOMIALS: dict[str, tuple[tuple[float, ...], ...]] = {
    # Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al., "The Polar Express", arXiv:2505.16932, with its safety factor: each round has the best
    # polynomial for the interval that the rounds before it leave of [1e-3, 1], widened by 1 % for rounding.
    "polar_express": _with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        1.01,
    ),
}


# The names of the option `newton_schulz_method`.
METHODS = ("gram", "standard")
# Rounds on one Gram matrix: how many at most; and how large the rounding of its arithmetic may get, relative
# to the largest singular value, where they are the first ones and where they are not. Measured, see
# `Iteration`.
GRAM_ROUNDS, FIRST_NOISE, LATER_NOISE = 3, 1.2, 0.6
# The slope at 1 of a polynomial that is flat there, at most.
FLAT = 0.1


@dataclass(frozen=True)
class Iteration:
    """How `newton_schulz` iterates; the same on all ranks.

    Where every singular value is above 1e-3 of the norm, f takes it to (in float64)

        rounds   "jordan"          "polar_express"
        4        0.140 to 1.202    0.423 to 1.560
        5        0.471 to 1.202    0.846 to 1.124
        6        0.682 to 1.202    0.994 to 1.001
        7        0.682 to 1.134    1.000 to 1.000

    and above 3e-3 to 0.682 to 1.202 in five rounds of "jordan", 0.997 to 1.001 in six of "polar_express".

    Attributes:
        polynomials: a name in POLYNOMIALS.
        steps: the number of rounds.
        dtype: they are computed in; None for bfloat16 on a GPU unless M is float64, M's dtype elsewhere.
        method: "gram", several rounds on one Gram matrix where that takes fewer FLOPs; "standard", one.
    """

    polynomials: str = "jordan"
    steps: int = 5
    dtype: torch.dtype | None = None
    method: str = "gram"

    @staticmethod
    def of(group: Mapping[str, Any], momentum: Tensor) -> "Iteration":
        """Return what a group asks for.

        Without a dtype, momenta in bfloat16 are iterated in bfloat16 on a CPU that has units for its products
        too: they are several times as fast as float32's there, and the momenta have no more digits.
        """
        dtype = group["newton_schulz_dtype"]
        if (
            dtype is None
            and momentum.dtype == torch.bfloat16
            and momentum.is_cpu
            and cpu_multiplies_bfloat16()
        ):
            dtype = torch.bfloat16
        method = group["newton_schulz_method"]
        return Iteration(group["newton_schulz"], group["newton_schulz_steps"], dtype, method)

    @property
    def rounds(self) -> list[tuple[float, ...]]:
        """The coefficients a, b, c of each round."""
        triples = POLYNOMIALS[self.polynomials]
        return [triples[min(k, len(triples) - 1)] for k in range(self.steps)]

    def arithmetic(self, M: Tensor) -> torch.dtype:
        """Return the dtype in which M is iterated."""
        if self.dtype is not None:
            return self.dtype
        wide = compute_dtype(M.dtype)
        return torch.bfloat16 if M.is_cuda and wide == torch.float32 else wide

    def segments(self, m: float, n: float, dtype: torch.dtype) -> list[list[tuple[float, ...]]]:
        """Return the rounds on (m, n) in segments, each of which starts from a new Gram matrix.

        k rounds in one take 4 m n^2 + (8 k - 6) n^3 FLOPs, in k segments k (4 m n^2 + 2 n^3): so one is the
        better where 2 m > 3 n. On the Gram matrix G each round multiplies rounding errors by a^2 or so, and a
        negative eigenvalue grows without bound, which Y^T Y never has: hence a segment ends before they are
        too large. In 16 bits "jordan" has segments of 3 and 2 rounds, "polar_express" of 2, and from 6 rounds
        on the last one by itself: its polynomial is flat at 1, so that on Y itself it mends singular values.
        """
        rounds = self.rounds
        if self.method == "standard" or 2 * max(m, n) <= 3 * min(m, n):
            return [[triple] for triple in rounds]
        short, eps = torch.finfo(dtype).bits == 16, torch.finfo(dtype).eps
        eps = torch.finfo(torch.bfloat16).eps if short else eps  # float16's own leaves 9 times the error
        a, b, c = rounds[-1]
        last = [[rounds.pop()]] if short and abs(a + 3 * b + 5 * c) < FLAT else []
        found: list[list[tuple[float, ...]]] = []
        while rounds:
            noise, number = eps * rounds[0][0] ** 2, 1
            while number < min(GRAM_ROUNDS, len(rounds)) and noise <= (LATER_NOISE if found else FIRST_NOISE):
                noise, number = noise * rounds[number][0] ** 2, number + 1
            found.append(rounds[:number])
            rounds = rounds[number:]
        return [*found, *last]

    def products(self, m: float, n: float, dtype: torch.dtype) -> tuple[float, float]:
        """Return the FLOPs of all rounds on (m, n), m >= n or the other way round: of products A^T A, where
        one triangle is enough, and of others."""
        long, short = max(m, n), min(m, n)
        lengths = [len(segment) for segment in self.segments(m, n, dtype)]
        single = lengths.count(1)
        symmetric = len(lengths) * 2 * long * short**2 + single * 2 * short**3
        whole = self.steps - single + sum(3 * (k - 1) for k in lengths)
        return symmetric, len(lengths) * 2 * long * short**2 + whole * 2 * short**3

    def flops(self, m: float, n: float, dtype: torch.dtype) -> float:
        """Return the FLOPs of all rounds on (m, n), m >= n or the other way round."""
        return sum(self.products(m, n, dtype))


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
    how: Iteration = Iteration(),
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
            torch.mul(w, scale, out=torch.empty_like(w, dtype=how.arithmetic(w)))  # in one pass
            for w, scale in zip(whole, scales, strict=True)
        ]
        del whole
        alone = rows is LOCAL  # else all ranks, whatever their shards, sum equally often
        segments = [
            how.segments(y.shape[1], y.shape[2], y.dtype) if alone else [[triple] for triple in how.rounds]
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
