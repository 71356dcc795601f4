"""Owners of whole matrices: balance, bytes and work per rank, whatever the number of ranks; and what travels.

That every layout computes what one process computes is tested in tests/test_mesh_parity.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.layouts import LAYOUTS, Layout, Placed, local, whole
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from curvadion import CurvaDion, param_groups_for
from curvadion.algebra.newton_schulz import Iteration
from curvadion.sharding.layout import ShardMesh
from curvadion.sharding.owners import Spread, assign
from curvadion.sharding.region import Region

INF = float("inf")
flops = Iteration().flops
# (rows, columns): how many of them.
MODELS = {
    "12 layers of 256": {(256, 256): 48, (688, 256): 24, (256, 688): 12},
    "160M": {(768, 768): 48, (2048, 768): 24, (768, 2048): 12},
    "1.3B": {(2048, 2048): 88, (5632, 2048): 44, (2048, 5632): 22},
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64, 256, 1024])
@pytest.mark.parametrize("model", MODELS)
def test_no_rank_has_more_to_do_than_the_mean_and_one_matrix(model: str, ranks: int) -> None:
    shapes = MODELS[model]
    spreads = [Spread(shape, (Region((0, 0), shape),) * ranks, (), flops(*shape)) for shape in shapes]
    owners, load = assign(spreads, list(shapes.values()), ranks)
    assert [len(o) for o in owners] == list(shapes.values())
    for rank in range(ranks):
        own = sum(flops(*shape) * o.count(rank) for shape, o in zip(shapes, owners, strict=True))
        assert math.isclose(load[rank], own)
    total, largest = sum(load), max(flops(*shape) for shape in shapes)
    assert max(load) <= 1.1 * total / ranks + (largest if sum(shapes.values()) % ranks else 0)
    assert max(load) <= total / ranks + largest


class Matrices(nn.Module):
    """Matrices of given shapes, which nobody multiplies."""

    def __init__(self, shapes: dict[tuple[int, int], int]) -> None:
        super().__init__()
        each = [shape for shape, count in shapes.items() for _ in range(count)]
        self.matrices = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in each)


SMALL = {(64, 64): 48, (172, 64): 24, (64, 172): 12}  # the first of MODELS, by 4


def fake_steps(ranks: int, rank: int) -> tuple[float, int, float, float]:
    """Take two steps as one rank of many whose peers send nothing; return wire bytes, calls and FLOPs of the
    second, which is local, and the FLOPs that were planned."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    model = Matrices(SMALL)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks,)))
    opt = CurvaDion(
        param_groups_for(model, overrides={"": "dion"}),
        local_update="muon",
        tau=INF,
        check_every=0,
        owners="always",
        owner_dtype=torch.bfloat16,
    )
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = opt.ledger.calls["shard", "matrices"]
        with FlopCounterMode(display=False) as counter:
            opt.step()
    *_, plan = opt._built.owners.plans.values()  # after that of P in the first step
    sent = opt.ledger.last_step_wire["shard", "matrices"]
    dist.destroy_process_group()
    calls = opt.ledger.calls["shard", "matrices"] - before
    return sent, calls, float(counter.get_total_flops()), plan.load[rank]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64])
