"""Replicas that die at random operations of the store and of gloo, and come back: not part of the test
command.

    ROUNDS=50 SEED=0 DEADLINE=180 python -m pytest -q -s tests/nightly_elastic.py
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
from support.elastic import train
from support.replicas import Jobs, end
from torch.distributed import PrefixStore, TCPStore

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup, param_groups_for
from curvadion.sharding.group import TorchGroup

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
    with Jobs(deadline=float(os.environ.get("DEADLINE", "180"))) as jobs:
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
    assert longest < 50, f"{told}: somebody waited for the timeout of 60 s"
    print(f"{told}: {deaths} deaths, {views} views, {len(late)} too late, {longest=:.1f} s, {seconds:.0f} s")


def one_collective(address: str, name: str, delay: float) -> bool:
    """Return whether an all-to-all, in the middle of which c dies, ends well here."""
    host, port = address.split(":")
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    group = TorchGroup.meet(PrefixStore("group", store), "abc".index(name), 3, connect=20, timeout=10)
    sent = torch.ones(3 << 18)
    work = group.all_to_all(torch.empty_like(sent), sent)
    if name == "c":
        time.sleep(delay)
        end()
    try:
        work.wait()
    except RuntimeError:
        return False
    return True


def test_a_collective_may_end_well_on_one_rank_and_fail_on_another() -> None:
    """Why there is a vote after it."""
    draw, found = random.Random(0), Counter[tuple[bool, bool]]()
    for _ in range(30):
        with Jobs() as jobs:
            delay = draw.random() * 0.006
            for name in "abc":
                jobs.start(name, one_collective, delay)
            a, b = jobs.results("a", "b")
            found[a, b] += 1
    print({f"a {'well' if a else 'failed'}, b {'well' if b else 'failed'}": n for (a, b), n in found.items()})


def timed(address: str, name: str, millions: int) -> dict[str, float]:
    """Return seconds of joining, and the least of some synchronized steps and ballots of three replicas."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(millions)))
    group = ElasticGroup(address, name, expected=2, lease=2.0, timeout=60)
    options = LOW_COMMUNICATION(max_local_steps=0)
    opt = CurvaDion(
        param_groups_for(model, overrides={"": "adamw"}), replicate_mesh=group, check_every=0, **options
    )
    began = time.monotonic()
    opt.join()
    joined, steps, ballots = time.monotonic() - began, list[float](), list[float]()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    while len(steps) < 10:
        times = [time.monotonic()]
        opt.step()
        times.append(time.monotonic())
        opt._built.exchange.max_over_replicas(torch.zeros((), dtype=torch.int64))
        times.append(time.monotonic())
        if opt.replicas == 3:
            steps.append(times[1] - times[0])
            ballots.append(times[2] - times[1])
    return {"join": joined, "step": min(steps), "ballot": min(ballots)}


@pytest.mark.parametrize("millions", [1, 4])
def test_times(millions: int) -> None:
    with Jobs(deadline=240) as jobs:
        for name in "ab":
            jobs.start(name, timed, millions)
        time.sleep(1)
        jobs.start("c", timed, millions)
        *_, third = jobs.results(*"abc")
    print(
        f"{millions}M parameters of a replica: { ({what: round(took, 4) for what, took in third.items()}) } s"
    )
