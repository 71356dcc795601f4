"""Replicas that leave and come back: no step is lost on the others, and all are equal at the end.

At random operations instead of chosen ones: tests/nightly_elastic.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from support.elastic import Tiny, batches, groups_of, train
from support.replicas import Jobs

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup
from curvadion.sharding.group import ThreadGroup
from curvadion.sharding.journey import Residuals

Dies = Callable[[int, str, int, bool], bool]


def at_step(which: int) -> Dies:
    return lambda rank, what, count, after: what == "step" and count == which


def at(operation: str, number: int, *, after: bool) -> Dies:
    """In the so-manieth operation of this name."""
    seen = 0

    def dies(rank: int, what: str, count: int, done: bool) -> bool:
        nonlocal seen
        seen += what == operation and done == after
        return seen == number

    return dies


STEPS = 25
# Steps 0, 8, 16 and 24 are synchronized, each by one all-to-all and one all-gather.
PLACES: dict[str, Dies] = {
    "in a local phase": at_step(12),
    "before the first leg": at("all_to_all", 3, after=False),
    "in the first leg": at("all_to_all", 3, after=True),
    "before the second leg": at("all_gather", 3, after=False),
    "in the second leg": at("all_gather", 3, after=True),
}


def in_threads(model: Tiny, group: ThreadGroup) -> list[Any]:
    model = copy.deepcopy(model)
    opt = CurvaDion(groups_of(model), lr=0.02, replicate_mesh=group, **LOW_COMMUNICATION)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / (2 * STEPS))
    for loss in batches(model, ord("a") + group.rank, 0, 0, STEPS):
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return [p.detach().tolist() for p in model.parameters()]


def test_a_synchronization_is_applied_by_all_that_are_left_or_done_again_from_where_it_began() -> None:
    """Wherever the third replica dies, the others go on as if it had been gone before; bitwise."""
    with ExitStack() as stack:
        runs = {place: stack.enter_context(Jobs()) for place in [*PLACES, "nowhere"]}
        for place, jobs in runs.items():
            for name in "abc":
                jobs.start(name, train, STEPS, {}, PLACES.get(place) if name == "c" else None)
        undisturbed = runs.pop("nowhere").results(*"abc")
        found = {place: jobs.results("a", "b") for place, jobs in runs.items()}
    torch.manual_seed(0)
    expected = ThreadGroup.run(3, partial(in_threads, Tiny()))
    assert [replica["X"] for replica in undisturbed] == expected
    for place, (a, b) in found.items():
        assert a["taken"] == b["taken"] == list(range(STEPS)), place
        assert a["history"] == b["history"] == [(1, ("a", "b", "c")), (2, ("a", "b"))], place
        assert a["X"] == b["X"] != expected[0], place
        assert a["X"] == found["in a local phase"][0]["X"], place


def test_a_replica_comes_back_fifty_steps_later_and_costs_the_others_none() -> None:
    steps = 161
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, {}, at_step(43) if name == "b" else None)
        assert jobs.died("b")
        jobs.wait_for("steps of a", 93)
        jobs.start("b", train, steps, {})
        a, b, c = jobs.results(*"abc")
    assert a["taken"] == c["taken"] == list(range(steps))
    assert b["taken"][0] >= 93 and b["taken"] == list(range(b["taken"][0], steps))
    assert (b["taken"][0] - 1) % 8 == 0, "right after a synchronized step"
    assert a["history"][-1] == b["history"][-1] == c["history"][-1] == (3, ("a", "c", "b"))
    assert a["X"] == b["X"] == c["X"] and a["lr"] == b["lr"]
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, {})
        undisturbed = jobs.results(*"abc")
    assert abs(a["loss"] - undisturbed[0]["loss"]) < 0.02  # of 2.77 at the start


