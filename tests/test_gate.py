"""When the gate opens, what it reports, and that every rank always takes the same branch.

With momentum = 0 and error_feedback = False nothing is carried over, so m_t is the gradient itself: the tests
below choose the gradient norms, and therefore the RMMC of every step, exactly.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, gathered, grid, local
from support.ranks import run_ranks
from torch import nn

from curvadion import CurvaDion
from curvadion.sharding.group import ThreadGroup

MEMORYLESS: dict[str, Any] = {"momentum": 0.0, "error_feedback": False, "weight_decay": 0.0}
ONE: dict[str, tuple[int, ...]] = {"layers.0.weight": (4, 3)}
TWO: dict[str, tuple[int, ...]] = {"layers.0.weight": (4, 3), "layers.1.weight": (3, 5)}


def set_norms(toy: Toy, norms: Sequence[float]) -> None:
    """Give matrix i a gradient of Frobenius norm norms[i], exactly: one nonzero entry."""
    for (name, param), norm in zip(toy.params.items(), norms, strict=True):
        value = torch.zeros(param.shape, dtype=param.dtype)
        value[1, 1] = norm
        param.grad = toy.place(name, value)


def run(
    norms: Sequence[float | Sequence[float]], **options: Any
) -> tuple[list[bool], list[float], CurvaDion]:
    """Take one step per entry on one process; return the branches, the RMMCs and the optimizer."""
    first = norms[0]
    toy = Toy(matrices=TWO if isinstance(first, Sequence) else ONE, dense={})
    opt = CurvaDion(toy.groups(), lr=0.01, **{**MEMORYLESS, **options})
    branches, rmmcs = [], []
    for norm in norms:
        set_norms(toy, norm if isinstance(norm, Sequence) else [norm])
        opt.step()
        metrics = opt.metrics()
        branches.append(bool(metrics["curvadion/synchronized"]))
        rmmcs.append(metrics["curvadion/rmmc_max"])
    return branches, rmmcs, opt


S, L = True, False  # a synchronized step, a local step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [S, L, L, L, L, L, L, L], id="inf-alone"),
        pytest.param({"max_local_steps": 0}, [S] * 8, id="max-0"),
        pytest.param({"max_local_steps": 1}, [S, L, S, L, S, L, S, L], id="max-1"),
        pytest.param({"max_local_steps": 3}, [S, L, L, L, S, L, L, L], id="max-3"),
        pytest.param({"warmup_steps": 1}, [S, L, L, L, L, L, L, L], id="warmup-1"),
        pytest.param({"warmup_steps": 4}, [S, S, S, S, L, L, L, L], id="warmup-4"),
        pytest.param(
            {"warmup_steps": 3, "max_local_steps": 2}, [S, S, S, L, L, S, L, L], id="warmup-3-max-2"
        ),
        pytest.param(
            {"warmup_steps": 3, "min_local_steps": 5}, [S, S, S, L, L, L, L, L], id="warmup-beats-min"
        ),
    ],
)
def test_bounds_alone_decide_when_tau_is_inf(options: dict[str, Any], expected: list[bool]) -> None:
    wild = [1.0, 100.0, 1.0, 1000.0, 1.0, 100.0, 1.0, 1000.0]
    branches, _, _ = run(wild, tau=math.inf, **options)
    assert branches == expected, "with tau = inf only the first step, warm-up and max_local_steps synchronize"


@pytest.mark.parametrize(
    ("minimum", "expected"), [(0, [S] * 8), (1, [S, L, S, L, S, L, S, L]), (3, [S, L, L, L, S, L, L, L])]
)
def test_min_local_steps_holds_the_gate_closed(minimum: int, expected: list[bool]) -> None:
    wild = [1.0, 100.0, 1.0, 100.0, 1.0, 100.0, 1.0, 100.0]
    branches, rmmcs, _ = run(wild, tau=0.5, min_local_steps=minimum)
    assert branches == expected, "after a synchronized step the gate stays closed for min_local_steps"
    assert all(value > 0.5 for value in rmmcs[1:]), (
        "the RMMC was above tau all the time: only the bound held it back"
    )


def test_the_comparison_is_strict_and_the_value_exact() -> None:
    # |5 - 4| / 4 = |5 - 4| / 4 = 0.25 and |3 - 4| / 4 = 0.25: representable, so equality is equality.
    norms = [4.0, 5.0, 4.0, 4.0, 3.0, 3.0, 4.5]
    expected_rmmc = [math.nan, 0.25, 0.2, 0.0, 0.25, 0.0, 0.5]
    branches, rmmcs, _ = run(norms, tau=0.25)
    assert branches == [S, L, L, L, L, L, S], (
        "rho = tau stays local, rho > tau synchronizes, in both directions"
    )
    torch.testing.assert_close(torch.tensor(rmmcs), torch.tensor(expected_rmmc), equal_nan=True)
    just_below = float(torch.nextafter(torch.tensor(0.25), torch.tensor(0.0)))
    assert run(norms[:2], tau=just_below)[0] == [S, S], "one float below, 0.25 is above tau"


def test_tau_zero_synchronizes_unless_nothing_changed() -> None:
    branches, _, _ = run([2.0, 2.0, 2.5, 2.5, 0.0, 0.0], tau=0.0)
    assert branches == [S, L, S, L, S, L], (
        "rho = 0 is not above tau = 0; two zero norms in a row have rho = 0"
    )


def test_zero_norms() -> None:
    branches, rmmcs, _ = run([0.0, 0.0, 0.0, 3.0, 3.0], tau=100.0)
    assert branches == [S, L, L, S, L], "0 to 0 is RMMC 0, 0 to nonzero must synchronize"
    assert rmmcs[1] == rmmcs[2] == 0.0
    assert not math.isinf(rmmcs[3]), "an undefined RMMC is nan (null in JSON), never inf"


def test_the_previous_norm_is_the_one_the_gate_saw_last() -> None:
    # 1 -> 1.2 -> 1.4 -> 1.6: every step is small against its predecessor, though the sum of them is not.
    branches, rmmcs, opt = run([1.0, 1.2, 1.4, 1.6], tau=0.3)
    assert branches == [S, L, L, L], (
        "the norm is compared with the previous step, not with the last synchronized one"
    )
    assert rmmcs[3] == pytest.approx(0.2 / 1.4, rel=1e-6)
    [param] = opt.param_groups[0]["params"]
    assert float(opt.state[param]["last_norm"]) == pytest.approx(1.6, rel=1e-6)


def test_the_norm_is_of_the_momentum_before_error_feedback() -> None:
    toy = Toy(matrices=ONE, dense={})
    opt = CurvaDion(toy.groups(), lr=0.01, momentum=0.5, tau=0.0, rank_fraction=1.0, max_local_steps=0)
    set_norms(toy, [4.0])
    opt.step()
    [param] = toy.params.values()
    momentum = opt.state[param]["momentum"].clone()  # M after error feedback: about half of m
    set_norms(toy, [4.0])
    opt.step()
    seen = float(torch.linalg.matrix_norm(momentum + param.grad))
    assert seen < 7.0, "error feedback has acted on M, otherwise this test shows nothing"
    assert opt.metrics()["curvadion/rmmc_max"] == pytest.approx(abs(seen - 4.0) / 4.0, rel=1e-5)


def test_momentum_accumulates_as_a_sum_not_as_an_average() -> None:
    # m_1 = g, m_2 = mu m_1 + g on local gradient steps: 4, then 0.5 * 4 + 4 = 6.
    branches, rmmcs, _ = run([4.0, 4.0, 4.0], momentum=0.5, tau=0.5)
    assert branches == [S, L, L]
    assert rmmcs[1:] == pytest.approx([0.5, 1.0 / 6.0], rel=1e-6)


def test_rmmc_argmax_and_names() -> None:
    _, _, opt = run([[4.0, 4.0], [5.0, 7.0], [5.0, 7.0], [10.0, 7.7]], tau=math.inf)
    assert opt.matrix_names == ["layers.0.weight", "layers.1.weight"]
    assert opt.metrics()["curvadion/rmmc_argmax"] == 0.0
    assert opt.metrics()["curvadion/rmmc_max"] == pytest.approx(1.0)
    assert opt.named_rmmc() == pytest.approx({"layers.0.weight": 1.0, "layers.1.weight": 0.1}, rel=1e-5)
    _, _, opt = run([[4.0, 4.0], [5.0, 7.0]], tau=math.inf)
    assert opt.metrics()["curvadion/rmmc_argmax"] == 1.0
    _, _, opt = run([[4.0, 4.0]], tau=math.inf)
    assert opt.metrics()["curvadion/rmmc_argmax"] == -1.0, "no previous norm: no matrix to name"
    assert math.isnan(opt.metrics()["curvadion/rmmc_max"])
    assert all(math.isnan(value) for value in opt.named_rmmc().values())


def test_repeated_names_are_told_apart() -> None:
    """Groups made from two submodules may repeat a name; no matrix may vanish from the report."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    opt = CurvaDion(
        [{"params": [("weight", param)]} for param in params], lr=0.01, tau=math.inf, **MEMORYLESS
    )
    for norms in ((1.0, 1.0), (1.5, 3.0)):
        for param, norm in zip(params, norms, strict=True):
            param.grad = torch.zeros(4, 3)
            param.grad[0, 0] = norm
        opt.step()
    assert len(set(opt.matrix_names)) == 2
    assert sorted(opt.named_rmmc().values()) == [0.5, 2.0]


