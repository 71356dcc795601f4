"""The optimizer's own work: what the formulas say of FLOPs and bytes is what is counted, rank by rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import IN_PLACE
from support.ranks import run_ranks
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from torch.utils.flop_counter import FlopCounterMode

from curvadion import CurvaDion
from curvadion.algebra.iteration import Iteration
from curvadion.algebra.power_iteration import orthogonalize
from curvadion.formats import name_of
from curvadion.projection.nominal import SIZES, Model
from curvadion.projection.rates import RATES, Rates
from curvadion.projection.work import (
    Settings,
    Work,
    busiest,
    local_step,
    orthogonalized,
    synchronized_step,
)

# Tall, wide, square, more ranks than rows for some, and rows that do not divide evenly.
MODEL = Model(((24, 16), (24, 16), (16, 24), (16, 16), (17, 5), (2, 9)), scalars=0)
INF = float("inf")
SHARD_SUMS = ("gram", "factors", "column_norms")  # all-reduced
CASES: dict[str, dict[str, Any]] = {
    "owners": {"local_update": "muon", "owners": "always"},
    "owners, bfloat16": {
        "local_update": "muon",
        "owners": "always",
        "newton_schulz_dtype": torch.bfloat16,
        "newton_schulz_steps": 6,
    },
    "owners, bfloat16 on the way": {
        "local_update": "muon",
        "owners": "always",
        "owner_dtype": torch.bfloat16,
    },
    "together": {"local_update": "muon", "owners": "never"},
    "auto": {"local_update": "muon", "owners": "auto"},
    "dion": {"local_update": "dion", "rank_fraction": 0.5},
    "dion, owners": {"local_update": "dion", "rank_fraction": 0.5, "owners": "always"},
    "dion, together": {"local_update": "dion", "rank_fraction": 0.5, "owners": "never"},
}


def counted() -> dict[str, tuple[float, dict[str, float], int]]:
    return {name: steps(options) for name, options in CASES.items()}


def steps(options: dict[str, Any]) -> tuple[float, dict[str, float], int]:
    torch.manual_seed(0)
    params: list[torch.nn.Parameter] = []
    shards = dist.get_world_size()
    for shape in MODEL.matrices:
        value: torch.Tensor = torch.randn(shape)
        if shards > 1:
            value = distribute_tensor(value, dist.init_device_mesh("cpu", (shards,)), [Shard(0)])
        params.append(torch.nn.Parameter(value))
    opt = CurvaDion(params, tau=INF, check_every=0, kernels="reference", **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p) if isinstance(p, DTensor) else torch.randn(p.shape)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            opt.step()
    sent = {purpose: wire for (axis, purpose), wire in opt.ledger.last_step_wire.items() if axis == "shard"}
    return float(counter.get_total_flops()), sent, len(opt.owners)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_flops_and_bytes_are_those_that_are_counted(shards: int) -> None:
    ranks = run_ranks(shards, counted)
    for name, options in CASES.items():
        named = {k: name_of(v) if isinstance(v, torch.dtype) else v for k, v in options.items()}
        how = Iteration("jordan", named.get("newton_schulz_steps", 5), named.get("newton_schulz_dtype"))
        same = {k: v for k, v in named.items() if k in ("owners", "owner_dtype", "rank_fraction")}
        settings = Settings(shards, how, device="cpu", **same)
        for rank, work in enumerate(local_step(MODEL, options["local_update"], settings)):
            flops, sent, owned = ranks[rank][name]
            assert sum(work.flops.values()) == pytest.approx(flops, rel=1e-12), (name, rank)
            assert work.all_to_all == pytest.approx(sent["matrices"], rel=1e-12), (name, rank)
            summed = sum(sent[purpose] for purpose in SHARD_SUMS)
            assert work.all_reduce == pytest.approx(summed, rel=1e-12), (name, rank)
            assert shards == 1 or work.owned == owned, (name, rank)


def test_work_of_owners_falls_with_the_shards_and_that_of_all_together_does_not() -> None:
    model = SIZES["1b3"].model

    def most(shards: int, owners: str) -> Work:
        return busiest(local_step(model, "muon", Settings(shards, owners=owners)), RATES["h100"], 8)

    for fewer, more in ((8, 64), (64, 512)):
        own, rare = most(fewer, "auto"), most(more, "auto")
        assert own.owned == rare.owned == len(model.matrices)
        assert rare.flops["bfloat16"] <= own.flops["bfloat16"] / 2
        assert rare.sent < own.sent / 1.5 and rare.transient <= own.transient
        kept, still = most(fewer, "never"), most(more, "never")
        assert still.sent > kept.sent and still.flops["bfloat16"] > kept.flops["bfloat16"] / 2


def test_seconds_by_hand() -> None:
    rates = Rates(
        bfloat16=10, float32=5, float64=2, memory=100, inside=20, across=4, cholesky=1, solve32=5, solve64=1,
        reduced=10, operation=0.5, call=2,
    )  # fmt: skip
    flops, solved = {"bfloat16": 30, "float32": 5, "float64": 6}, {"float32": 5, "float64": 1}
    work = Work(flops, 250, 40, 60, buckets=1, solved=solved, cholesky=3, reduced=5, operations=3, calls=2)
    parts = {"products": 5.0, "float64": 7.0, "memory": 3.0, "host": 5.5, "shard traffic": 5.0}
    assert work.seconds(rates, shards=8, gpus_per_node=8) == parts
    assert work.seconds(rates, shards=9, gpus_per_node=8) == parts | {"shard traffic": 17.0}
    # Three of four buckets travel behind 5 seconds of products, of 3 seconds inside a machine.
    hidden = replace(work, buckets=4).seconds(rates, shards=8, gpus_per_node=8)
    assert hidden == parts | {"shard traffic": 5.0 - 3 * 3 / 4}


@pytest.mark.parametrize(("rows", "r"), [(40, 24), (300, 270)])
def test_flops_of_an_orthogonalization(rows: int, r: int) -> None:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        orthogonalize([torch.randn(1, rows, r)], floor=1e-5)
    assert sum(orthogonalized(rows, r).flops.values()) == counter.get_total_flops()


def test_a_synchronized_step_is_a_local_one_and_what_it_sends() -> None:
    settings = Settings(2)
    for payload, rule in (("outer-1", "muon"), ("outer-32", "muon")):
        pairs = zip(
            synchronized_step(MODEL, payload, rule, settings), local_step(MODEL, rule, settings), strict=True
        )
        for synchronized, local in pairs:
            assert synchronized.flops == local.flops and synchronized.sent == local.sent
            assert synchronized.memory > local.memory
    assert synchronized_step(MODEL, "average", "muon", settings) == local_step(MODEL, "dion", settings)
    with pytest.raises(ValueError, match="known for gradient, dion, muon.*got 'dion2'"):
        local_step(MODEL, "dion2", settings)
