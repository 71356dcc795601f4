"""Replicas that leave and come back: no step is lost on the others, and all are equal at the end.

At random operations instead of chosen ones: tests/nightly_elastic.py.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from support.elastic import LEASE, Tiny, batches, groups_of, train
from support.replicas import Jobs, end, on_operations

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup
from curvadion.consensus import CODECS
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
    "stopped before the first leg": at("all_to_all", 3, after=False),
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
                how = signal.SIGSTOP if "stopped" in place else signal.SIGKILL
                jobs.start(name, train, STEPS, {}, PLACES.get(place) if name == "c" else None, LEASE, how)
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
        assert max(a["longest"], b["longest"]) < 40, "not the timeout"


def test_what_is_kept_is_owed_once_wherever_a_replica_dies() -> None:
    """X_0 is the same on those that are left, and each goes on as if the third had been gone before."""
    with ExitStack() as stack:
        runs = {place: stack.enter_context(Jobs()) for place in ("in a local phase", "in the second leg")}
        for place, jobs in runs.items():
            for name in "abc":
                kept = {"outer_residual_kept": 0.5}
                jobs.start(name, train, STEPS, kept, PLACES[place] if name == "c" else None)
        found = [jobs.results("a", "b") for jobs in runs.values()]
    for a, b in found:
        assert a["X_0"] == b["X_0"] and a["X"] != b["X"], "synchronized in the last step"
    assert [replica["X"] for replica in found[0]] == [replica["X"] for replica in found[1]]


def test_a_replica_comes_back_fifty_steps_later_and_costs_the_others_none() -> None:
    steps = 121
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, {}, at_step(27) if name == "b" else None)
        assert jobs.died("b")
        jobs.wait_for("steps of a", 77)
        jobs.start("b", train, steps, {})
        a, b, c = jobs.results(*"abc")
    assert a["taken"] == c["taken"] == list(range(steps))
    assert b["taken"][0] >= 77 and b["taken"] == list(range(b["taken"][0], steps))
    assert (b["taken"][0] - 1) % 8 == 0, "right after a synchronized step"
    assert a["history"][-1] == b["history"][-1] == c["history"][-1] == (3, ("a", "c", "b"))
    assert a["X"] == b["X"] == c["X"] and a["lr"] == b["lr"]
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, {})
        undisturbed = jobs.results(*"abc")
    assert abs(a["loss"] - undisturbed[0]["loss"]) < 0.02  # of 2.77 at the start


def mean_of_those_left(address: str, name: str, tokens: dict[str, float], dies: Dies | None) -> float:
    """Return what the replicas' mean of 1, 10 and 100 is, one of them leaving on its way."""

    def happened(what: str, count: int, after: bool) -> None:
        if dies is not None and dies(0, what, count, after):
            end()

    on_operations(happened)
    group = ElasticGroup(address, name, expected=3, lease=LEASE, timeout=60)
    model = torch.nn.Linear(4, 4, bias=False)
    opt = CurvaDion(list(model.named_parameters()), replicate_mesh=group, **LOW_COMMUNICATION)
    opt.join()
    group.tokens = tokens[name]
    exchange = opt._built.exchange
    exchange.max_over_replicas(torch.zeros((), dtype=torch.int64))
    x = torch.tensor([{"a": 1.0, "b": 10.0, "c": 100.0}[name]])
    mean = exchange.start_mean_over_replicas([x], [()], "pseudo_gradients", None, Residuals())
    [arrival] = mean.arrivals()
    return arrival.mean.item()


# The first all-reduce of sums is that of newcomers, who compare what they are.
@pytest.mark.parametrize(
    ("tokens", "dies", "expected"),
    [
        ({"a": 0, "b": 0, "c": 0}, None, 37.0),
        ({"a": 300, "b": 100, "c": 0}, None, 3.25),
        ({"a": 300, "b": 100, "c": 600}, at("all_reduce", 2, after=False), 3.25),
        ({"a": 0, "b": 0, "c": 600}, at("all_reduce", 2, after=True), 5.5),
    ],
    ids=["equally", "by tokens", "one dies before", "one dies after"],
)
def test_the_mean_is_of_those_that_are_there_weighted_by_their_tokens(
    tokens: dict[str, float], dies: Dies | None, expected: float
) -> None:
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, mean_of_those_left, tokens, dies if name == "c" else None)
        found = jobs.results(*("ab" if dies else "abc"))
    assert found == pytest.approx([expected] * len(found), rel=1e-6)


