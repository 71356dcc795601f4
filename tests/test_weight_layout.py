"""A matrix that is stored as in x out takes the transpose of the steps of the same matrix stored as out x
in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import Shapes, Toy, whole
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from curvadion import CurvaDion

WIDE_TALL: Shapes = {"wide.weight": (6, 14), "tall.weight": (12, 5)}
SQUARE: Shapes = {"square.weight": (8, 8)}
# Dion's first Q lies along the columns of a square matrix, however it is stored.
RULES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "dion": ({"local_update": "dion"}, WIDE_TALL),
    "synchronized": ({}, WIDE_TALL),
    "muon": ({"local_update": "muon", "nesterov": True}, WIDE_TALL | SQUARE),
    "normuon": ({"local_update": "normuon"}, WIDE_TALL | SQUARE),
    "dion2": ({"local_update": "dion2", "rank_fraction": 0.5}, WIDE_TALL | SQUARE),
}
STEPS = 4


def run(rule: str, layout: str, scale: str = "spectral", shard: int | None = None) -> dict[str, Tensor]:
    """Train, and return the matrices as out x in."""
    options, shapes = RULES[rule]
    turned = layout == "in_out"
    stored = {name: shape[::-1] if turned else shape for name, shape in shapes.items()}
    mesh = None if shard is None else init_device_mesh("cpu", (2,))
    placements = {name: (Shard(shard or 0),) for name in stored}
    toy = Toy(mesh, matrices=stored, dense={}, dtype=torch.float64, placements=placements)

    def values(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return {n: toy.place(n, (w.T if turned else w).contiguous()) for n, w in found.items()}

    with torch.no_grad():
        for name, value in values(99).items():
            toy.params[name].copy_(value)
    common: dict[str, Any] = {"consensus": "outer", "tau": float("inf")}
    if rule == "synchronized":
        common = {"max_local_steps": 0}
    optimizer = CurvaDion(toy.groups(weight_layout=layout, update_scale=scale, **options), **common)
    for step in range(STEPS):
        for name, value in values(step).items():
            toy.params[name].grad = value
        optimizer.step()
    return {name: whole(p).T if turned else whole(p) for name, p in toy.params.items()}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ["spectral", "original", "match_rms_adamw"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_of_the_transpose(rule: str, scale: str) -> None:
    compare(run(rule, "in_out", scale), run(rule, "out_in", scale))


def _sharded(shard: int) -> dict[str, dict[str, Tensor]]:
    return {rule: run(rule, "in_out", shard=shard) for rule in RULES}


@pytest.mark.parametrize("shard", [0, 1])
def test_steps_of_the_transpose_in_shards(shard: int) -> None:
    expected = {rule: run(rule, "out_in") for rule in RULES}
    for got in run_ranks(2, _sharded, shard):
        for rule, matrices in expected.items():
            compare(got[rule], matrices)


def test_options_and_checkpoints_of_another_layout_are_refused() -> None:
    toy = Toy(matrices=SQUARE, dense={})
    with pytest.raises(ValueError, match="weight_layout must be one of 'out_in', 'in_out'"):
        CurvaDion(toy.groups(weight_layout="transposed"))
    saved = CurvaDion(toy.groups(local_update="normuon")).state_dict()
    with pytest.raises(ValueError, match="saved with the weight_layout of each group"):
        CurvaDion(toy.groups(local_update="normuon", weight_layout="in_out")).load_state_dict(saved)
