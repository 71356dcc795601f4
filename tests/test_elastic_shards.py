"""Replicas of several ranks that leave and come back: they leave as a whole, count as a whole, and one rank
that stands still does not end the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from support.elastic import LEASE, Tiny, batches, groups_of, train
from support.ranks import serve_store
from support.replicas import Jobs
from torch.distributed.fsdp import fully_shard

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup
from curvadion.sharding.membership import Board, LeftBehindError, Membership, Pulse, View

Dies = Callable[[int, str, int, bool], bool]


def from_step(which: int, operation: str, of_rank: int, *, after: bool = False) -> Dies:
    """In the first operation of this name once a step has begun."""
    begun = False

    def dies(rank: int, what: str, count: int, done: bool) -> bool:
        nonlocal begun
        begun |= what == "step" and count == which
        return begun and rank == of_rank and what == operation and done == after

    return dies


STEPS = 25  # 0, 8, 16 and 24 are synchronized
PLACES: dict[str, Dies] = {
    "in a local phase": from_step(12, "step", 1),
    "before the second leg": from_step(16, "all_gather", 1),
    "in the second leg": from_step(16, "all_gather", 0, after=True),
}


def come_and_go(address: str, name: str) -> None:
    ElasticGroup(address, name, lease=LEASE, timeout=60).leave()


def test_a_replica_of_which_one_rank_dies_leaves_as_a_whole() -> None:
    """Wherever it dies, the others go on as if it had been gone before; bitwise, on all their shards."""
    found = {}
    for place, dies in PLACES.items():
        with Jobs() as jobs:
            for name in "abc":
                jobs.start(name, train, STEPS, {}, dies if name == "c" else None, ranks=2)
            assert jobs.died("c")
            jobs.start("c", come_and_go, ranks=2)  # so that nobody waits for the lease
            found[place] = jobs.results("a", "b")
    for place, (a, b) in found.items():
        assert [shard["X"] for shard in a] == [shard["X"] for shard in b], place
        assert [shard["X"] for shard in a] == [x["X"] for x in found["in a local phase"][0]], place
        assert all(shard["taken"] == list(range(STEPS)) for shard in (*a, *b)), place
        assert all(shard["history"][-1][1] == ("a", "b") for shard in (*a, *b)), place


def share_of(address: str, name: str, tokens: dict[str, list[float]]) -> float:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Tiny()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    group = ElasticGroup(address, name, expected=2, lease=LEASE, timeout=60)
    opt = CurvaDion(groups_of(model), replicate_mesh=group, **LOW_COMMUNICATION(outer_bits=32))
    opt.join()
    for loss in batches(model, ord(name), rank, 0, 2):
        opt.zero_grad()
        loss.backward()
        group.tokens += tokens[name][rank]
        opt.step()
    return group.share


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        ({"a": [100, 300], "b": [300, 100]}, (1.0, 1.0)),
        ({"a": [0, 0.5], "b": [1.5, 0]}, (0.5, 1.5)),
    ],
    ids=["alike", "three times as many"],
)
def test_a_replica_counts_what_all_its_ranks_have_trained_on(
    tokens: dict[str, list[float]], shares: tuple[float, float]
) -> None:
    """Each rank has data of its own, and counts it; a replica has one share for all shards of a parameter."""
    with Jobs() as jobs:
        for name in "ab":
            jobs.start(name, share_of, tokens, ranks=2)
        a, b = jobs.results(*"ab")
    assert [a, b] == [[share] * 2 for share in shares]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_replica_of_which_a_rank_stands_still_is_left_behind(ranks: int) -> None:
    """Its rank 0 beats for it; the others wait for its other ranks for the timeout, and no longer."""
    server, port = serve_store()
    pulses, lock = list[Pulse](), threading.Lock()

    def rank_of(life: str, shard: int) -> list[str] | str:
        def open_board() -> Board:
            return Board(f"localhost:{port}", 20.0)

        board = open_board()
        pulse = Pulse(open_board, board, life, 5.0)
        with lock:
            pulses.append(pulse)
        if shard == 0:
            pulse.start()
        sizes = {"shard": shard, "shards": ranks, "expected": 2, "lease": 5.0, "timeout": 1.5}
        members = Membership(board, pulse, life, **sizes)  # type: ignore[arg-type]
        view, stands_still = View(1, ("a.1", "b.1")), life == "b.1" and shard == ranks - 1
        assert members.ballot(view) is not None
        if stands_still:
            return "stands still"
        assert members.ballot(view) is None, "closed after the timeout"
        try:
            return list(members.next_view(view).members)
        except LeftBehindError:
            return "left behind"

    try:
        with ThreadPoolExecutor(2 * ranks) as pool:
            lives = [(life, shard) for life in ("a.1", "b.1") for shard in range(ranks)]
            found = list(pool.map(lambda of: rank_of(*of), lives))
    finally:
        for pulse in pulses:
            pulse.stop()
        server.kill()
        server.join()
    assert found == [["a.1"]] * ranks + ["left behind"] * (ranks - 1) + ["stands still"]
