"""Gradients of every size from 1e-45 to 1e38, for every rule, dtype and mode: a step leaves state that is
finite and what the float64 reference has, or is refused and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import shipped
from support.reference import ReferenceReplicas
from torch import Tensor, nn

from curvadion import CurvaDion, NonFiniteError
from curvadion.rules import RULES

SIZES = [-45, -38, -36, -23, -8, 0, 8, 18, 20, 38]
# Sums of squares are float32: from about 1e19 on they are infinite, and a step is refused.
TOO_LARGE = 19
# Below, squares in float32 are zero: power iteration sees no direction, and AdamW's eps is all there is.
TOO_SMALL_FOR_DION = -19
MODES: dict[str, dict[str, Any]] = {
    "synchronized": {"max_local_steps": 0},
    "local": {"tau": math.inf},
    "outer": {"consensus": "outer", "outer_momentum": 0.5, "tau": math.inf, "max_local_steps": 1},
}
SHAPES = {"tall.weight": (12, 8), "square.weight": (6, 6), "vector": (7,)}
COMMON: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rank_fraction": 0.5, "eps": 1e-8}


def drawn(step: int, exponent: int) -> dict[str, Tensor]:
    """Gradients whose largest entry is 10^exponent."""
    generator = torch.Generator().manual_seed(step)
    values = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    return {name: value / value.abs().max() * 10.0**exponent for name, value in values.items()}


def groups(params: dict[str, nn.Parameter], algorithm: str) -> list[dict[str, Any]]:
    named = list(params.items())
    return [{"params": named[:2]}, {"params": named[2:], "algorithm": algorithm}]


def run(
    dtype: torch.dtype,
    momentum_dtype: torch.dtype | None,
    rule: str,
    mode: str,
    exponent: int,
    algorithm: str,
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], bool]:
    """Three steps; the parameters, the first right factors, and whether a step was refused."""
    start = drawn(99, 0)
    params = {name: nn.Parameter(value.to(dtype)) for name, value in start.items()}
    opt = CurvaDion(
        groups(params, algorithm),
        local_update=rule,
        momentum_dtype=momentum_dtype,
        **COMMON,
        **MODES[mode],
    )
    Q = {name: opt.state[p]["Q"].double().clone() for name, p in params.items() if "Q" in opt.state[p]}
    for step in range(3):
        for name, g in drawn(step, exponent).items():
            params[name].grad = g.to(dtype)
        before = {name: p.detach().clone() for name, p in params.items()}
        try:
            opt.step()
        except NonFiniteError:
            assert all(torch.equal(p, before[name]) for name, p in params.items()), "refused, and moved"
            return params, Q, True
        for name, p in params.items():
            for key, value in {**opt.state[p], "X": p}.items():
                assert bool(value.isfinite().all()), f"1e{exponent}, step {step}: {key} of {name}"
    return params, Q, False


def reference(Q: dict[str, Tensor], rule: str, mode: str, exponent: int, algorithm: str) -> dict[str, Tensor]:
    replicas = ReferenceReplicas(
        drawn(99, 0),
        replicas=1,
        Q0=Q,
        groups={"vector": {"algorithm": algorithm}},
        local_update=rule,
        **COMMON,
        **MODES[mode],
    )
    for step in range(3):
        replicas.step([drawn(step, exponent)])
    return replicas.replicas[0].X


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", shipped(RULES))
def test_every_size_is_right_or_refused(rule: str, mode: str) -> None:
    """In float32 as in float64, up to rounding."""
    for k, exponent in enumerate(SIZES):
        algorithm = ("adamw", "lion")[k % 2]
        got, Q, refused = run(torch.float32, None, rule, mode, exponent, algorithm)
        assert refused == (exponent > TOO_LARGE), f"1e{exponent}"
        if refused or exponent < -37:  # what is denormal has lost its digits
            continue
        expected = reference(Q, rule, mode, exponent, algorithm)
        dion = rule == "dion" or mode != "outer"  # the first step is synchronized
        for name, p in got.items():
            largest = float(expected[name].abs().max())
            if dion and exponent < TOO_SMALL_FOR_DION and p.ndim == 2:
                continue
            torch.testing.assert_close(
                p.detach().double(),
                expected[name],
                rtol=0,
                atol=2e-3 * largest,
                msg=lambda text, n=name, e=exponent: f"{n} at 1e{e}: {text}",
            )


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", shipped(RULES))
def test_every_dtype_stays_finite(
    rule: str, mode: str, dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    for exponent in SIZES[::3]:
        _, _, refused = run(dtype, momentum_dtype, rule, mode, exponent, "adamw")
        largest = math.log10(torch.finfo(dtype).max)
        assert refused == (exponent > min(TOO_LARGE, largest)), f"1e{exponent}"
