"""Gradients of every size from 1e-45 to 1e38, for every rule, dtype and mode: a step leaves state that is
finite and what the float64 reference has, or is refused and changes nothing. On shards, and between replicas,
too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import Toy, grid, shipped, whole
from support.ranks import run_ranks
from support.reference import ReferenceReplicas
from torch import Tensor, nn

from curvadion import CurvaDion, NonFiniteError
from curvadion.consensus.codec import CODECS
from curvadion.rules import RULES
from curvadion.sharding.journey import round_, unrounded

SIZES = [-45, -38, -36, -23, -8, 0, 8, 18, 20, 38]
# Sums of squares are float32: from about 1e19 on they are infinite, and a step is refused.
TOO_LARGE = 19
# Below, the gate has no norms, or few digits of them: in float64, where some are left, it opens by chance.
GATE_SEES = -19
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


def rounded(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype).double() for name, value in values.items()}


def reference(
    Q: dict[str, Tensor],
    rule: str,
    mode: str,
    exponent: int,
    algorithm: str,
    dtype: torch.dtype = torch.float64,
    replicas: int = 1,
) -> dict[str, Tensor]:
    """The parameters of the same steps from the same numbers, computed in float64."""
    simulated = ReferenceReplicas(
        rounded(drawn(99, 0), dtype),
        replicas=replicas,
        Q0=Q,
        groups={"vector": {"algorithm": algorithm}},
        local_update=rule,
        **COMMON,
        **MODES[mode],
    )
    for step in range(3):
        simulated.step([rounded(drawn(step + 10 * k, exponent), dtype) for k in range(replicas)])
    return simulated.replicas[0].X


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], share: float, where: str) -> None:
    """Up to a share of the largest entry."""
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].detach().double(),
            value,
            rtol=0,
            atol=share * float(value.abs().max()),
            msg=lambda text, n=name: f"{n} {where}: {text}",
        )


# Of the largest entry: float32 products; bfloat16 rounds X three times, and momenta, whose directions follow.
NEAR = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


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
        assert_near(dict(got), expected, NEAR[torch.float32], f"at 1e{exponent}")


@pytest.mark.sample
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
def test_every_dtype_is_right_or_refused(
    rule: str, mode: str, dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    """float16 only stays finite: it has no such sizes."""
    for exponent in (-45, -36, -23, 8, 20):
        got, Q, refused = run(dtype, momentum_dtype, rule, mode, exponent, "adamw")
        largest = math.log10(torch.finfo(dtype).max)
        assert refused == (exponent > min(TOO_LARGE, largest)), f"1e{exponent}"
        if refused or exponent < -37 or dtype == torch.float16:
            continue
        if dtype == torch.float64 and mode != "synchronized" and exponent < GATE_SEES:
            continue
        expected = reference(Q, rule, mode, exponent, "adamw", dtype)
        assert_near(dict(got), expected, NEAR[dtype], f"at 1e{exponent}")


# ---- on shards, and between replicas

PLACED = {name: shape for name, shape in SHAPES.items() if name != "vector"}


def sharded(replicas: int, shards: int) -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Of each rule, mode, owner and size: the first right factors, and the parameters after three steps."""
    replicate, mesh = grid(replicas, shards)
    found = []
    for rule in shipped(RULES):
        for mode, owners, exponent in [(m, o, e) for m in MODES for o in OWNERS for e in SHARDED_SIZES]:
            toy = Toy(mesh, matrices=PLACED, dense={"vector": SHAPES["vector"]})
            for name, value in drawn(99, 0).items():
                toy.params[name].data.copy_(toy.place(name, value.float()))
            opt = CurvaDion(
                groups(toy.params, "adamw"),
                replicate_mesh=replicate,
                local_update=rule,
                owners=owners,
                **COMMON,
                **MODES[mode],
            )
            Q = {n: whole(opt.state[p]["Q"]).double() for n, p in toy.params.items() if "Q" in opt.state[p]}
            for step in range(3):
                for name, g in drawn(step + 10 * replicate.get_local_rank(), exponent).items():
                    toy.params[name].grad = toy.place(name, g.float())
                opt.step()
            found.append((f"{rule} {mode} {owners} {exponent}", Q, toy.whole()))
    return found


OWNERS, SHARDED_SIZES = ("always", "never"), (-36, 15)


def test_every_size_is_right_on_shards() -> None:
    """Squares of columns of which each rank has some rows."""
    found = run_ranks(4, sharded, 2, 2)[0]
    assert len(found) == len(shipped(RULES)) * len(MODES) * len(OWNERS) * len(SHARDED_SIZES)
    for case, Q, got in found:
        rule, mode, _, exponent = case.split()
        expected = reference(Q, rule, mode, int(exponent), "adamw", torch.float32, replicas=2)
        assert_near(got, expected, NEAR[torch.float32], f"of {case}")


@pytest.mark.parametrize("bits", [bits for bits in CODECS if bits != 32])
def test_a_codec_is_as_good_at_every_size(bits: int) -> None:
    """What it sends and what it keeps are finite, and the same share of what it was given."""
    codec = CODECS[bits]
    assert codec is not None and not isinstance(codec, type)

    def share(exponent: int) -> float:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(4 * codec.block, generator=generator, dtype=torch.float64)
        x = (x / x.abs().max() * 10.0**exponent).float()
        kept = torch.zeros_like(x)
        sent = round_(codec, kept, x)
        there = unrounded(codec, sent, len(x), x.dtype)
        assert bool(there.isfinite().all()) and bool(kept.isfinite().all()), f"1e{exponent}"
        atol = 1e-6 * 10.0**exponent + 1e-44
        torch.testing.assert_close(there.double() + kept.double(), x.double(), rtol=0, atol=atol)
        return float(kept.double().norm() / x.double().norm())

    usual = share(0)
    for exponent in range(-45, 39):
        found = share(exponent)
        # A scale that is denormal has lost digits, in bfloat16 all of them below 1e-40.
        assert found < 1.2 * usual or (exponent < -35 and found <= 1 + 1e-6), f"1e{exponent}"
