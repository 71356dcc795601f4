"""outer_residual_kept: replicas go on from X_0 minus a share of what rounding has kept back of their own, and
nothing is counted twice or lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.cases import (
    Case,
    gradients,
    initial_values,
    make_optimizer,
    rounded_case,
    run_case,
    trajectory,
)
from support.layouts import LAYOUTS, Layout, local
from support.models import Toy, outcome
from support.ranks import run_ranks
from torch import Tensor

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.consensus.codec import CODECS
from curvadion.sharding.group import ThreadGroup
from curvadion.sharding.journey import Residuals

OPTIONS: Mapping[str, Any] = LOW_COMMUNICATION(max_local_steps=2, weight_decay=0.0, outer_residual_kept=0.5)

# bfloat16 rounds each element by itself, so that its residuals are the same on every layout.
KEPT = [
    rounded_case(16, delay, fragments, kept, local_steps=1)
    for fragments, delay, kept in [(1, 0, 0.5), (3, 1, 1.0)]
]


def run_kept(layout: Layout, case: Case) -> list[str]:
    placed = layout.build(initial_values(), 2)
    parts = [placed.parts_of(G[placed.replica]) for G in gradients(2)]
    return run_case(placed, parts, case, 2)


@pytest.mark.sample
@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_keeps_what_the_reference_keeps(layout: Layout, case: Case) -> None:
    trajectory(case, 2)
    ranks = run_ranks(layout.world_size(2), run_kept, layout, case)
    problems = [line for of_rank in ranks for line in of_rank]
    assert not problems, "\n".join(problems[:20])


def run_alike(layout: Layout) -> list[tuple[str, int]]:
    """Which parameters differ between the ranks of one replica that hold the same of them, and the bytes
    between replicas with and without."""
    found = []
    for kept in (0.0, 0.5):
        placed = layout.build(initial_values(), 2)
        optimizer = make_optimizer(placed, Case("alike", {**OPTIONS, "outer_residual_kept": kept}))
        for G in gradients(2)[:4]:
            placed.set_gradients(placed.parts_of(G[placed.replica]))
            optimizer.step()
        table = optimizer._built.table
        sent = sum(n for (axis, _), n in optimizer.ledger.bytes.items() if axis == "replicate")
        shared = [p for p, copied in zip(table.params, table.copied, strict=True) if copied]
        found.append((repr([local(p).tolist() for p in shared]), sent))
    return found


def test_what_ranks_of_a_replica_hold_alike_stays_alike_for_no_bytes_between_replicas() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "tp2_replicated")
    ranks = run_ranks(layout.world_size(2), run_alike, layout)
    for (_, without), (_, sent) in ranks:
        assert sent == without > 0
    kept = [whole for _, (whole, _) in ranks]
    assert len(kept[0]) > 10 and kept.count(kept[0]) == 2, "in this replica, and in no other"
    assert len({whole for (whole, _), _ in ranks}) == 1, "replicas are equal where nothing is kept"


# ---- replicas in threads


def train(toy: Toy, opt: CurvaDion, steps: range, replica: int) -> None:
    for step in steps:
        toy.set_gradients(step, replica)
        opt.step()


def common(opt: CurvaDion) -> list[Tensor]:
    return [x.clone() for x in opt._consensus.common(opt._built.store)["X_0"]]


def together(
    replicas: int, replica: Callable[[ThreadGroup, Toy, CurvaDion], Any], **options: Any
) -> list[Any]:
    """Return what each replica's function returns."""

    def run(group: ThreadGroup) -> Any:
        toy = Toy(dtype=torch.float64)
        return replica(group, toy, CurvaDion(toy.groups(), replicate_mesh=group, **{**OPTIONS, **options}))

    return ThreadGroup.run(replicas, run)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("kept", [0.25, 1.0])
