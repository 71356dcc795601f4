"""Replicas that die at random operations of the store and of gloo, and come back: not part of the test
command.

    ROUNDS=50 SEED=0 python -m pytest -q -s tests/nightly_elastic.py
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
from support.elastic import train
from support.replicas import Jobs

STEPS = 97
OPTIONS: list[dict[str, Any]] = [
    {},
    {"outer_bits": 32},
    {"outer_bits": 4, "outer_momentum": 0.6, "outer_lr": 0.7},
    {"outer_fragments": 2, "max_local_steps": 3},
    {"gate_every": 1},
    {"gate_every": 2, "tau": 0.3},
]


def at_operation(rank: int, number: int, *, after: bool) -> Any:
    return lambda of, what, count, done: what != "step" and (of, count, done) == (rank, number, after)


@pytest.mark.parametrize("number", range(int(os.environ.get("ROUNDS", "20"))))
def test_whoever_is_left_takes_every_step_and_all_are_equal(number: int) -> None:
    draw = random.Random(1000 * int(os.environ.get("SEED", "0")) + number)
    options, ranks = draw.choice(OPTIONS), draw.choice([1, 1, 2])
    victims = draw.sample("abc", draw.choice([1, 1, 2]))
    where = {v: (draw.randrange(ranks), draw.randrange(1, 400), draw.random() < 0.5) for v in victims}
    told = f"round {number}: {options}, {ranks} ranks, {where}"
    began = time.monotonic()
    with Jobs(deadline=180) as jobs:
        for name in "abc":
            dies = (
                at_operation(where[name][0], where[name][1], after=where[name][2]) if name in where else None
            )
            jobs.start(name, train, STEPS, options, dies, ranks=ranks)
        deaths = 0
        for name in victims:
            if jobs.died(name):
                deaths += 1
                time.sleep(draw.choice([0, 0, 1, 4]))
                jobs.start(name, train, STEPS, options, ranks=ranks)
        found = dict(zip("abc", jobs.results(*"abc"), strict=True))
    shards = {name: got if ranks > 1 else [got] for name, got in found.items()}
    for name in set("abc") - set(victims):
        for shard in shards[name]:
            assert shard["taken"] == list(range(STEPS)), told
    late = {name for name in victims if "too late" in shards[name][0]}
    for k in range(ranks):
        ends = [shards[name][k] for name in "abc" if name not in late]
        assert all(
            (end["history"][-1], end["X_0"]) == (ends[0]["history"][-1], ends[0]["X_0"]) for end in ends
        ), told
    stayed = [shard for name in "abc" if name not in victims for shard in shards[name]]
    longest, views = max(shard["longest"] for shard in stayed), len(stayed[0]["history"])
    seconds = time.monotonic() - began
    print(f"{told}: {deaths} deaths, {views} views, {len(late)} too late, {longest=:.1f} s, {seconds:.0f} s")
