"""Newton-Schulz by its singular values, in every arithmetic; and other libraries' Muon, step by step.

docs/learning_rates.md says which options are whose; the trajectories here are its proof.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.reference import muon, singular_values
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvadion import CurvaDion
from curvadion.algebra import newton_schulz as module
from curvadion.algebra.iteration import POLYNOMIALS, Iteration
from curvadion.algebra.newton_schulz import iteration_of, newton_schulz
from curvadion.formats import name_of

# Least and largest singular value after so many rounds, of all between 1e-3 and 1: what `Iteration` promises.
BANDS = {
    ("jordan", 4): (0.140, 1.202),
    ("jordan", 5): (0.471, 1.202),
    ("jordan", 6): (0.682, 1.202),
    ("jordan", 7): (0.682, 1.134),
    ("polar_express", 4): (0.423, 1.560),
    ("polar_express", 5): (0.846, 1.124),
    ("polar_express", 6): (0.994, 1.001),
    ("polar_express", 7): (1.000, 1.000),
    ("polar_express", 12): (1.000, 1.000),
}
# Rounding of Y moves its singular values by about an ulp (bfloat16: 0.4 %), which the next polynomials
# magnify as they do small ones.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 6e-3}
# Several rounds on one Gram matrix magnify its rounding as well.
TIMES = {"standard": 1, "gram": 3}
ALWAYS_MUON = {
    "local_update": "muon",
    "consensus": "outer",
    "tau": math.inf,
    "max_local_steps": 10**9,
    "gate_every": None,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(values: Tensor, rows: int) -> Tensor:
    """A matrix with these singular values."""
    U, V = (torch.linalg.qr(draw(size, len(values), seed=size))[0] for size in (rows, len(values)))
    return U @ torch.diag(values) @ V.T


# ---- the iteration


@pytest.mark.parametrize(("polynomials", "steps"), BANDS, ids=str)
def test_the_documented_bands_hold(polynomials: str, steps: int) -> None:
    values = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    after = singular_values(values, polynomials, steps)
    low, high = BANDS[polynomials, steps]
    assert low <= round(float(after.min()), 3) and round(float(after.max()), 3) <= high
    assert float(after.min()) < low + 0.001 and float(after.max()) > high - 0.001, "nor is it narrower"


@pytest.mark.parametrize("method", TIMES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("polynomials", "steps"), [("jordan", 5), ("polar_express", 5), ("polar_express", 6)]
)
def test_singular_values_in_every_arithmetic(
    polynomials: str, steps: int, dtype: torch.dtype, method: str
) -> None:
    values = torch.logspace(-2, 0, 48, dtype=torch.float64)
    M = matrix_of(values, 96)
    how = Iteration(polynomials, steps, name_of(dtype), method)
    [O] = newton_schulz([M.unsqueeze(0)], how)  # noqa: E741
    assert O.dtype == M.dtype
    expected = singular_values(values / values.norm(), polynomials, steps).sort(descending=True).values
    error = (torch.linalg.svdvals(O[0]) - expected).abs().max()
    assert float(error) < TIMES[method] * ROUNDING[dtype]
    assert dtype == torch.float64 or float(error) > ROUNDING[dtype] / 100, "it was rounded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("polynomials", POLYNOMIALS)
def test_every_size_is_iterated_alike_or_is_next_to_zero(polynomials: str, dtype: torch.dtype) -> None:
    M = draw(24, 8, seed=6)
    expected = muon(M, polynomials, 6)
    for exponent in (-45, -44, -40, -37, -30, -20, -8, 0, 8, 20, 30, 37, 38):
        scaled = (M * (10.0**exponent / M.abs().max())).float()
        [O] = newton_schulz([scaled.unsqueeze(0)], Iteration(polynomials, 6, name_of(dtype)))  # noqa: E741
        assert bool(O.isfinite().all()), f"1e{exponent}"
        if exponent > -37:
            torch.testing.assert_close(O[0].double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_matrix_that_came_in_bfloat16_is_iterated_as_one_of_float32(dtype: str | None) -> None:
    """As from other ranks: norms and sums of products have more digits than what they are of."""
    M = draw(40, 24).to(torch.bfloat16).unsqueeze(0)
    how = Iteration("polar_express", 6, dtype)
    [got], [expected] = newton_schulz([M], how), newton_schulz([M.float()], how)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected.to(torch.bfloat16))


# What makes a Gram matrix hard: singular values of which few are large, and many next to none.
SPECTRA = {
    "even": torch.ones(96, dtype=torch.float64),
    "falling": torch.logspace(0, -3, 96, dtype=torch.float64),
    "falling far": torch.logspace(0, -6, 96, dtype=torch.float64),
    "1 / k": 1 / torch.arange(1, 97, dtype=torch.float64),
    "one large": torch.tensor([1.0, *[3e-3] * 95], dtype=torch.float64),
    "few large": torch.tensor([*[1.0] * 12, *[1e-3] * 84], dtype=torch.float64),
    "of low rank": torch.tensor([*[1.0] * 12, *[0.0] * 84], dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("polynomials", "steps"),
    [("jordan", 5), ("jordan", 6), ("polar_express", 5), ("polar_express", 6), ("polar_express", 8)],
)
def test_rounds_on_one_gram_matrix_magnify_nothing(polynomials: str, steps: int, dtype: torch.dtype) -> None:
    """What its rounding makes of eigenvalues next to 0 would grow without bound in too many of them."""
    for name, values in SPECTRA.items():
        M = matrix_of(values, 300).unsqueeze(0)
        exact = matrix_of(singular_values(values / values.norm(), polynomials, steps), 300)
        errors, largest = dict[str, float](), dict[str, float]()
        for method in TIMES:
            [O] = newton_schulz([M], Iteration(polynomials, steps, name_of(dtype), method))  # noqa: E741
            errors[method] = float((O[0] - exact).norm() / exact.norm())
            largest[method] = float(torch.linalg.matrix_norm(O[0], 2))
        assert largest["gram"] < largest["standard"] + 5 * ROUNDING[dtype], (name, largest)
        assert errors["gram"] < 3 * errors["standard"] + 4 * ROUNDING[dtype], (name, errors)
        if polynomials == "polar_express" and steps >= 6:
            assert largest["gram"] < 1.01, (name, largest)


def test_rounds_share_a_gram_matrix_where_that_takes_fewer_flops() -> None:
    for polynomials, dtype, lengths in [
        ("jordan", "float32", [3, 2]),
        ("jordan", "bfloat16", [3, 2]),
        ("jordan", "float16", [3, 2]),
        ("polar_express", "float32", [3, 2]),
        ("polar_express", "bfloat16", [2, 2, 1]),
        ("polar_express", "float16", [2, 2, 1]),
        ("polar_express", "float32", [3, 3]),
        ("polar_express", "bfloat16", [2, 2, 1, 1]),
    ]:
        how = Iteration(polynomials, sum(lengths))
        standard = replace(how, method="standard")
        for m, n in [(8, 8), (12, 8), (8, 12)]:
            assert [len(s) for s in how.segments(m, n, dtype)] == [1] * sum(lengths)
        for m, n in [(13, 8), (8, 30)]:
            assert [len(s) for s in how.segments(m, n, dtype)] == lengths
            assert [triple for segment in how.segments(m, n, dtype) for triple in segment] == how.rounds
            assert how.flops(m, n, dtype) < standard.flops(m, n, dtype)
            M = draw(1, max(m, n), min(m, n)).to(getattr(torch, dtype))
            for some in (how, standard):
                with FlopCounterMode(display=False) as counter:
                    newton_schulz([M], replace(some, dtype=dtype))
                assert counter.get_total_flops() == some.flops(m, n, dtype)


def test_any_number_of_rounds() -> None:
    for polynomials in POLYNOMIALS:
        for steps in (1, 2, 8, 11):
            M = draw(12, 5)
            [O] = newton_schulz([M.unsqueeze(0)], Iteration(polynomials, steps))  # noqa: E741
            torch.testing.assert_close(O[0], muon(M, polynomials, steps), rtol=1e-9, atol=1e-9)


# ---- which arithmetic


@pytest.mark.parametrize("units", [True, False])
def test_a_cpu_iterates_in_bfloat16_only_what_is_kept_in_it(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: units)
    asked: dict[str, Any] = {"newton_schulz": "jordan", "newton_schulz_steps": 5, "newton_schulz_dtype": None}
    asked["newton_schulz_method"] = "gram"
    kept = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    found = {dtype: iteration_of(asked, like).dtype for dtype, like in kept.items()}
    assert found == {
        torch.float64: None,
        torch.float32: None,
        torch.bfloat16: "bfloat16" if units else None,
    }
    asked["newton_schulz_dtype"] = torch.float32
    assert {iteration_of(asked, like).dtype for like in kept.values()} == {"float32"}


def test_the_probe_asks_the_cpu_and_not_the_clock() -> None:
    module.cpu_multiplies_bfloat16.cache_clear()
    first = module.cpu_multiplies_bfloat16()
    module.cpu_multiplies_bfloat16.cache_clear()
    assert module.cpu_multiplies_bfloat16() is first
    if first:
        assert torch.cpu._is_amx_tile_supported()


def test_what_was_found_is_compared_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on another CPU would round in another way, in silence."""
    texts = []
    for units in (True, False):
        monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda units=units: units)
        X = nn.Parameter(draw(6, 4).to(torch.bfloat16))
        optimizer = CurvaDion([X], **ALWAYS_MUON)
        texts.append(optimizer._built.describe(optimizer.param_groups))
    assert texts[0] != texts[1]