def test_one_undefined_matrix_synchronizes_and_hides_no_other() -> None:
    _, _, opt = run([[4.0, 0.0], [5.0, 0.0], [5.0, 1.0]], tau=math.inf)
    assert opt.metrics()["curvadion/synchronized"] == 1.0, (
        "from 0 to nonzero synchronizes even with tau = inf"
    )
    rmmc = opt.named_rmmc()
    assert rmmc["layers.0.weight"] == 0.0
    assert math.isnan(rmmc["layers.1.weight"])


def test_tau_of_the_group_decides_for_its_matrices() -> None:
    def branch(first: float, second: float) -> bool:
        toy = Toy(matrices=TWO, dense={})
        names = list(toy.params)
        groups = [
            {"params": [(names[i], toy.params[names[i]])], "tau": tau} for i, tau in enumerate((0.1, 10.0))
        ]
        opt = CurvaDion(groups, lr=0.01, **MEMORYLESS)
        for norms in ([1.0, 1.0], [first, second]):
            set_norms(toy, norms)
            opt.step()
        return bool(opt.metrics()["curvadion/synchronized"])

    assert not branch(1.05, 9.0), (
        "rho = 8 is below the second group's tau = 10, and 0.05 below the first's 0.1"
    )
    assert branch(1.2, 1.0), "rho = 0.2 is above the first group's tau = 0.1"
    assert branch(1.0, 12.0), "rho = 11 is above the second group's tau = 10"