def test_bytes_and_work_of_a_local_step_fall_with_the_number_of_ranks(ranks: int) -> None:
    total = sum(count * flops(*shape) for shape, count in SMALL.items())
    numbers = sum(count * math.prod(shape) for shape, count in SMALL.items())
    largest = max(SMALL, key=math.prod)
    for rank in {0, ranks // 2, ranks - 1}:
        [(sent, calls, work, planned)] = run_ranks(1, fake_steps, ranks, rank)
        # An owner of one matrix more than others sends its update to all.
        slack = 2 * math.prod(largest) if ranks > 8 else 0
        assert sent <= 2.2 * 2 * numbers / ranks + slack, f"rank {rank} sent {sent} bytes"
        assert work == planned, f"rank {rank}"
        assert work <= 1.1 * total / ranks + flops(*largest), f"rank {rank}"
        assert calls % 2 == 0 and calls <= 2 * math.ceil(sum(SMALL.values()) / ranks)


SHAPES = [(24, 16), (8, 40), (17, 17)]
Step = Callable[[], None]


def laid_out(layout: Layout, shapes: list[tuple[int, int]], **options: Any) -> tuple[Placed, CurvaDion, Step]:
    """Random matrices of these shapes, their optimizer, and what takes a step with random gradients."""
    torch.manual_seed(0)
    values = {f"layer{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    placed = layout.build(values, 1)
    opt = CurvaDion([{"params": list(placed.bag.named_parameters())}], tau=INF, **options)

    def step() -> None:
        placed.set_gradients(placed.parts_of({name: torch.randn(v.shape) for name, v in values.items()}))
        opt.step()

    return placed, opt, step


def muon_steps(layout: Layout, when: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    options = {"weight_decay": 0.0, "lr": 1.0, "owners": when, "owner_dtype": dtype}
    placed, opt, take_step = laid_out(layout, SHAPES, local_update="muon", **options)
    for step in range(3):
        if step == 1:  # the first step is Dion's
            before = {name: whole(p).clone() for name, p in placed.bag.named_parameters()}
        take_step()
    named = opt.owners
    if when == "always" and layout.shards:
        ranks = set(range(dist.get_world_size()))
        assert set(named) == set(before) and set(named.values()) <= ranks, named
        assert len(set(named.values())) == min(len(ranks), len(before))
    else:
        assert not named or not layout.shards
    return {name: whole(p) - before[name] for name, p in placed.bag.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[8]], ids=str)
def test_owners_and_all_ranks_together_take_the_same_step(layout: Layout, dtype: torch.dtype | None) -> None:
    """In bfloat16 on the way, to its rounding of momenta and updates."""
    [alone] = run_ranks(1, muon_steps, LAYOUTS[0], "auto", None)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 0.02, "atol": 0.03}
    for when in ("always", "never"):
        for rank, moved in enumerate(run_ranks(layout.world_size(1), muon_steps, layout, when, dtype)):
            for name, update in moved.items():
                torch.testing.assert_close(
                    update, alone[name], **tolerance, msg=lambda m, n=name, r=rank: f"{n} on rank {r}: {m}"
                )


def buckets(layout: Layout) -> None:
    from curvadion.sharding import owners

    owners.BUCKET_ELEMENTS = 400  # so that there are several, of one matrix or two for each rank
    torch.manual_seed(0)
    values = {f"layer{i}.weight": torch.randn(24, 16, dtype=torch.float64) for i in range(7)}
    placed = layout.build(values, 1)
    opt = CurvaDion([{"params": list(placed.bag.named_parameters())}], local_update="muon", tau=INF)
    alone = [nn.Parameter(v.clone()) for v in values.values()]
    one = CurvaDion(alone, local_update="muon", tau=INF)
    for step in range(3):
        gradients = {name: torch.randn(v.shape, dtype=v.dtype) for name, v in values.items()}
        placed.set_gradients(placed.parts_of(gradients))
        for p, g in zip(alone, gradients.values(), strict=True):
            p.grad = g
        opt.step()
        one.step()
        if step == 0:  # Dion's first Q depends on names
            for p, (_, q) in zip(alone, placed.bag.named_parameters(), strict=True):
                p.data.copy_(whole(q))
                one.state[p]["momentum"].copy_(whole(opt.state[q]["momentum"]))
    for p, (name, q) in zip(alone, placed.bag.named_parameters(), strict=True):
        torch.testing.assert_close(
            whole(q), p.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    ranks = max(1, dist.get_world_size())
    assert opt.ledger.calls["shard", "matrices"] >= 2 * 2 * math.ceil(7 / (2 * ranks))
    assert local(q).numel() <= 24 * 16


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[3]], ids=str)
def test_matrices_travel_in_buckets(layout: Layout) -> None:
    run_ranks(layout.world_size(1), buckets, layout)


TALL_AND_WIDE = [(24, 16), (8, 40), (17, 17), (40, 12)]


def dion_steps(
    layout: Layout, method: str
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, int]]:
    options = {"rank_fraction": 1.0, "orthogonalization": method, "owners": "always"}
    placed, opt, take_step = laid_out(layout, TALL_AND_WIDE, local_update="dion", **options)
    for _ in range(3):
        take_step()
    wire = {purpose: sent for (axis, purpose), sent in opt.ledger.last_step_wire.items() if axis == "shard"}
    return {name: whole(p) for name, p in placed.bag.named_parameters()}, wire, opt.owners


@pytest.mark.parametrize("method", ["cholesky_qr", "qr"])
def test_the_rows_of_P_go_to_its_owner_and_no_gram_matrices_to_anybody(method: str) -> None:
    """Of a wide matrix that is split by rows, P is on all ranks already, and goes back to all of them."""
    [(alone, _, _)] = run_ranks(1, dion_steps, LAYOUTS[0], method)
    layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2")
    ranks = layout.world_size(1)
    for rank, (values, wire, owners) in enumerate(run_ranks(ranks, dion_steps, layout, method)):
        torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-4)
        numbers = 0
        for i, shape in enumerate(TALL_AND_WIDE):
            m, r = max(shape), min(shape)
            rows = [len(part) for part in torch.arange(m).chunk(ranks)]
            if shape[0] < shape[1]:
                numbers += m * r * (ranks - 1) if owners[f"layer{i}.weight"] == rank else 0
            else:
                mine = r * rows[rank]
                numbers += m * r - mine if owners[f"layer{i}.weight"] == rank else mine
        assert wire["gram"] == 0 and wire["matrices"] == 4 * numbers


def a_world_whose_groups_are_split_off() -> tuple[bool, bool, str]:
    """Where torch would ask ranks outside of the replica to take part in making its group."""
    mesh = dist.init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "fsdp", "tp"))
    alone = ShardMesh([distribute_tensor(torch.ones(4, 4), mesh["fsdp", "tp"], [Shard(0), Replicate()])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMesh, "can_meet", property(lambda _: False))
        weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh["fsdp"], [Shard(0)]))
        opt = CurvaDion([weight], local_update="muon", tau=INF, owners="always")
    return alone.can_meet, not opt.owners, opt._built.owners.when


def test_without_a_group_of_all_ranks_they_work_together() -> None:
    assert run_ranks(4, a_world_whose_groups_are_split_off) == [(True, True, "never")] * 4
