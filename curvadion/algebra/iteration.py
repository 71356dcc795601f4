"""The rounds of Newton-Schulz: their polynomials, how they are cut into segments, and their FLOPs; without
torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from curvadion.formats import FORMATS


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
        dtype: the name of that in which they are computed; None for bfloat16 on a GPU unless M is float64,
            M's dtype elsewhere.
        method: "gram", several rounds on one Gram matrix where that takes fewer FLOPs; "standard", one.
    """

    polynomials: str = "jordan"
    steps: int = 5
    dtype: str | None = None
    method: str = "gram"

    @property
    def rounds(self) -> list[tuple[float, ...]]:
        """The coefficients a, b, c of each round."""
        triples = POLYNOMIALS[self.polynomials]
        return [triples[min(k, len(triples) - 1)] for k in range(self.steps)]

    def segments(self, m: float, n: float, dtype: str) -> list[list[tuple[float, ...]]]:
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
        short = FORMATS[dtype].bytes == 2
        eps = FORMATS["bfloat16" if short else dtype].eps  # float16's own leaves 9 times the error
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

    def products(self, m: float, n: float, dtype: str) -> tuple[float, float]:
        """Return the FLOPs of all rounds on (m, n), m >= n or the other way round: of products A^T A, where
        one triangle is enough, and of others."""
        long, short = max(m, n), min(m, n)
        lengths = [len(segment) for segment in self.segments(m, n, dtype)]
        single = lengths.count(1)
        symmetric = len(lengths) * 2 * long * short**2 + single * 2 * short**3
        whole = self.steps - single + sum(3 * (k - 1) for k in lengths)
        return symmetric, len(lengths) * 2 * long * short**2 + whole * 2 * short**3

    def flops(self, m: float, n: float, dtype: str) -> float:
        """Return the FLOPs of all rounds on (m, n), m >= n or the other way round."""
        return sum(self.products(m, n, dtype))
