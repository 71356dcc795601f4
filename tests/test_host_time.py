"""What keeps the host busy in a step: operations of ATen for one matrix more; and that matrices in lots are
what they are one by one, to the last bit. Times are for benchmarks/step.py --host-time.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import host_time
import pytest
import torch
from support.models import shipped
from torch import Tensor

from curvadion import CurvaDion
from curvadion.rules import RULES
from curvadion_kernels import reference
from curvadion_kernels.fixed import SMALL_ELEMENTS, STACK_ELEMENTS, Fixed, Views, largest

FEW, MANY = 20, 120
# For a small matrix more: its parameter is multiplied by the decay and moved, one operation each; making a
# view of its direction takes two. Dion makes views of P and Q, and one product. Fused AdamW has 7.
MOST = {"gradient": 2, "muon": 4, "normuon": 4, "dion2": 4, "dion": 6}
OTHERS: list[tuple[dict[str, Any], float]] = [
    ({"max_local_steps": 0}, 6),
    ({"local_update": "muon", "consensus": "outer", "max_local_steps": 0, "outer_fragments": 4}, 23),
    ({"local_update": "muon", "on_nonfinite": "skip"}, 4),
]


def grown(options: dict[str, Any]) -> float:
    """Return the operations of a step for one matrix more."""
    counts = []
    for count in (FEW, MANY):
        optimizer = CurvaDion(
            host_time.parameters(count, 4), **({"tau": float("inf"), "check_every": 0} | options)
        )
        for _ in range(5):  # the first steps make what is made once
            host_time.step(optimizer)
        counts.append(host_time.operations(optimizer))
    return (counts[1] - counts[0]) / (MANY - FEW)


@pytest.mark.parametrize("rule", shipped(RULES))
def test_a_matrix_more_costs_a_local_step_few_operations(rule: str) -> None:
    assert grown({"local_update": rule}) <= MOST[rule]


@pytest.mark.parametrize(("options", "most"), OTHERS, ids=str)
def test_a_matrix_more_costs_other_steps_few_operations(options: dict[str, Any], most: float) -> None:
    assert grown(options) <= most


def momenta(dtype: torch.dtype) -> Views:
    """Return views of three stacks, out of order: many in a lot, several lots, and one by one."""
    small, large = STACK_ELEMENTS // 5, SMALL_ELEMENTS + 1
    shapes = [(5, 3, 7), (7, small // 128, 128), (2, large, 1), (1, 0, 4)]
    places = torch.randperm(sum(shape[0] for shape in shapes)).split([shape[0] for shape in shapes])
    return Views.of(
        [(some.tolist(), torch.randn(shape).to(dtype)) for some, shape in zip(places, shapes, strict=True)]
    )


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_lots_are_what_matrices_one_by_one_are(dtype: torch.dtype, given: torch.dtype, store: bool) -> None:
    torch.manual_seed(0)
    M = momenta(dtype)
    alone = [m.clone() for m in M]
    G: list[Tensor | None] = [torch.randn(m.shape).to(given) for m in M]
    G[1], G[3] = None, torch.zeros_like(M[3])
    G[2] = -torch.ones_like(M[2])
    before = [m.clone() for m in M]
    message = reference.momentum_norm_(M, Fixed(G), store=store)
    expected = reference.momentum_norm_(alone, G, store=store)
    torch.testing.assert_close(message, expected, rtol=0, atol=0)
    for m, one, old in zip(M, alone, before, strict=True):
        torch.testing.assert_close(m, one, rtol=0, atol=0)
        assert store or torch.equal(m, old)
    assert sorted(k for lot in M.lots for k in lot.places) == list(range(len(M)))
    assert all(lot.stack.numel() <= STACK_ELEMENTS or len(lot.places) == 1 for lot in M.lots)
    lots = {place: lot.stack[row] for lot in M.lots for row, place in enumerate(lot.places)}
    assert all(lots[k].data_ptr() == m.data_ptr() for k, m in enumerate(M)), "they are the same memory"


def test_largest_values_are_norms_with_nans_and_infinities() -> None:
    nan, inf = float("nan"), float("inf")
    values = [[0.0, -0.0], [-3.0, 2.0], [nan, 1.0], [inf, 0.0], [-inf, nan], [-1e-45, 0.0]]
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    tensors += [torch.tensor([[2.0], [-7.0]], dtype=torch.float64), torch.tensor(-4.0, dtype=torch.bfloat16)]
    expected = torch.stack([t.double().abs().max() for t in tensors])
    torch.testing.assert_close(largest(tensors), expected, rtol=0, atol=0, equal_nan=True)


def test_host_time_is_measured_against_fused_adamw(tmp_path: Any, capsys: Any) -> None:
    rows = host_time.measured(3, 2, seconds=0.0)
    names = [row["variant"] for row in rows]
    assert names == [host_time.BASE, *host_time.LOCAL, *host_time.SYNCHRONIZED]
    assert {*shipped(RULES)} <= {*names} and rows[0]["ratio"] == 1.0
    arguments = SimpleNamespace(out=tmp_path / "out.jsonl")
    host_time.report(rows, arguments, {})
    written = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    assert [row["variant"] for row in written] == names and "3 of 2 x 2, 1 rank:" in capsys.readouterr().out
