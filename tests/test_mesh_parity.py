"""Mesh parity: at a fixed number of replicas K, every layout computes what one process simulating K replicas
computes.

All in fp64. Each case runs long enough to take both branches of the gate several times, with replicas that
drift apart, over matrices of many kinds at once (rank-deficient, zero, dead rows, missing gradients) next to
AdamW and Lion parameters. X, M and the moments are compared, never P or Q: their column signs are free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.cases import (
    ALGORITHMS,
    AWAKENS_AT,
    BASE,
    CASES,
    DEFICIENT_RANK,
    MARGIN,
    RTOL,
    SHAPES,
    Case,
    compare,
    difference,
    first_right_factors,
    gradients,
    initial_values,
    make_optimizer,
    run_case,
    trajectory,
)
from support.layouts import LAYOUTS, Layout, local, part_of, whole
from support.ranks import run_ranks
from support.reference import ReferenceReplicas
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from curvadion import CurvaDion

WITH_ALL = ("plain_mesh", "fsdp2")  # of those that run everywhere, with two replicas
EVERYWHERE = [case for case in CASES if case.everywhere]
# Three, because a mean over two is exact in binary; one, where nothing crosses replicas.
LAYOUTS_AND_REPLICAS = [
    *((layout, 1) for layout in LAYOUTS if layout.name not in WITH_ALL),
    *((layout, 2) for layout in LAYOUTS),
    (LAYOUTS[0], 3),
]


def replicas_of(case: Case, layout: Layout, complete: bool) -> set[int]:
    """With how many replicas a case runs there that runs on all layouts: one in three with two, so that each
    rule does so on one of the three layouts of 8 ranks, where a run takes longest, and the others with one.
    If complete with both. One replica has no use for a consensus."""
    with_two = (EVERYWHERE.index(case) + LAYOUTS.index(layout)) % 3 == 0
    if "consensus" in case.options:
        return {2}
    return {1, 2} if complete else {2} if with_two else {1}


def runs_on(layout: Layout, replicas: int, complete: bool) -> list[Case]:
    """The cases of a layout. Some run everywhere, as `replicas_of` says. The others: where tensors are plain
    all; with FSDP2 every other one, if complete all, also of the gate alone; each on one of the four layouts
    of tensor parallelism, if complete on two; with three replicas one in four, if complete all."""
    if replicas == 2 and (layout.name == "plain_mesh" or (complete and layout.name == "fsdp2")):
        return CASES
    if replicas == 2 and layout.name == "fsdp2":
        return [c for k, c in enumerate(CASES) if c.everywhere or (k % 2 and not c.gate_only)]
    every = 2 if complete else 4
    some = replicas == 2 and layout.world_size(2) == 4
    number = LAYOUTS.index(layout)
    return [
        case
        for k, case in enumerate(CASES)
        if (case.everywhere and (replicas in replicas_of(case, layout, complete) or replicas == 3))
        or (some and not case.everywhere and not case.gate_only and k % every == number % every)
        or (replicas == 3 and not case.gate_only and (complete or k % every == 0))
    ]


def run_cases(layout: Layout, replicas: int, cases: list[Case]) -> list[str]:
    placed = layout.build(initial_values(), replicas)
    parts = [placed.parts_of(G[placed.replica]) for G in gradients(replicas)]
    return [problem for case in cases for problem in run_case(placed, parts, case, replicas)]


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS_AND_REPLICAS, ids=str)
def test_layout_computes_what_one_process_computes(
    layout: Layout, replicas: int, complete: bool, quick: bool
) -> None:
    cases = [case for case in runs_on(layout, replicas, complete or quick) if case.everywhere or not quick]
    for case in cases:
        trajectory(case, replicas)  # here, not in every forked rank
    problems = run_ranks(layout.world_size(replicas), run_cases, layout, replicas, cases)
    lines = [f"rank {rank}: {problem}" for rank, of_rank in enumerate(problems) for problem in of_rank]
    assert not lines, f"{len(lines)} differences from the reference:\n" + "\n".join(lines[:40])


def test_every_layout_takes_what_runs_everywhere() -> None:
    """With one replica or with two; and each with two on a layout of 8 ranks."""
    ran = [
        (layout, replicas, case)
        for layout, replicas in LAYOUTS_AND_REPLICAS
        for case in runs_on(layout, replicas, complete=False)
        if case.everywhere
    ]
    places = {(layout.name, case.name) for layout, replicas, case in ran if replicas < 3}
    assert places == {(layout.name, case.name) for layout in LAYOUTS for case in EVERYWHERE}
    assert {case for layout, replicas, case in ran if layout.world_size(replicas) == 8} == set(EVERYWHERE)


def check_layout(layout: Layout) -> list[str]:
    """DTensor's own gathering must give back what was cut by hand; returns the placements that occur."""
    placed = layout.build(initial_values(), 1)
    placed.set_gradients(placed.parts_of(initial_values()))
    placements = set()
    for name, parameter in placed.bag.named_parameters():
        value = initial_values()[name]
        assert torch.equal(whole(parameter), value), f"{name} is not the value it was built from"
        assert torch.equal(local(parameter), part_of(value, parameter)), (
            f"{name} is cut otherwise than by hand"
        )
        assert parameter.grad is not None and torch.equal(whole(parameter.grad), value), (
            f"the gradient of {name}"
        )
        placements.add(
            str(getattr(parameter, "placements", "plain")) + " empty" * (local(parameter).numel() == 0)
        )
    return sorted(placements)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_layouts_are_what_they_claim(layout: Layout) -> None:
    placements = " ".join(
        p for of_rank in run_ranks(layout.world_size(1), check_layout, layout) for p in of_rank
    )
    for claim, sign in {
        "plain": "plain",
        "fsdp2": "(Shard(dim=0),)",
        "empty": "empty",
        "colwise": "(Shard(dim=0),)",
        "rowwise": "(Shard(dim=1),)",
        "replicated": "(Replicate(),)",
        "fsdp2_tp2": "_StridedShard",
        "twice": "(Shard(dim=0), Shard(dim=0))",
    }.items():
        assert claim not in layout.name or sign in placements, f"{layout.name} has only {placements}"