@pytest.mark.parametrize("algorithm", ["dion", "adamw"])
def test_a_new_parameter_must_synchronize(algorithm: str) -> None:
    toy = Toy(matrices=ONE, dense={})
    opt = CurvaDion(toy.groups(), lr=0.01, tau=math.inf, **MEMORYLESS)
    branches = []
    for step in range(6):
        if step == 3:
            new = nn.Parameter(torch.ones(5, 4))
            opt.add_param_group({"params": [("extra.weight", new)], "algorithm": algorithm})
        set_norms(toy, [1.0])
        if step >= 3:
            new.grad = torch.ones_like(new)
        opt.step()
        branches.append(bool(opt.metrics()["curvadion/synchronized"]))
    assert branches == [S, L, L, S, L, L], "the first step of a new parameter is synchronized, whatever tau"


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 4), ({"gate_every": 3}, 6), ({"gate_lag": 1}, 5), ({"gate_every": 3, "gate_lag": 1}, 7)],
    ids=str,
)
def test_one_rank_may_ask_for_a_synchronized_step(options: dict[str, Any], expected: int) -> None:
    """Between the two replicas' fourth and fifth steps one of them asks; the key takes it along."""

    def replica(group: ThreadGroup) -> list[int]:
        toy, bounds = Toy(), {"tau": math.inf, "min_local_steps": 8}
        # Triton's interpreter is not made for threads.
        opt = CurvaDion(toy.groups(), replicate_mesh=group, kernels="reference", **bounds, **options)
        synchronized = []
        for step in range(10):
            if step == 4 and group.rank == 1:
                opt.synchronize_next()
            toy.set_gradients(step, group.rank)
            opt.step()
            if opt.metrics()["curvadion/synchronized"]:
                synchronized.append(step)
        return synchronized

    assert ThreadGroup.run(2, replica) == [[0, expected]] * 2, "once, on both, whatever min_local_steps"


def test_counters_and_rates_of_metrics() -> None:
    _, _, opt = run([1.0] * 10, tau=math.inf, max_local_steps=3)  # S LLL S LLL S L
    metrics = opt.metrics()
    assert all(isinstance(value, float) for value in metrics.values()), "metrics() is a flat dict of floats"
    assert metrics["curvadion/step"] == 10.0
    assert metrics["curvadion/sync_rate"] == pytest.approx(3 / 10)
    assert metrics["curvadion/steps_since_sync"] == 1.0
    assert metrics["curvadion/skipped_steps"] == 0.0
    state = opt.state[opt.param_groups[0]["params"][0]]
    assert (float(state["step"]), float(state["local_steps"]), float(state["synchronized_steps"])) == (
        10.0,
        1.0,
        3.0,
    )


