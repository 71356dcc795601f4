"""The benchmark of sharded steps counts what happens: collectives and bytes as the optimizer's ledger
does."""

from __future__ import annotations

import pytest
import sharded
import torch
import torch.distributed as dist
from support.ranks import run_ranks


def counted(families: list[str], replicas: int) -> list[tuple[str, list[float], dict[str, float]]]:
    sizes = (replicas, dist.get_world_size() // replicas)
    mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(mesh["shard"].get_local_rank())
    weights = sharded.Weights("small", mesh["shard"])
    if replicas > 1:
        found = sharded.outer_entries(weights, mesh["replicate"])
    else:
        found = sharded.entries(families, weights, mesh["shard"], "small")
    found = [entry for entry in found if "microsoft" not in entry.name]
    ready = sharded.prepare(
        found, weights, torch.device("cpu"), alone=replicas == 1
    )  # which compares bytes with the ledger
    assert len(ready) == len(found), "none may be left out"
    sharded.measure(ready, torch.device("cpu"), 0.0, seed=0)
    return [(entry.name, entry.ms, entry.counted) for entry in ready]


def test_steps_on_shards() -> None:
    ranks = run_ranks(2, counted, ["muon", "gradient"], 1)
    for name, ms, _ in ranks[0]:
        assert len(ms) == 3 and min(ms) > 0, name
    own, together, bf16, gradient, adamw = (found for _, _, found in ranks[0])
    assert own["shard_wire_bytes"] < together["shard_wire_bytes"]
    # Norms and flags, the same in both dtypes, go on top.
    norms = gradient["shard_wire_bytes"]
    assert 0 < norms < 0.01 * own["shard_wire_bytes"]
    assert own["shard_wire_bytes"] - norms == pytest.approx(2 * (bf16["shard_wire_bytes"] - norms))
    assert own["calls"] == gradient["calls"] + 2
    assert own["owned"] == 14 and together["owned"] == 0
    assert sum(rank[0][2]["flops"] for rank in ranks) < sum(rank[1][2]["flops"] for rank in ranks)
    assert own["transient_bytes"] > gradient["transient_bytes"]
    assert adamw["shard_wire_bytes"] == adamw["calls"] == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_of_replicas(ranks: int) -> None:
    local, one_bit, exact = (found for _, _, found in run_ranks(ranks, counted, ["outer"], 2)[-1])
    assert local["replicate_wire_bytes"] == 0
    assert 0 < one_bit["replicate_wire_bytes"] < exact["replicate_wire_bytes"] / 20