# ---- what a rule does not heed

MATRIX = (6, 4)


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        ({"local_update": "gradient", "nesterov": True}, "'muon' or 'normuon'"),
        ({"local_update": "dion", "nesterov": True}, "'muon' or 'normuon'"),
        ({"local_update": "dion2", "nesterov": True}, "'muon' or 'normuon'"),
        ({"local_update": "dion", "newton_schulz": "polar_express"}, "'muon' or 'normuon' or 'dion2'"),
        ({"local_update": "dion", "newton_schulz_steps": 6}, "'muon' or 'normuon' or 'dion2'"),
        ({"newton_schulz_dtype": torch.bfloat16}, "'muon' or 'normuon' or 'dion2'"),
        (
            {"update_scale": "original", "consensus": "outer"},
            "'dion' or 'muon' or 'normuon' or 'dion2'",
        ),
    ],
    ids=str,
)
def test_an_option_that_a_rule_leaves_aside_is_refused(options: dict[str, Any], takers: str) -> None:
    name = next(key for key in options if key not in ("local_update", "consensus"))
    with pytest.raises(ValueError, match=f"{name} belongs to local_update={takers}.*leave it out"):
        CurvaDion([nn.Parameter(draw(*MATRIX))], **options)
    with pytest.raises(ValueError, match=name):  # of one group among others
        rest = {key: value for key, value in options.items() if key in ("consensus",)}
        group = {key: value for key, value in options.items() if key not in rest}
        CurvaDion([{"params": [nn.Parameter(draw(*MATRIX))], **group}], **rest)


