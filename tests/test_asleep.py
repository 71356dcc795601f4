"""Matrices without a gradient, missing or zero: an expert without tokens, a layer that was left out.

An orthonormal update does not shrink with its momentum, so nothing may move along one that has no gradient.
That all layouts do the same, with replicas that have a gradient and others that have none, is in
test_mesh_parity.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.layouts import LAYOUTS, Layout, whole
from support.models import shipped
from support.ranks import run_ranks
from torch import Tensor, nn

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.rules import RULES

MODES: dict[str, dict[str, Any]] = {
    "synchronized": {"max_local_steps": 0},
    "local": {"tau": math.inf},
    "outer": {"consensus": "outer", "tau": math.inf, "max_local_steps": 3},
    "outer in fragments, under way": {
        "consensus": "outer",
        "outer_fragments": 2,
        "outer_delay": 1,
        "tau": math.inf,
        "max_local_steps": 1,
    },
}


def drawn(step: int) -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(step))


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["missing", "zero"])
@pytest.mark.parametrize("rule", shipped(RULES))
@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_along_a_momentum_without_a_gradient(mode: str, rule: str, kind: str) -> None:
    """Another matrix of the same stack goes on as without it."""
    runs = []
    for sleeps in (True, False):
        matrices = [nn.Parameter(torch.ones(12, 8)) for _ in range(3)]
        opt = CurvaDion(matrices, lr=0.1, weight_decay=0.0, local_update=rule, **MODES[mode])
        for step in range(30):
            asleep = sleeps and 5 <= step < 25
            for k, p in enumerate(matrices):
                p.grad = drawn(10 * step + k)
            if asleep:
                matrices[1].grad = None if kind == "missing" else torch.zeros(12, 8)
            before = matrices[1].detach().clone()
            opt.step()
            if asleep and step > 8:  # what was under way may arrive first
                assert torch.equal(matrices[1], before), f"step {step}"
            else:
                assert asleep or not torch.equal(matrices[1], before), f"step {step}"
            assert all(bool(p.isfinite().all()) for p in matrices)
        runs.append(matrices)
    for k in (0, 2):
        torch.testing.assert_close(runs[0][k], runs[1][k], rtol=1e-5, atol=1e-6)


def test_weights_decay_all_the_same() -> None:
    p = nn.Parameter(torch.ones(12, 8))
    opt = CurvaDion([p], lr=0.1, weight_decay=0.1, local_update="muon", tau=math.inf)
    for step in range(10):
        p.grad = drawn(step) if step < 3 else None
        before = p.detach().clone()
        opt.step()
        if step >= 3:
            torch.testing.assert_close(p.detach(), before * (1 - 0.1 * 0.1))


def test_for_a_thousand_steps_and_back() -> None:
    """The momentum decays to nothing meanwhile; what comes after is as large as ever, and finite."""
    p, q = (nn.Parameter(torch.ones(12, 8)) for _ in range(2))
    opt = CurvaDion([p, q], lr=0.1, weight_decay=0.0, **LOW_COMMUNICATION)
    for step in range(1010):
        p.grad, q.grad = (None if 5 <= step < 1000 else drawn(step)), drawn(step)
        if step == 1000:
            before = p.detach().clone()
        opt.step()
    moved = float((p.detach() - before).norm())
    assert math.isfinite(moved) and moved > 0.1
    assert all(bool(value.isfinite().all()) for value in opt.state[p].values())


def one_rank_has_some(layout: Layout, rule: str) -> list[float]:
    """A gradient that is zero on all ranks but the last, or on all."""
    values = {
        "one.weight": torch.ones(8, 8, dtype=torch.float64),
        "two.weight": torch.ones(8, 8, dtype=torch.float64),
    }
    placed = layout.build(values, 1)
    opt = CurvaDion(
        [{"params": list(placed.bag.named_parameters())}],
        lr=0.1,
        weight_decay=0.0,
        local_update=rule,
        tau=math.inf,
    )
    moved = []
    for step in range(4):
        G = {name: drawn(step)[:8].to(torch.float64) for name in values}
        G["one.weight"][:-1] = 0
        G["two.weight"] *= step < 2
        placed.set_gradients(placed.parts_of(G))
        before = {name: whole(p).clone() for name, p in placed.bag.named_parameters()}
        opt.step()
        moved += [float((whole(p) - before[name]).norm()) for name, p in placed.bag.named_parameters()]
    return moved


@pytest.mark.parametrize("rule", ["muon", "dion", "dion2"])
@pytest.mark.parametrize("layout", [LAYOUTS[9], LAYOUTS[7]], ids=str)
def test_a_gradient_on_one_rank_is_a_gradient(layout: Layout, rule: str) -> None:
    for moved in run_ranks(layout.world_size(1), one_rank_has_some, layout, rule):
        assert all(step > 0 for step in moved[::2]), "a row on one rank"
        assert all(step > 0 for step in moved[1:4:2]) and moved[5::2] == [0.0, 0.0], "none on any"