def test_the_maximum_and_its_index_come_from_any_replica(quick: bool) -> None:
    """Four replicas; replica `who` alone has the large change, in matrix `which`: everybody knows both."""

    def worker() -> list[tuple[float, float, float, str]]:
        rank, seen = dist.get_rank(), []
        for who in replicas:
            for which in range(2):
                toy = Toy(matrices=TWO, dense={})
                opt = CurvaDion(toy.groups(), lr=0.0, replicate_mesh=dist.group.WORLD, tau=0.5, **MEMORYLESS)
                set_norms(toy, [4.0, 4.0])
                opt.step()
                change = [4.0 + 0.125 * (rank + 1), 4.0]  # every replica has some change of its own
                if rank == who:
                    change[which] = 8.0
                set_norms(toy, change)
                opt.step()
                metrics = opt.metrics()
                index = metrics["curvadion/rmmc_argmax"]
                seen.append(
                    (
                        metrics["curvadion/rmmc_max"],
                        index,
                        metrics["curvadion/synchronized"],
                        opt.matrix_names[int(index)],
                    )
                )
        return seen

    replicas, names = (0, 3) if quick else range(4), list(TWO)
    expected = [(1.0, float(which), 1.0, names[which]) for _ in replicas for which in range(2)]
    for rank, seen in enumerate(run_ranks(4, worker)):
        assert seen == expected, f"rank {rank} must know the largest RMMC of all replicas and its matrix"


def test_the_norm_is_of_the_whole_matrix_over_its_shards() -> None:
    def worker() -> list[float]:
        replicate, shard = grid(2, 2)
        toy = Toy(shard, matrices={"layers.0.weight": (4, 3)}, dense={})
        opt = CurvaDion(toy.groups(), lr=0.01, replicate_mesh=replicate, tau=math.inf, **MEMORYLESS)
        [param] = toy.params.values()
        values = []
        for upper, lower in (
            (3.0, 4.0),
            (6.0, 8.0),
            (12.0, 5.0),
        ):  # 5, 10, 13: no shard alone has these norms
            full = torch.zeros(4, 3)
            full[0, 0], full[3, 2] = upper, lower
            param.grad = toy.place("layers.0.weight", full)
            opt.step()
            values.append(opt.metrics()["curvadion/rmmc_max"])
        return values

    for values in run_ranks(4, worker):
        assert values[1:] == pytest.approx([1.0, 0.3], rel=1e-6), (
            "||m|| must be summed over the shards of a matrix"
        )


@pytest.mark.parametrize("local_update", ["gradient", "dion"])
def test_the_branch_is_common_under_random_gradients(local_update: str, quick: bool) -> None:
    """Every rank with gradients of its own, some huge, some zero, some missing."""
    steps = 16 if quick else 60

    def worker() -> list[Any]:
        replicate, shard = grid(2, 2)
        toy = Toy(shard, matrices={"a": (6, 4), "b": (3, 5)}, dense={"norm": (3,)})
        opt = CurvaDion(toy.groups(), lr=1e-3, replicate_mesh=replicate, tau=0.25, local_update=local_update)
        generator = torch.Generator().manual_seed(dist.get_rank())
        trace = []
        for _ in range(steps):
            for name, param in toy.params.items():
                dice = float(torch.rand((), generator=generator))
                scale = 0.0 if dice < 0.1 else 30.0 if dice > 0.985 else 1.0
                param.grad = toy.place(name, scale * torch.randn(param.shape, generator=generator))
                if dice < 0.05:
                    param.grad = None
            opt.step()
            metrics = opt.metrics()
            trace.append(
                (
                    metrics["curvadion/synchronized"],
                    metrics["curvadion/rmmc_max"],
                    metrics["curvadion/rmmc_argmax"],
                    metrics["curvadion/steps_since_sync"],
                    sorted(opt.ledger.calls.items()),
                )
            )
        finite = all(bool(local(param).isfinite().all()) for param in toy.params.values())
        same = all(repr(value) == repr(trace) for value in gathered(trace))  # repr: nan equals nan
        return [same, finite, sum(entry[0] for entry in trace)]

    for rank, (same, finite, synchronized) in enumerate(run_ranks(4, worker)):
        assert same, f"rank {rank}: branch, RMMC, index or the number of collectives differ between ranks"
        assert finite, f"rank {rank}: parameters must stay finite"
        assert steps // 10 <= synchronized <= steps - steps // 10, (
            f"both branches must be frequent, {synchronized} of {steps} were not"
        )


