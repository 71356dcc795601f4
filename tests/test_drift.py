"""gate="drift": what it sees is FDA's linear estimate, computed here from whole parameters of all
replicas."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.cases import SCALES, Case, gradients, initial_values, make_optimizer
from support.layouts import LAYOUTS, Layout, whole
from support.models import Toy, gathered
from support.ranks import run_ranks
from support.wire import Wire, run_recorded

from curvadion import CurvaDion, NonFiniteError
from curvadion.sharding.group import ThreadGroup

# The estimate is a difference of float32 sums.
RTOL = 1e-4
SOME = [
    layout
    for layout in LAYOUTS
    if layout.name in ("plain_group", "fsdp4_empty_shards", "tp2_replicated", "fsdp2_tp2")
]
AVERAGE: dict[str, Any] = {"gate": "drift", "tau": 0.02, "local_update": "dion"}
OUTER: dict[str, Any] = {**AVERAGE, "local_update": "muon", "consensus": "outer", "outer_lr": 0.8}


def everything(placed: Any) -> torch.Tensor:
    """All parameters of this replica, whole, as one vector."""
    return torch.cat([whole(p).flatten() for p in placed.bag.parameters()])


def run_estimates(
    layout: Layout, replicas: int, options: dict[str, Any]
) -> list[tuple[bool, float, float, bool]]:
    """By step: synchronized, what the gate saw, what it should have seen, and whether it had no choice."""
    placed = layout.build(initial_values(), replicas)
    optimizer = make_optimizer(placed, Case("drift", options))
    X = X0 = everything(placed)
    xi, trace = torch.zeros_like(X0), []
    for step in range(len(SCALES)):
        theirs = [torch.empty_like(X) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, X)
        drifts = [x - X0 for x in theirs[:: layout.world_size(1)]]  # one rank of each replica
        mean_square = sum(float(d @ d) for d in drifts) / replicas
        along = sum(float(d @ xi) for d in drifts) / replicas
        placed.set_gradients(placed.parts_of(gradients(replicas)[step][placed.replica]))
        optimizer.step()
        X = everything(placed)
        synchronized = bool(optimizer.metrics()["curvadion/synchronized"])
        undefined = any(math.isnan(rmmc) for rmmc in optimizer.named_rmmc().values())
        seen = optimizer.gate_values()["variance"]
        trace.append((synchronized, seen, mean_square - along**2, any(gathered(undefined))))
        if synchronized:
            xi, X0 = (X - X0) / (X - X0).norm(), X
    return trace


@pytest.mark.parametrize(
    ("layout", "replicas", "options"),
    [
        *((layout, 2, AVERAGE) for layout in SOME),
        *((layout, 2, OUTER) for layout in SOME if layout.world_size(2) <= 4),
        (SOME[0], 3, AVERAGE),
        (SOME[0], 3, OUTER),
    ],
    ids=lambda value: value.get("consensus", "average") if isinstance(value, dict) else str(value),
)
def test_the_gate_opens_when_replicas_are_apart(
    layout: Layout, replicas: int, options: dict[str, Any]
) -> None:
    runs = run_ranks(layout.world_size(replicas), run_estimates, layout, replicas, options)
    assert len({tuple(synchronized for synchronized, *_ in run) for run in runs}) == 1, (
        "all ranks decide alike"
    )
    for _, seen, expected, _ in runs[0]:
        assert seen == pytest.approx(expected, rel=RTOL, abs=1e-5)
    free = [(s, v) for s, v, _, no_choice in runs[0][1:] if not no_choice]
    assert [s for s, _ in free] == [v > options["tau"] for _, v in free]
    assert {True, False} <= {s for s, _ in free}, "both branches"


def run_wire() -> tuple[list[tuple[str, int]], dict[str, int]]:
    toy = Toy()
    optimizer = CurvaDion(toy.groups(), replicate_mesh=dist.group.WORLD, gate="drift", tau=math.inf)
    wire = Wire(1)
    for step in range(3):
        toy.set_gradients(step, dist.get_rank())
        wire.since_last()
        optimizer.step()
    sent = [(entry.operation, entry.bytes) for entry in wire.since_last()]
    return sent, {p: n for (axis, p), n in optimizer.ledger.last_step.items() if axis == "replicate" and n}


def test_a_closed_drift_gate_sends_two_numbers_and_the_key() -> None:
    for sent, ledger in run_recorded(2, run_wire):
        assert sorted(sent) == [("all_reduce", 8), ("all_reduce", 8)]
        assert ledger == {"drift": 8, "gate": 8}


def run_nan_parameter() -> str:
    toy = Toy()
    optimizer = CurvaDion(toy.groups(), replicate_mesh=dist.group.WORLD, gate="drift", tau=math.inf)
    for step in range(2):
        toy.set_gradients(step, dist.get_rank())
        optimizer.step()
    with torch.no_grad():
        if dist.get_rank() == 1:
            toy.params["embedding.weight"][0, 0] = math.nan  # a row that no token reads shows no gradient
    toy.set_gradients(2, dist.get_rank())
    with pytest.raises(NonFiniteError):
        optimizer.step()
    return "raised"


def test_a_parameter_that_is_not_finite_is_seen_on_every_replica() -> None:
    assert run_ranks(2, run_nan_parameter) == ["raised", "raised"]


@pytest.mark.parametrize(
    "options",
    [
        {"consensus": "none"},
        {"consensus": "outer", "outer_delay": 2},
        {"consensus": "outer", "outer_fragments": 2},
    ],
    ids=str,
)
def test_it_needs_replicas_that_are_equal_after_a_synchronized_step(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="gate='drift' needs replicas that are equal after a synchronized step"
    ):
        CurvaDion(Toy().groups(), gate="drift", **options)


def test_a_lag_is_refused_because_it_would_wait() -> None:
    with pytest.raises(ValueError, match="gate='drift' waits for numbers of the other replicas.*gate_lag=1"):
        CurvaDion(Toy().groups(), gate="drift", gate_lag=1)


def test_a_group_added_while_replicas_are_apart_leaves_the_direction_common() -> None:
    def replica(group: ThreadGroup) -> list[tuple[torch.Tensor, float, bool]]:
        toy, extra = Toy(), torch.nn.Parameter(torch.ones(3, 2))
        opt = CurvaDion(toy.groups(), replicate_mesh=group, gate="drift", tau=math.inf, warmup_steps=2)
        trace = []
        for step in range(8):
            if step == 4:
                opt.add_param_group({"params": [("extra.weight", extra)]})
                extra.grad = torch.full((3, 2), 1.0 + group.rank)
            X = torch.cat([p.detach().flatten() for p in [*toy.params.values(), extra]])
            toy.set_gradients(step, group.rank)
            opt.step()
            trace.append((X, opt.gate_values()["variance"], bool(opt.metrics()["curvadion/synchronized"])))
        return trace

    one, other = ThreadGroup.run(2, replica)
    X0 = one[0][0]
    xi = torch.zeros_like(X0)
    for step, ((a, seen, synchronized), (b, theirs, _)) in enumerate(zip(one, other, strict=True)):
        if step and one[step - 1][2]:
            assert torch.equal(a, b), "equal after a synchronized step"
            xi, X0 = (a - X0) / (a - X0).norm(), a
        u = torch.stack([a - X0, b - X0])
        expected = float(u.square().sum(1).mean() - (u @ xi).mean().square())
        assert seen == theirs == pytest.approx(expected, rel=RTOL, abs=1e-6)
        assert synchronized == (step in (0, 1, 4)), "the step after add_param_group is synchronized"
    assert expected > 0 and float((u @ xi).mean().abs()) > 0.01


@pytest.mark.parametrize("view", [True, False])
def test_a_parameter_of_another_shape_for_a_step_does_no_harm_later(view: bool) -> None:
    def replica(group: ThreadGroup) -> list[float]:
        toy = Toy()
        wide = toy.params["layers.1.weight"]
        options: dict[str, Any] = {"gate": "drift", "tau": math.inf, "on_nonfinite": "skip"}
        opt = CurvaDion(toy.groups(), replicate_mesh=group, **options)
        seen = []
        for step in range(5):
            toy.set_gradients(step, group.rank)
            if step == 2:
                opt.synchronize()  # the next step takes X_0 from the parameters
                before = wide.data
                if group.rank == 0:
                    wide.grad, wide.data = None, before.T if view else before.T.clone()
                with suppress(RuntimeError):  # if the memory is the same, the step is skipped
                    opt.step()
                wide.data = before
                toy.set_gradients(step, group.rank)
            opt.step()
            seen.append(opt.gate_values()["variance"])
        assert opt.metrics()["curvadion/step"] == 5 and opt.metrics()["curvadion/skipped_steps"] <= 1
        return seen

    one, other = ThreadGroup.run(2, replica)
    assert one == other and all(map(math.isfinite, one)) and one[2] == 0 < one[4]
