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
from sharded import IN_PLACE
from support.layouts import LAYOUTS, Layout, Placed, local, whole
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from curvadion import CurvaDion, costs, param_groups_for
from curvadion.algebra import sizes
from curvadion.algebra.iteration import Iteration
from curvadion.sharding import crew
from curvadion.sharding.dealing import Spread, assign
from curvadion.sharding.group import Pairwise
from curvadion.sharding.region import Region

INF = float("inf")


def flops(rows: int, columns: int) -> float:
    return Iteration().flops(rows, columns, "float32")


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


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[7]], ids=str)
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


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[9]], ids=str)
def test_matrices_travel_in_buckets(layout: Layout) -> None:
    run_ranks(layout.world_size(1), buckets, layout)


TALL_AND_WIDE = [(24, 16), (8, 40), (17, 17), (40, 12)]
Moved = tuple[dict[str, torch.Tensor], dict[str, float], dict[str, int], int]


def dion_steps(layout: Layout, replicas: int, options: dict[str, Any]) -> Moved:
    """Parameters after three steps on shards; what a step sent over them, in how many calls; owners."""
    costs.PIECES = 1  # with pieces of 400 elements, so that there are several buckets
    sizes.PIECE_ELEMENTS["cpu"] = 400
    torch.manual_seed(0)
    values = {f"layer{i}.weight": torch.randn(shape) for i, shape in enumerate(TALL_AND_WIDE * 2)}
    placed = layout.build(values, replicas)
    groups = [{"params": list(placed.bag.named_parameters())}]
    opt = CurvaDion(
        groups, replicate_mesh=placed.replicate_mesh, rank_fraction=1.0, owners="always", **options
    )
    for _ in range(3):
        placed.set_gradients(placed.parts_of({name: torch.randn(v.shape) for name, v in values.items()}))
        before = opt.ledger.calls["shard", "matrices"]
        opt.step()
    wire = {purpose: sent for (axis, purpose), sent in opt.ledger.last_step_wire.items() if axis == "shard"}
    calls = opt.ledger.calls["shard", "matrices"] - before
    return {name: whole(p) for name, p in placed.bag.named_parameters()}, wire, opt.owners, calls


def rows_of(shape: tuple[int, int], ranks: int, rank: int) -> tuple[int, int, int, int]:
    """The longer and the shorter side, and how much of each a rank has."""
    rows = len((*torch.arange(shape[0]).chunk(ranks), *[()] * ranks)[rank])
    m, n = max(shape), min(shape)
    return (m, n, rows, n) if shape[0] >= shape[1] else (m, n, m, rows)


@pytest.mark.sample
@pytest.mark.parametrize("right_factor", ["column_norm", "qr"])
@pytest.mark.parametrize("method", ["cholesky_qr", "qr"])
def test_whole_matrices_go_to_their_owners_and_rows_of_the_factors_come_back(
    method: str, right_factor: str
) -> None:
    """And nothing is summed over the shards: no P, no R, no Gram matrix, no norm."""
    options = {"local_update": "dion", "tau": INF, "orthogonalization": method, "right_factor": right_factor}
    [(alone, *_)] = run_ranks(1, dion_steps, LAYOUTS[0], 1, options)
    layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2")
    ranks = layout.world_size(1)
    for rank, (values, wire, owners, calls) in enumerate(run_ranks(ranks, dion_steps, layout, 1, options)):
        torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-4)
        numbers = 0
        for i, shape in enumerate(TALL_AND_WIDE * 2):
            _, n, long, short = rows_of(shape, ranks, rank)
            if owners[f"layer{i}.weight"] != rank:
                numbers += long * short + (short * n if short < n else 0)  # M, and Q if it is split
                continue
            for other in set(range(ranks)) - {rank}:
                _, _, long, short = rows_of(shape, ranks, other)
                numbers += long * n + short * n  # P, R
                numbers += short * n if right_factor == "qr" else n  # Q, or the factors of its columns
        assert wire["matrices"] == 4 * numbers and calls > 2
        assert not any(sent for purpose, sent in wire.items() if purpose not in ("matrices", "norms"))


@pytest.mark.parametrize("method", ["cholesky_qr", "qr"])
def test_with_a_mean_over_replicas_the_rows_of_P_go_to_its_owner(method: str) -> None:
    """And no Gram matrix to anybody. Of a wide matrix that is split by rows, P is on all ranks already, and
    goes back to all of them."""
    options = {"tau": 0.0, "orthogonalization": method}
    alone, *_ = run_ranks(2, dion_steps, LAYOUTS[0], 2, options)
    layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2")
    ranks = layout.world_size(1)
    for place, (values, wire, owners, _) in enumerate(run_ranks(2 * ranks, dion_steps, layout, 2, options)):
        torch.testing.assert_close(values, alone[0], rtol=1e-4, atol=1e-4)
        numbers, rank = 0, place % ranks
        for i, shape in enumerate(TALL_AND_WIDE * 2):
            m, r, long, _ = rows_of(shape, ranks, rank)
            mine = owners[f"layer{i}.weight"] % ranks == rank
            if shape[0] < shape[1]:
                numbers += m * r * (ranks - 1) if mine else 0
            else:
                numbers += m * r - long * r if mine else long * r
        assert wire["gram"] == 0 and wire["matrices"] == 4 * numbers