@pytest.mark.parametrize(
    ("gate_every", "expected"),
    [(1, [S, S, S, S, S, S, S]), (2, [S, L, S, L, S, L, S]), (3, [S, L, L, S, L, L, S])],
)
def test_rmmc_opens_only_where_the_gate_asks(gate_every: int, expected: list[bool]) -> None:
    branches, rmmcs, _ = run([1.0, 100.0, 1.0, 100.0, 1.0, 100.0, 1.0], tau=0.5, gate_every=gate_every)
    assert branches == expected
    assert all(value > 0.5 for value in rmmcs[1:]), "RMMC is told on every step"


def test_the_counters_open_the_gate_on_any_step() -> None:
    branches, _, _ = run([1.0] * 8, tau=math.inf, gate_every=100, warmup_steps=2, max_local_steps=2)
    assert branches == [S, S, L, L, S, L, L, S]


# RMMC exceeds 0.5 in steps 1 to 4 and in step 6.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [S, L, S, L, S, L, L, S]),
        ({"gate_every": 2}, [S, L, L, S, L, S, L, S]),
        ({"gate_every": 3}, [S, L, L, L, S, L, L, S]),
        ({"min_local_steps": 2}, [S, L, L, S, L, L, L, S]),
        ({"max_local_steps": 0}, [S] * 8),
        ({"max_local_steps": 2, "tau": math.inf}, [S, L, L, S, L, L, S, L]),
        ({"warmup_steps": 3}, [S, S, S, L, S, L, L, S]),
    ],
    ids=str,
)
def test_with_a_lag_the_next_step_synchronizes(options: dict[str, Any], expected: list[bool]) -> None:
    branches, _, _ = run(
        [1.0, 100.0, 1.0, 100.0, 1.0, 1.0, 100.0, 100.0], **{"tau": 0.5, "gate_lag": 1, **options}
    )
    assert branches == expected


def test_a_lag_is_copied_along() -> None:
    opt = CurvaDion([nn.Parameter(torch.ones(3, 2))], tau=0.5, gate_lag=1)
    for norm in (1.0, 100.0):
        opt.param_groups[0]["params"][0].grad = torch.full((3, 2), norm)
        opt.step()
    other = pickle.loads(pickle.dumps(opt))
    other.param_groups[0]["params"][0].grad = torch.full((3, 2), 100.0)
    other.step()
    assert other.metrics()["curvadion/synchronized"], "the answer to the step before the copy got lost"


@pytest.mark.sample
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize(
    ("tau", "gate_every", "gate_lag"), [(1e-3, 1, 0), (50.0, 1, 0), (1.0, 2, 0), (1.0, 1, 1), (1.0, 2, 1)]
)
def test_the_target_rate_is_met_from_any_tau(
    tau: float, gate_every: int, gate_lag: int, rate: float, quick: bool
) -> None:
    half = 50 if quick else 200
    norms = (1 + torch.rand(2 * half, generator=torch.Generator().manual_seed(3))).tolist()
    branches, _, opt = run(norms, tau=tau, target_sync_rate=rate, gate_every=gate_every, gate_lag=gate_lag)
    share = sum(branches[half:]) / half
    assert share == pytest.approx(rate, abs=0.06), f"{share} of the steps, tau {opt.param_groups[0]['tau']}"
    assert opt.metrics()["curvadion/tau"] == opt.param_groups[0]["tau"] != tau


@pytest.mark.parametrize("tau", [0.0, math.inf])
def test_a_target_rate_needs_a_tau_to_start_from(tau: float) -> None:
    with pytest.raises(ValueError, match="target_sync_rate steers tau"):
        CurvaDion([nn.Parameter(torch.ones(3, 2))], tau=tau, target_sync_rate=0.1)


@pytest.mark.parametrize(
    "bound", [{"gate_every": 8}, {"min_local_steps": 4}, {"max_local_steps": 0}, {"gate_lag": 1}], ids=str
)
def test_a_target_rate_that_cannot_be_met_is_refused(bound: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="target_sync_rate must lie between"):
        CurvaDion([nn.Parameter(torch.ones(3, 2))], tau=0.1, target_sync_rate=0.6, **bound)
