"""What an optimizer says of its parameters is what it does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, grid
from support.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from curvadion import CurvaDion, assert_routing, param_groups_for

OUTER = {"consensus": "outer", "tau": float("inf"), "gate_every": None}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(8, 50, bias=False)


def test_rows_tell_groups_rules_rates_and_ranks() -> None:
    opt = CurvaDion(param_groups_for(Model(), adamw_lr=0.004), lr=0.1, local_lr_scale=0.5)
    rows = {row.name: row for row in opt.explain()}
    up = rows["layers.1.up.weight"]
    assert (up.shape, up.placement, up.algorithm, up.rule, up.rank) == (
        (24, 8),
        "matrices",
        "dion",
        "gradient",
        2,
    )
    assert up.lr == 0.05
    assert up.synchronized_lr == pytest.approx(0.1 * 3**0.5)
    head = rows["lm_head.weight"]
    assert (head.placement, head.rule, head.lr, head.rank, head.bytes) == ("head", "adamw", 0.004, None, 0.0)


@pytest.mark.parametrize(("rule", "rank"), [("muon", None), ("normuon", None), ("dion", 2), ("dion2", 2)])
def test_the_learning_rate_is_that_of_the_step(rule: str, rank: int | None) -> None:
    """The update over the row's learning rate is about orthonormal: its norm is the root of its rank."""
    opt = CurvaDion(
        param_groups_for(Model()), lr=0.1, weight_decay=0.0, local_update=rule, max_local_steps=9, **OUTER
    )
    [row] = [row for row in opt.explain() if row.name == "layers.0.down.weight"]
    assert (row.rule, row.rank) == (rule, rank)
    assert row.lr == row.synchronized_lr == pytest.approx(0.1 * (8 / 24) ** 0.5)
    place = next(i for i, name in enumerate(opt.matrix_names) if name == row.name)
    p = opt.param_groups[0]["params"][place]
    for group in opt.param_groups:
        for other in group["params"]:
            other.grad = torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    before = p.detach().clone()
    opt.step()
    size = float(torch.linalg.matrix_norm(before - p.detach())) / row.lr
    directions = rank or 8
    assert 0.6 * directions**0.5 < size < 1.3 * directions**0.5


def test_the_table_joins_what_is_alike() -> None:
    lines = str(
        CurvaDion(param_groups_for(Model()), local_update="muon", max_local_steps=9, **OUTER).explain()
    ).splitlines()
    assert lines[0].split() == (
        "name shape placement algorithm rule lr synchronized_lr rank owner bytes number".split()
    )
    [up] = [line.split() for line in lines if "up.weight" in line]
    assert up[:5] == ["layers.*.up.weight", "24", "x", "8", "matrices"]
    assert up[-4:] == ["-", "-", "0", "3"]
    assert len(lines) == 1 + 7


def test_assert_routing() -> None:
    opt = CurvaDion(param_groups_for(Model()), local_update="muon", max_local_steps=9, **OUTER)
    assert_routing(
        opt, {r"\.up\.weight": "muon", r"\.down\.weight": "dion", "lm_head": "head", "embed": "adamw"}
    )
    with pytest.raises(AssertionError, match="wants 'muon'; got rule 'adamw' of algorithm 'adamw' in 'head'"):
        assert_routing(opt, {"lm_head": "muon"})
    with pytest.raises(AssertionError, match="'lm_haed' finds no parameter"):
        assert_routing(opt, {"lm_haed": "adamw"})
    with pytest.raises(AssertionError, match="finds no parameter that no earlier"):
        assert_routing(opt, {"lm_head": "adamw", r"head\.weight": "adamw"})


# Every purpose that a synchronization has, between replicas.
PURPOSES = ("factors", "gradients", "parameters", "moments", "right_factor", "pseudo_gradients")
# Blocks of 128 values for each of 2 replicas and 2 shards, and an even number of matrices of each shape:
# nothing is padded.
SHAPES = {
    "matrices": {"a.weight": (32, 16), "b.weight": (32, 16), "c.weight": (16, 48), "d.weight": (16, 48)},
    "dense": {"embedding.weight": (32, 16), "norm.weight": (512,)},
}
SENT: dict[str, dict[str, Any]] = {
    "synchronous": {"max_local_steps": 0},
    "bfloat16": {"max_local_steps": 0, "payload_dtype": torch.bfloat16},
    "local": {"max_local_steps": 1, "tau": float("inf")},
    "local dion": {"max_local_steps": 1, "tau": float("inf"), "local_update": "dion"},
    "local normuon": {
        "max_local_steps": 1,
        "tau": float("inf"),
        "local_update": "normuon",
        "owners": "always",
    },
    "drifting": {"max_local_steps": 1, "tau": float("inf"), "consensus": "none"},
    "outer": {"max_local_steps": 1, **OUTER},
    "outer in one bit": {"max_local_steps": 1, "outer_bits": 1, **OUTER},
}


def _sent(shards: int) -> dict[str, tuple[float, int, list[int]]]:
    replicate, shard = grid(2, shards)
    found = {}
    for name, options in SENT.items():
        toy = Toy(shard, **SHAPES)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **options)
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
        said = sum(row.bytes for row in opt.explain() if row.bytes is not None)
        sent = sum(
            v for (axis, what), v in opt.ledger.last_step.items() if axis == "replicate" and what in PURPOSES
        )
        owners = [row.owner for row in opt.explain() if row.owner is not None]
        assert sorted(owners) == sorted(opt.owners.values())
        found[name] = (said, sent, owners)
    return found


@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_are_those_that_the_ledger_counts(shards: int) -> None:
    ranks = run_ranks(2 * shards, _sent, shards)[:shards]  # those of replica 0
    for name in SENT:
        [said] = {rank[name][0] for rank in ranks}
        assert sum(rank[name][1] for rank in ranks) == said > 0, name
    assert set(ranks[0]["local normuon"][2]) == set(range(shards))


def test_one_rank_alone_may_ask() -> None:
    """On a mesh of two dimensions that is not all the world, too, where a group of it has yet to be made."""

    def worker() -> list[int | None]:
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("shard", "tp"))
        if dist.get_rank() == 4:
            return []
        weight = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0), Shard(1)])
        opt = CurvaDion([nn.Parameter(weight)], local_update="muon", owners="always", max_local_steps=9)
        before = [row.owner for row in opt.explain()] if dist.get_rank() == 0 else []
        opt.param_groups[0]["params"][0].grad = weight
        opt.step()
        return [*before, *(row.owner for row in opt.explain())]

    results = run_ranks(5, worker, deadline=30)
    assert results[0] == [None, 0]
    assert results[1:] == [[0], [0], [0], []]