def synchronized_steps(layout: Layout, replicas: int, gbit: float | None, when: str) -> Any:
    torch.manual_seed(0)
    values = {f"layer{i}.weight": torch.randn(shape) for i, shape in enumerate(TALL_AND_WIDE)}
    placed = layout.build(values, replicas)
    opt = CurvaDion(
        [{"params": list(placed.bag.named_parameters())}],
        replicate_mesh=placed.replicate_mesh,
        max_local_steps=0,
        rank_fraction=1.0,
        orthogonalization="cholesky_qr",  # whose FLOPs are counted
        owners=when,
        replica_gbit=gbit,
    )
    for step in range(3):
        torch.manual_seed(10 * step + placed.replica)
        placed.set_gradients(placed.parts_of({name: torch.randn(v.shape) for name, v in values.items()}))
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            opt.step()
    state = {name: local(opt.state[p]["Q"]).clone() for name, p in placed.bag.named_parameters()}
    moved = {name: local(p).clone() for name, p in placed.bag.named_parameters()}
    common = {
        axis: sent for (axis, what), sent in opt.ledger.last_step_wire.items() if what == "common_factors"
    }
    return placed.replica, moved, state, common, counter.get_total_flops(), opt.owners


@pytest.mark.parametrize(("layout", "replicas"), [(LAYOUTS[0], 2), (LAYOUTS[0], 3), (LAYOUTS[2], 2)], ids=str)
def test_over_a_fast_link_each_P_has_one_owner_among_all_replicas(layout: Layout, replicas: int) -> None:
    size = layout.world_size(replicas)
    found = run_ranks(size, synchronized_steps, layout, replicas, INF, "always")
    repeated = run_ranks(size, synchronized_steps, layout, replicas, None, "never")
    shards = size // replicas
    for rank, (_, moved, Q, common, flops, owners) in enumerate(found):
        _, first, first_Q, *_ = found[rank % shards]
        for name in moved:
            assert torch.equal(moved[name], first[name]) and torch.equal(Q[name], first_Q[name])
        _, alone, _, nothing, most, _ = repeated[rank]
        torch.testing.assert_close(moved, alone, rtol=1e-4, atol=1e-5)
        assert len(owners) == len(TALL_AND_WIDE) and not nothing
        assert len(set(owners.values())) == min(size, len(owners)), "each rank owns as many as it can"
        across = 0
        for i, shape in enumerate(TALL_AND_WIDE):
            m, r, split = max(shape), min(shape), shape[0] >= shape[1] and shards > 1
            if owners[f"layer{i}.weight"] == rank:  # the others' rows, in each other replica
                across += (replicas - 1) * m * r * (1 if split else shards)
        assert common["replicate"] == 4 * across and (shards == 1) == ("shard" not in common)
        assert shards > 1 or flops < most
    assert {replica for replica, *_ in found} == set(range(replicas))


@pytest.mark.parametrize(("gbit", "spread"), [(None, False), (1e-3, False), (1e6, True)])
def test_the_link_decides_whether_replicas_share_owners(gbit: float | None, spread: bool) -> None:
    for _, _, _, common, _, owners in run_ranks(3, synchronized_steps, LAYOUTS[0], 3, gbit, "auto"):
        assert bool(owners) == spread and bool(common) == spread


def split_off() -> tuple[dict[str, torch.Tensor], int]:
    """Where torch would ask ranks outside of the replica to take part in making its group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "_splits_the_world", lambda: True)
        layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2_tp2")
        torch.manual_seed(0)
        values = {f"layer{i}.weight": torch.randn(shape) for i, shape in enumerate(SHAPES)}
        placed = layout.build(values, 2)
        opt = CurvaDion(
            [{"params": list(placed.bag.named_parameters())}],
            replicate_mesh=placed.replicate_mesh,
            local_update="muon",
            owners="always",
            tau=INF,
        )
        groups = dist.distributed_c10d.get_pg_count()
        for _ in range(3):
            placed.set_gradients(placed.parts_of({n: torch.randn(v.shape) for n, v in values.items()}))
            opt.step()
        opt.synchronize()
        assert isinstance(opt._built.owners.crew.group, Pairwise)
        assert dist.distributed_c10d.get_pg_count() == groups, "nobody made a group"
    return {name: whole(p) for name, p in placed.bag.named_parameters()}, len(set(opt.owners.values()))


def test_without_a_group_of_all_ranks_they_send_each_other_messages() -> None:
    ranks = run_ranks(8, split_off)
    [(alone, _)] = run_ranks(1, as_one_process)
    for values, owners in ranks:
        torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-5)
        assert owners == len(SHAPES)


def as_one_process() -> tuple[dict[str, torch.Tensor], int]:
    """The same steps: replicas with equal gradients are one."""
    placed, _, _ = laid_out(LAYOUTS[0], SHAPES)
    opt = CurvaDion(
        [{"params": list(placed.bag.named_parameters())}], local_update="muon", owners="always", tau=INF
    )
    for _ in range(3):
        placed.set_gradients({n: torch.randn(p.shape) for n, p in placed.bag.named_parameters()})
        opt.step()
    return {name: whole(p) for name, p in placed.bag.named_parameters()}, 0


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(layout: Layout, count: int, rule: str) -> int:
    """How many operations a local step of so many equal matrices takes on this rank."""
    _, opt, take_step = laid_out(layout, [(24, 16)] * count, local_update=rule, owners="always")
    for _ in range(3):
        take_step()
    with Operations() as counter:
        opt.step()
    return counter.number


@pytest.mark.parametrize("rule", ["muon", "dion"])
def test_equal_matrices_travel_as_one(rule: str) -> None:
    """So that four times as many take no more operations to pack, but those of the rules themselves."""
    layout = LAYOUTS[2]
    few, many = (run_ranks(layout.world_size(1), operations, layout, count, rule) for count in (8, 32))
    own = 24 * {"muon": 0, "dion": 1}[rule]  # each matrix takes its own update of low rank
    for a, b in zip(few, many, strict=True):
        assert b <= a + own, (a, b)
