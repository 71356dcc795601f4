"""The power law of the gap: what is fitted, and when it refuses."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the law is fitted with numpy: install the [dev] extra")
pytest.importorskip("rich", reason="the study shows its progress with rich: install the [report] extra")

from law import BASE, OURS, Law, Point, conditions, fit, points

TRUE = Law(0.04, (-0.9, 0.1, 0.4, -0.3), (), 0.0)
OTHERS = {0: (300.0, 1800.0, 5400.0), 1: (400_000.0, 900_000.0), 2: (2.0, 8.0, 16.0), 3: (4.0, 64.0)}


def around_base() -> list[tuple[float, ...]]:
    """Return BASE, and the conditions that differ from it in one number."""
    base = tuple(float(x) for x in BASE.values())
    return [base, *((*base[:i], x, *base[i + 1 :]) for i, values in OTHERS.items() for x in values)]


def test_a_power_law_is_found_again() -> None:
    law = fit([Point(at, TRUE.gap(at), 1) for at in around_base()])
    assert law.c == pytest.approx(TRUE.c) and law.exponents == pytest.approx(TRUE.exponents)
    assert max(law.errors) < 1e-9 and law.off == pytest.approx(1)
    far = (20_000.0, 160e6, 4.0, 16.0)
    assert law.gap(far) == pytest.approx(0.04 * (20_000 / 600) ** -0.9 * (160e6 / 133_440) ** 0.1)


def test_noise_shows_in_the_errors_and_in_what_a_condition_is_missed_by() -> None:
    def law(noise: float) -> Law:
        draw = random.Random(0)
        return fit([Point(at, TRUE.gap(at) * math.exp(draw.gauss(0, noise)), 1) for at in around_base()])

    quiet, middle, loud = law(0.01), law(0.05), law(0.2)
    for less, more in pairwise((quiet, middle, loud)):
        assert all(a < b for a, b in zip(less.errors, more.errors, strict=True)) and less.off < more.off
    three = zip(loud.exponents, TRUE.exponents, loud.errors, strict=True)
    assert all(abs(e - true) < 5 * error for e, true, error in three)


def test_what_cannot_be_fitted_is_refused() -> None:
    points = [Point(at, TRUE.gap(at), 1) for at in around_base()]
    with pytest.raises(ValueError, match="vary in each of"):
        fit([p for p in points if p.at[2] == BASE["replicas"]])
    with pytest.raises(ValueError, match="no logarithm"):
        fit([*points, Point((100.0, *points[0].at[1:]), -0.01, 1)])


def test_the_law_that_is_published_is_that_of_the_runs() -> None:
    root = Path(__file__).parent.parent
    law = fit(points(conditions([root / "benchmarks" / "results" / "convergence.jsonl"]), OURS.name))
    [line] = re.findall(r"^    gap = .*\n.*$", (root / "docs" / "results.md").read_text(), re.MULTILINE)
    powers = [f"^({e:.2f} ± {error:.2f})" for e, error in zip(law.exponents, law.errors, strict=True)]
    names = ("(steps / 600)", "(parameters / 133,440)", "(K / 4)", "(batch / 16)")
    factors = " ".join(name + power for name, power in zip(names, powers, strict=True))
    assert " ".join(line.split()) == f"gap = {law.c:.3f} {factors}"
    assert f"factor of {law.off:.2f} at most" in " ".join((root / "docs" / "results.md").read_text().split())