def test_options_of_matrices_do_not_concern_other_groups() -> None:
    vectors = {"params": [nn.Parameter(draw(4))], "algorithm": "adamw"}
    matrices = {"params": [nn.Parameter(draw(*MATRIX))]}
    CurvaDion([matrices, vectors], **ALWAYS_MUON, nesterov=True, newton_schulz="polar_express")


# ---- other libraries' Muon

SHAPES = ((6, 6), (12, 5), (5, 14), (3, 1), (1, 4))
STEPS = 10
LIKE_TORCH = [
    (adjust, scale, nesterov)
    for adjust, scale in (
        (None, "original"),
        ("original", "original"),
        ("match_rms_adamw", "match_rms_adamw"),
    )
    for nesterov in (True, False)
]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    for step in range(STEPS):
        for k, X in enumerate(parameters):
            X.grad = (draw(*X.shape, seed=100 * step + k) + 0.1 * X.detach().double()).to(X.dtype)
        optimizer.step()
    return [X.detach().double() for X in parameters]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, seed=k).to(dtype)) for k, shape in enumerate(SHAPES)]


def ours(**options: Any) -> list[Tensor]:
    parameters = start(options.pop("dtype", torch.float64))
    return run(CurvaDion(parameters, **ALWAYS_MUON, **options), parameters)