def test_a_replica_goes_on_from_x_0_minus_a_share_of_its_residual(kept: float) -> None:
    """Right after a synchronized step; X_0 is bitwise that of all, and what the state can be saved with."""

    def replica(group: ThreadGroup, toy: Toy, opt: CurvaDion) -> tuple[list[Tensor], ...]:
        train(toy, opt, range(4), group.rank)  # S L L S
        assert opt.metrics()["curvadion/synchronized"]
        X_0, X = common(opt), [p.detach().clone() for p in toy.params.values()]
        [(residual, _)] = opt._consensus._residuals[0].pairs
        flat = torch.cat([x.detach().flatten() for x in opt._built.X()])
        start = torch.cat([x.flatten() for x in X_0])
        torch.testing.assert_close(flat, start - kept * residual[: len(flat)], rtol=0, atol=1e-14)
        assert float((flat - start).norm()) > 1e-3 * float(start.norm())
        assert opt.keeps_common_state
        with opt.common_state():
            assert equal(opt._built.X(), X_0)
        assert equal(list(toy.params.values()), X)
        with opt.consensus():
            mean = [p.detach().clone() for p in toy.params.values()]
        assert equal(list(toy.params.values()), X)
        return X_0, X, mean

    (x_0, x, mean), (y_0, y, other) = together(2, replica, outer_residual_kept=kept)
    assert equal(x_0, y_0) and not equal(x, y) and equal(mean, other)
    for m, a, b in zip(mean, x, y, strict=True):
        torch.testing.assert_close(m, (a + b) / 2)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 0.0),
        ({}, 0.5),
        ({}, 1.0),
        ({"outer_fragments": 3}, 0.5),
        ({"outer_delay": 2, "outer_bits": 4}, 0.5),
    ],
    ids=str,
)
def test_synchronize_makes_replicas_equal_and_owes_nothing(options: dict[str, Any], kept: float) -> None:
    """Without weight decay the updates depend on prescribed gradients alone, so the end shows what got lost;
    also where replicas weigh more and less, which they are told anew each time."""

    def replica(group: ThreadGroup, toy: Toy, opt: CurvaDion) -> tuple[list[Tensor], list[Tensor]]:
        for step in range(10):  # S L L S ..., the last one is synchronized
            if step % 3 == 0:
                group.share = [1 - 0.1 * step, 1.0, 1 + 0.1 * step][group.rank]
            train(toy, opt, range(step, step + 1), group.rank)
        opt.synchronize()
        state = opt.state_dict()
        ended = [p.detach().clone() for p in toy.params.values()]
        tensors = [state["state"][k][name] for k in state["state"] for name in sorted(state["state"][k])]
        return ended, tensors

    options = {**options, "outer_lr": 1.0}
    exact = together(3, replica, **{**options, "outer_bits": 32, "outer_residual_kept": 0.0})
    found = together(3, replica, **{**options, "outer_residual_kept": kept})
    for ended, state in found[1:]:
        assert equal(ended, found[0][0]) and equal(state, found[0][1])
    for x, y in zip(found[0][0], exact[0][0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_x_0_is_compared_between_replicas_and_parameters_are_not() -> None:
    def replica(group: ThreadGroup, toy: Toy, opt: CurvaDion) -> tuple[str, str]:
        train(toy, opt, range(8), group.rank)  # none of the checks raises
        if group.rank:
            opt._consensus.common(opt._built.store)["X_0"][1].add_(1e-9)
        return outcome(lambda: train(toy, opt, range(8, 9), group.rank))

    for kind, message in together(2, replica, check_every=1):
        assert kind == "ReplicaMismatchError" and "X_0 of layers.1.weight" in message
        assert message.count("weight") < 4, "the parameters themselves may differ"


def test_a_step_that_all_skip_moves_nothing_and_owes_the_same() -> None:
    """A replica's NaN where the step would have been synchronized: the next one is, with the same
    residuals."""

    def replica(group: ThreadGroup, toy: Toy, opt: CurvaDion) -> list[Tensor]:
        train(toy, opt, range(6), group.rank)
        before, X_0 = [p.detach().clone() for p in toy.params.values()], common(opt)
        kept = opt._consensus._residuals[0].copy()
        toy.set_gradients(6, group.rank)
        if group.rank:
            toy.params["layers.0.weight"].grad[0, 0] = math.nan
        opt.step()
        assert opt.metrics()["curvadion/skipped_steps"] == 1
        assert equal(list(toy.params.values()), before) and equal(common(opt), X_0)
        assert equal(kept.pairs[0], opt._consensus._residuals[0].pairs[0])
        train(toy, opt, range(6, 7), group.rank)
        assert opt.metrics()["curvadion/synchronized"]
        return common(opt)

    one, other = together(2, replica, on_nonfinite="skip", gate_every=1)
    assert equal(one, other) and all(bool(x.isfinite().all()) for x in one)


def test_a_frozen_parameter_does_not_move() -> None:
    """Frozen from the start, and after a while."""

    def replica(group: ThreadGroup) -> None:
        toy = Toy(dtype=torch.float64)
        never, later = toy.params["layers.1.weight"], toy.params["embedding.weight"]
        never.requires_grad_(False)
        opt = CurvaDion(toy.groups(), replicate_mesh=group, **OPTIONS)
        start = never.detach().clone()

        def train(steps: range) -> None:
            for step in steps:
                toy.set_gradients(step, group.rank)
                for p in toy.params.values():
                    p.grad = p.grad if p.requires_grad else None
                opt.step()

        train(range(5))
        later.requires_grad_(False)
        opt.synchronize()
        frozen = later.detach().clone()
        train(range(5, 12))
        opt.synchronize()
        assert torch.equal(never, start) and torch.equal(later, frozen)

    ThreadGroup.run(2, replica)


def test_a_gate_that_asks_needs_no_equal_replicas_and_one_that_does_is_refused() -> None:
    def replica(group: ThreadGroup, toy: Toy, opt: CurvaDion) -> tuple[list[Tensor], list[bool]]:
        synchronized = []
        for step in range(12):
            toy.set_gradients(step, group.rank, scale=4.0 if step % 5 == 4 else 1.0)
            opt.step()
            synchronized.append(bool(opt.metrics()["curvadion/synchronized"]))
        return common(opt), synchronized

    (x_0, steps), (y_0, others) = together(2, replica, gate_every=1, tau=0.3, max_local_steps=None)
    assert steps == others and 2 < sum(steps) < 12 and equal(x_0, y_0)
    with pytest.raises(ValueError, match="try 'outer' without outer_residual_kept, delay and fragments"):
        CurvaDion(Toy().groups(), **{**OPTIONS, "gate": "drift", "gate_every": 1})


def test_one_replica_keeps_nothing_because_nothing_is_rounded() -> None:
    ends = []
    for kept in (0.0, 0.5):
        toy = Toy()
        train(toy, CurvaDion(toy.groups(), **{**OPTIONS, "outer_residual_kept": kept}), range(7), 0)
        ends.append(list(toy.params.values()))
    assert equal(*ends)


@pytest.mark.parametrize("given", [0.0, 0.5, 1.0])
def test_one_that_is_left_alone_sends_what_it_kept_and_what_it_moved_by(given: float) -> None:
    """What its tensors have been moved by is in what they send, and owed no longer."""
    block, generator = CODECS[1].block, torch.Generator().manual_seed(0)
    residuals = Residuals()
    residuals.belong(1, 2)
    mine, ours = residuals.of(0, 4 * block, 2 * block, torch.empty(0, dtype=torch.float64))
    mine.copy_(torch.randn(len(mine), generator=generator))
    ours.copy_(torch.randn(len(ours), generator=generator))
    owed = mine.clone()
    owed[2 * block :] += ours
    moved = given * mine
    residuals.given = given
    other = residuals.copy()
    assert other.given == given
    other.take_back()
    other.take_back()  # once
    other.fold(1)
    torch.testing.assert_close(other.pairs[0][0] + moved, owed)
    assert residuals.given == given and torch.equal(residuals.pairs[0][1], ours)
    residuals.clear()
    assert residuals.given == 0 and not residuals.in_use