@pytest.mark.parametrize(("left", "numel"), [([0, 2], 700), ([1], 128), ([2, 0, 1], 500)])
def test_what_rounding_has_kept_back_outlives_a_replica_but_for_its_own(left: list[int], numel: int) -> None:
    """Those that are left owe the mean, by elements, what they owed before: E_i[e_i] + f."""
    block, generator = 128, torch.Generator().manual_seed(0)
    length = numel + -numel % (3 * block)
    kept = []
    for rank in range(3):
        residuals = Residuals()
        residuals.belong(rank, 3)
        mine, ours = residuals.of(0, length, length // 3, torch.empty(0, dtype=torch.float64))
        mine.copy_(torch.randn(len(mine), generator=generator))
        ours.copy_(torch.randn(len(ours), generator=generator))
        kept.append(residuals)
    owed = sum(kept[old].pairs[0][0] for old in left) / len(left)
    for old in left:
        owed[old * length // 3 : (old + 1) * length // 3] += kept[old].pairs[0][1]
    after = numel + -numel % (len(left) * block)
    for rank, old in enumerate(left):
        before = kept[old].copy()
        kept[old].belong(rank, len(left))
        mine, ours = kept[old].of(0, after, after // len(left), torch.empty(0, dtype=torch.float64))
        assert (len(mine), len(ours)) == (after, after // len(left))
        assert before.pairs[0][0].shape == (length,), "a copy stays what it was"
    now = sum(kept[old].pairs[0][0] for old in left) / len(left)
    for rank, old in enumerate(left):
        ours = kept[old].pairs[0][1]
        now[rank * len(ours) : (rank + 1) * len(ours)] += ours
    torch.testing.assert_close(now[:numel], owed[:numel])


def two_means(address: str, name: str) -> tuple[list[float], ...]:
    """Return what came of two vectors, the second of which the other replica does not live to see."""
    group = ElasticGroup(address, name, expected=2, lease=LEASE, timeout=60)
    model = torch.nn.Linear(4, 4, bias=False)
    opt = CurvaDion(list(model.named_parameters()), replicate_mesh=group, **LOW_COMMUNICATION)
    opt.join()
    X = torch.randn(2, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, means = Residuals(), []
    for x in X:
        if name == "b" and means:
            end()
        under_way = opt._built.exchange.start_mean_over_replicas(
            [x], [()], "pseudo_gradients", CODECS[2], kept
        )
        [arrival] = under_way.arrivals()
        means.append(arrival.mean.tolist())
    return X.sum(0).tolist(), *means


def test_one_that_is_left_alone_owes_nothing_any_more() -> None:
    """In the half of the elements that it rounded for both."""
    with Jobs() as jobs:
        for name in "ab":
            jobs.start(name, two_means)
        [[total, first, second]] = jobs.results("a")
    came = torch.tensor(first) + torch.tensor(second)
    torch.testing.assert_close(came[:128], torch.tensor(total)[:128])
    assert (came[128:] - torch.tensor(total)[128:]).abs().max() > 0.01, "what the other had kept back is lost"


def after_a_load(address: str, name: str) -> tuple[Any, ...]:
    torch.manual_seed(ord(name))
    model = Tiny().bfloat16()
    earlier = CurvaDion(groups_of(model), **LOW_COMMUNICATION)
    for loss in batches(model, ord(name), 0, 0, {"a": 3, "b": 12, "c": 0}[name]):
        loss.backward()
        earlier.step()
    group = ElasticGroup(address, name, expected=3, lease=LEASE, timeout=60)
    opt = CurvaDion(groups_of(model), replicate_mesh=group, **LOW_COMMUNICATION)
    opt.load_state_dict(earlier.state_dict())
    begin = opt.join()
    momenta = [opt.state[p]["momentum"].tolist() for p in model.parameters() if "momentum" in opt.state[p]]
    model(torch.arange(16)).float().logsumexp(-1).sum().backward()
    opt.step()  # which compares all replicas
    while not opt.metrics()["curvadion/synchronized"]:
        opt.step()
    with pytest.raises(RuntimeError, match="must be equal to be saved"):
        opt.state_dict()
    same = True
    if group.rank == 0:  # saves for all
        resumed = CurvaDion(groups_of(copy.deepcopy(model)), **LOW_COMMUNICATION)
        with opt.common_state():
            resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        same = resumed.metrics()["curvadion/step"] == opt.metrics()["curvadion/step"]
    return begin, momenta, group.names, [p.tolist() for p in model.parameters()], same


def test_those_that_start_together_go_on_from_the_one_that_has_taken_most_steps() -> None:
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, after_a_load)
        a, b, c = jobs.results(*"abc")
    assert a == b == c
    assert a[0] == 12 and a[2] == ["b", "a", "c"] and a[-1]


def test_a_replica_that_was_taken_for_dead_is_told_so() -> None:
    steps = 700
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(name, train, steps, {}, None, 3.0)
        jobs.wait_for("steps of b", 20)
        jobs.kill("b", signal.SIGSTOP)
        jobs.wait_for("steps of a", jobs.store.add("steps of b", 0) + 9)  # it has been given up by then
        jobs.kill("b", signal.SIGCONT)
        with pytest.raises(AssertionError, match="LeftBehindError: the other replicas have gone on"):
            jobs.results("b")
        jobs.kill("b")


def refused(address: str, name: str) -> list[str]:
    model = torch.nn.Linear(4, 4, bias=False)
    group = ElasticGroup(address, name, lease=1.0, timeout=5)
    messages = []

    def collect(call: Callable[[], Any]) -> None:
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))

    def build(**options: Any) -> CurvaDion:
        return CurvaDion(list(model.named_parameters()), replicate_mesh=group, **options)

    collect(build)
    collect(partial(build, **LOW_COMMUNICATION, outer_delay=2))
    collect(partial(build, **LOW_COMMUNICATION(gate_every=1), gate_lag=1))
    collect(partial(build, **LOW_COMMUNICATION(gate_every=1), gate="drift"))
    opt = build(**LOW_COMMUNICATION)
    model.weight.grad = torch.ones(4, 4)
    collect(opt.step)
    collect(opt.synchronize)
    collect(opt.broadcast_parameters)
    joined = build(**LOW_COMMUNICATION)
    joined.join()
    joined.step()
    new = {"params": [("new", torch.nn.Parameter(torch.ones(4, 4)))]}
    collect(partial(joined.add_param_group, new))
    with joined.common_state():
        saved = copy.deepcopy(joined.state_dict())
    resumed = CurvaDion([("weight", torch.nn.Parameter(model.weight.detach().clone()))], **LOW_COMMUNICATION)
    resumed.load_state_dict(saved)
    resumed.add_param_group(new)  # as the message says
    model.weight.requires_grad_(False)
    collect(joined.step)
    collect(CurvaDion(list(model.named_parameters())).join)
    collect(partial(ElasticGroup, address, "a b"))
    collect(partial(ElasticGroup, "somewhere", "a"))
    collect(partial(ElasticGroup, address, "b", lease=3.0, timeout=2.0))
    return messages


def test_what_cannot_be_done_again_by_those_that_are_left_is_refused() -> None:
    with Jobs() as jobs:
        jobs.start("a", refused)
        [messages] = jobs.results("a")
    needs = ["an ElasticGroup needs consensus='outer' with outer_delay=0, gate_lag=0"] * 4
    others = [
        "call opt.join() once",
        "synchronize() needs all replicas",
        "broadcast_parameters() needs all replicas",
        "start them again, load, and add it before join()",
        "the replicas of an ElasticGroup cannot follow a change of requires_grad",
        "pass replicate_mesh=ElasticGroup(...)",
        "letters, digits",
        "HOST:PORT",
        "lease positive and less than timeout",
    ]
    for message, part in zip(messages, [*needs, *others], strict=True):
        assert part in message


def built_with(address: str, name: str, width: int, options: dict[str, Any]) -> list[Any]:
    model = torch.nn.Linear(width, 4, bias=False)
    group = ElasticGroup(address, name, expected=2, lease=LEASE, timeout=60)
    groups = [{"params": list(model.named_parameters()), **options}]
    opt = CurvaDion(groups, replicate_mesh=group, **LOW_COMMUNICATION)
    opt.join()
    return group.names


def test_a_replica_that_is_built_otherwise_does_not_get_in() -> None:
    """Nor one whose groups lay out their state otherwise, be it in tensors of the same shapes."""
    others: dict[str, tuple[int, dict[str, Any]]] = {
        "b": (9, {}),
        "d": (8, {"splits": 2}),
        "e": (8, {"rank_fraction": 1.0}),
        "f": (8, {"local_update": "normuon"}),
        "g": (8, {"weight_layout": "in_out"}),
    }
    with Jobs() as jobs:
        jobs.start("a", built_with, 8, {})
        for name, built in others.items():
            jobs.start(name, built_with, *built)
            with pytest.raises(
                AssertionError, match="ReplicaMismatchError: a replica that joins must be built as"
            ):
                jobs.results(name)
            jobs.kill(name)
        jobs.start("c", built_with, 8, {"lr": 0.1})
        assert jobs.results("a", "c") == [["a", "c"], ["a", "c"]]