@pytest.mark.parametrize(("adjust", "scale", "nesterov"), LIKE_TORCH, ids=str)
def test_torch_s_muon(
    adjust: str | None, scale: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    # torch's own code, without its rounding to bfloat16: in float64 nothing else may differ. It works in
    # place on what bfloat16() returns.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    parameters = start()
    theirs = run(torch.optim.Muon(parameters, adjust_lr_fn=adjust, **common), parameters)
    for got, expected in zip(ours(update_scale=scale, **common), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_torch_s_muon_as_it_rounds() -> None:
    """Both iterate in bfloat16, ours from a norm in float64, and round at other places: as far from the exact
    run."""
    common: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True}
    parameters = start(torch.float32)
    theirs = run(torch.optim.Muon(parameters, adjust_lr_fn="original", **common), parameters)
    common["update_scale"] = "original"
    exact, coarse = ours(**common), ours(dtype=torch.float32, newton_schulz_dtype=torch.bfloat16, **common)
    for x0, a, b, c in zip(start(), exact, coarse, theirs, strict=True):
        way = float((a - x0.detach()).norm())
        assert 1e-5 * way < float((b - a).norm()) < 0.03 * way
        assert float((c - b).norm()) < 0.03 * way


def jordan(M: Tensor) -> Tensor:
    X = M / M.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("momentum_is", "scale"),
    [("an average", "original"), ("a sum", "match_rms_adamw"), ("a sum", "spectral")],
    ids=["Jordan", "Moonlight", "microsoft/dion"],
)
def test_muon_written_out(momentum_is: str, scale: str, nesterov: bool) -> None:
    """github.com/KellerJordan/Muon, github.com/MoonshotAI/Moonlight and github.com/microsoft/dion, in lines
    of their own: how the momentum is kept, what is orthonormalized, and how large the step is."""
    lr, wd, mu = 0.02, 0.1, 0.95
    parameters = [X.detach().clone() for X in start()]
    momenta = [torch.zeros_like(X) for X in parameters]
    for step in range(STEPS):
        for k, X in enumerate(parameters):
            G = draw(*X.shape, seed=100 * step + k) + 0.1 * X
            if momentum_is == "an average":
                momenta[k] = mu * momenta[k] + (1 - mu) * G
                update = (1 - mu) * G + mu * momenta[k] if nesterov else momenta[k]
            else:
                momenta[k] = mu * momenta[k] + G
                update = G + mu * momenta[k] if nesterov else momenta[k]
            rows, columns = X.shape
            size = {
                "original": max(1, rows / columns) ** 0.5,
                "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                "spectral": (rows / columns) ** 0.5,
            }[scale]
            X.mul_(1 - lr * wd).sub_(lr * size * jordan(update))
    got = ours(lr=lr, weight_decay=wd, momentum=mu, nesterov=nesterov, update_scale=scale)
    for mine, theirs in zip(got, parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
