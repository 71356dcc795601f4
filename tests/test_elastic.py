"""Replicas that leave and come back: no step is lost on the others, and all are equal at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.elastic import train
from support.replicas import Jobs

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


def run(steps: int, lives: dict[str, list[Dies]], **options: Any) -> list[dict[str, Any]]:
    """Run three replicas, some of which die and are started again at once, and return what became of all."""
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, options, lives.get(name, [None])[0])
        for name, deaths in lives.items():
            for following in [*deaths[1:], None]:
                assert jobs.died(name)
                jobs.start(name, train, steps, options, following)
        return jobs.results(*"abc")


def test_a_replica_that_dies_anywhere_and_comes_back_costs_the_others_no_step() -> None:
    import time
    t=time.time()
    lives = {"b": [at_step(10), at("all_to_all", 2, after=False), at("all_to_all", 2, after=True), at("all_gather", 2, after=False), at("all_gather", 2, after=True)]}
    a, b, c = run(401, lives)
    print(time.time()-t)
    for r in (a, b, c): print(r["loss"], r["history"], r["longest"], r["taken"][0], len(r["taken"]))
    assert a["taken"] == c["taken"] == list(range(401))
    assert a["X"] == b["X"] == c["X"]