@pytest.mark.parametrize("replicas", [1, 2], ids=["K1", "K2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_are_what_they_claim(case: Case, replicas: int) -> None:
    """Both branches occur, RMMCs stay clear of tau, replicas drift and meet, dead columns are dead."""
    moments = trajectory(case, replicas)
    branches = [moment.outcome.synchronized for moment in moments]
    assert branches[0], "the first step has no previous norm, so it is synchronized"
    assert branches.count(True) >= 3 and branches.count(False) >= 3, f"too few of one branch: {branches}"
    assert any(not a and b for a, b in itertools.pairwise(branches)), "no synchronized step after a local"
    margin = min(moment.outcome.margin for moment in moments)
    assert margin > MARGIN, f"an RMMC is within {margin:.1e} of tau, so fp32 norms might decide otherwise"
    if replicas == 2:
        for step, (moment, synchronized) in enumerate(zip(moments, branches, strict=True)):
            left, right = (replica.X["tall.weight"] for replica in moment.replicas)
            if not synchronized and step != case.synchronize_after:
                assert not torch.allclose(left, right), "replicas do not differ after a local step"
            elif (
                case.options.get("consensus") != "none"
                and not {"outer_delay", "outer_fragments"} & case.options.keys()
            ):
                assert torch.equal(left, right), "replicas differ after a synchronized step"
    M = moments[-1].replicas[0].M
    for name in ("deficient.weight", "deficient_wide.weight"):
        assert torch.linalg.matrix_rank(M[name]) <= DEFICIENT_RANK, f"{name} has no dead columns"
    assert not M["silent.weight"].any() and float(M["dead_rows.weight"][:5].abs().max()) < 1e-12


# Gradients that come from a backward pass are views into FSDP's flat buffer, at odd offsets.
BACKWARD_CASE = Case("backward", {"local_update": "dion"})


def run_backward() -> list[str]:
    layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2")
    placed = layout.build(initial_values(), 2)
    optimizer = make_optimizer(placed, BACKWARD_CASE)
    problems = []
    for step, G in enumerate(gradients(2)):
        matrices = {n: g for n, g in G[placed.replica].items() if n in optimizer.matrix_names}
        placed.bag(matrices).backward()
        for name, part in placed.parts_of(G[placed.replica]).items():
            if name not in matrices:
                placed.bag.get_parameter(name).grad = part
        optimizer.step()
        problems += [
            f"step {step}: {p}" for p in compare(optimizer, placed, trajectory(BACKWARD_CASE, 2)[step])
        ]
        optimizer.zero_grad()
    return problems


def test_gradients_of_a_real_fsdp_backward() -> None:
    trajectory(BACKWARD_CASE, 2)
    problems = [line for of_rank in run_ranks(4, run_backward) for line in of_rank]
    assert not problems, "\n".join(problems[:40])


def run_always_open(replicas: int) -> None:
    case = Case("open", {"max_local_steps": 0})
    placed = LAYOUTS[0].build(initial_values(), replicas)
    optimizer = make_optimizer(placed, case)
    central = ReferenceReplicas(
        initial_values(),
        replicas=1,
        Q0=first_right_factors(case),
        groups={name: {"algorithm": ALGORITHMS.get(name, "dion")} for name in SHAPES},
        max_local_steps=0,
        **{key: value for key, value in BASE.items() if key != "rank_fraction"},
    )
    for step, G in enumerate(gradients(replicas)):
        placed.set_gradients(placed.parts_of(G[placed.replica]))
        optimizer.step()
        assert optimizer.metrics()["curvadion/synchronized"] == 1, (
            f"step {step} is local with max_local_steps=0"
        )
        zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        mean = {n: sum(zeros[n] if g[n] is None else g[n] for g in G) / replicas for n in SHAPES}
        central.step([mean])
        for name, parameter in placed.bag.named_parameters():
            error = difference(parameter.detach(), central.replicas[0].X[name])
            assert error <= RTOL, (
                f"step {step}: X of {name} is off by {error:.1e} from Dion on the mean gradient"
            )
            if name in central.matrices:
                M = optimizer.state[parameter]["momentum"].clone()
                dist.all_reduce(M)
                error = difference(M / replicas, central.replicas[0].M[name])
                assert error <= RTOL, f"step {step}: the mean momentum of {name} is off by {error:.1e}"


@pytest.mark.parametrize("replicas", [2, 4])
def test_gate_always_open_is_centralized_dion(replicas: int) -> None:
    run_ranks(replicas, run_always_open, replicas)


def run_never_open() -> dict[str, list[int]]:
    placed = LAYOUTS[0].build(initial_values(), 2)
    optimizer = make_optimizer(placed, Case("closed", {"tau": math.inf, "local_update": "dion"}))
    calls: dict[str, list[int]] = {"gate": [], "everything else": []}
    for G in gradients(2)[:AWAKENS_AT]:
        placed.set_gradients(placed.parts_of(G[placed.replica]))
        optimizer.step()
        across = {p: n for (axis, p), n in optimizer.ledger.calls.items() if axis == "replicate"}
        calls["gate"].append(across.pop("gate"))
        calls["everything else"].append(sum(across.values()))
    return calls


def test_tau_inf_sends_no_factors_after_the_first_step() -> None:
    for calls in run_ranks(2, run_never_open):
        assert calls["gate"] == [1, 2, 3, 4, 5], f"not one gate a step: {calls}"
        assert calls["everything else"][0] > 0, "the first step is synchronized and sends factors"
        assert len(set(calls["everything else"])) == 1, (
            f"a local step sent something over the replicas: {calls}"
        )


def run_and_fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("the cause")
        raise SystemExit(3)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(("how", "says"), [("raise", "ValueError: the cause"), ("exit", "SystemExit: 3")])
def test_a_failing_rank_fails_the_call_with_its_traceback(how: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run_ranks(2, run_and_fail, how)


@pytest.mark.parametrize("reduce_op", ["sum", "avg"])
def test_a_gradient_that_is_partial_only_sometimes(reduce_op: str) -> None:
    """Once summed by the optimizer, always summed, so that all ranks do the same; a whole one must come out
    unchanged."""

    def train(norm: nn.Parameter, weight: nn.Parameter, place: Callable[[float, bool], Tensor]) -> Tensor:
        opt = CurvaDion([{"params": [weight]}, {"params": [norm], "algorithm": "adamw", "lr": 0.1}])
        for step, (value, partial) in enumerate([(3.0, True), (5.0, False), (-1.0, True), (2.0, False)]):
            norm.grad, weight.grad = place(value, partial), None if step == 1 else weight.detach().clone()
            opt.step()
        return local(norm)

    def worker() -> list[float]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        norm = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Replicate()]))
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 3, dtype=torch.float64), mesh, [Shard(0)]))

        def place(value: float, partial: bool) -> Tensor:
            share = (
                2 * mesh.get_local_rank() / (1.0 if reduce_op == "avg" else 2.0)
            )  # 0 and 2 (average 1), or 0 and 1 (sum 1)
            whole = torch.full((4,), value * share if partial else value, dtype=torch.float64)
            return DTensor.from_local(
                whole, mesh, [Partial(reduce_op) if partial else Replicate()], run_check=False
            )

        return train(norm, weight, place).tolist()

    plain = (
        nn.Parameter(torch.ones(4, dtype=torch.float64)),
        nn.Parameter(torch.ones(4, 3, dtype=torch.float64)),
    )
    expected = train(*plain, lambda value, _: torch.full((4,), value, dtype=torch.float64)).tolist()
    for got in run_ranks(2, worker):
        assert got == pytest.approx(expected, rel=1e-12)
