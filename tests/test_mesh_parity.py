"""Mesh parity: at a fixed number of replicas K, every layout computes what one process simulating K replicas computes.

All in fp64. Each case runs long enough to take both branches of the gate several times, with replicas that drift apart,
over matrices of many kinds at once (rank-deficient, zero, dead rows, missing gradients) next to AdamW and Lion
parameters. X, M and the moments are compared, never P or Q: their column signs are free.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, Bag, Layout, Placed, local, part_of, whole
from ranks import run_ranks
from reference import Outcome, ReferenceReplicas, Replica
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from curvadion import CurvaDion

# Summation order differs between layouts, and QR amplifies rounding (1e-16) by the condition of m Q, below 1e4 here.
# Relative to the tensor's largest entry: rounding of a sum is relative to its summands, not to what cancels.
RTOL = 1e-9
# named_rmmc() and last_norm come from fp32 norms.
RTOL_NORM = 1e-5
# RMMCs stay this far from tau, so that fp32 norms decide as fp64 ones do.
MARGIN = 1e-3

SHAPES = {
    "tall.weight": (12, 5),
    "wide.weight": (5, 14),
    "square.weight": (8, 8),
    "odd.weight": (7, 6),  # rows and columns that 2 and 4 do not divide
    "odd.bias": (7,),
    "twin.weight": (12, 5),  # as tall: one batch
    "thin.weight": (3, 10),  # fewer rows than four shards
    "zero.weight": (8, 6),  # starts at zero, as output projections do
    "deficient.weight": (9, 8),  # gradients of rank 2, r = 4
    "deficient_wide.weight": (8, 10),
    "dead_rows.weight": (10, 4),  # zero gradients in the rows of the first of two shards
    "silent.weight": (6, 8),  # never a gradient
    "sleepy.weight": (4, 9),  # no gradient in one step, on the last replica alone
    "awakened.weight": (9, 4),  # zero gradients at first
    "lion.weight": (6, 4),
    "embedding.weight": (11, 4),
    "norm.weight": (5,),
    "norm_silent.weight": (4,),
    "norm_sleepy.weight": (6,),
}
ALGORITHMS = {name: "adamw" for name in SHAPES if name.startswith(("embedding", "norm"))}
ALGORITHMS |= {"odd.bias": "lion", "lion.weight": "lion"}
DEFICIENT_RANK = 2
AWAKENS_AT = 5

# How large the gradients are, step by step: a jump opens the gate, the steps around it leave it closed at tau = 0.4.
SCALES = [1.0, 0.2, 0.2, 2.0, 0.2, 0.2, 0.1, 4.0, 0.2, 0.3]


@dataclass(frozen=True)
class Case:
    """Options of one run; `groups` are per parameter name."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    synchronize_after: int | None = None  # call synchronize() after this step
    gate_only: bool = False  # says when to synchronize, not what: unsharded and FSDP2 layouts will do
    everywhere: bool = False  # also with one replica and on the layouts of 8 ranks, where a run takes longest

    def __hash__(self) -> int:
        return hash(self.name)


BASE = {"lr": 0.05, "tau": 0.4, "momentum": 0.9, "weight_decay": 0.1, "rank_fraction": 0.5}
CASES = [
    Case("gradient", everywhere=True),
    Case("dion_right_qr", {"local_update": "dion", "right_factor": "qr"}, everywhere=True),
    Case("householder_right_qr", {"orthogonalization": "qr", "right_factor": "qr", "error_feedback": False, "local_update": "dion"}),
    Case("full_rank", {"local_update": "dion", "rank_fraction": 1.0}),
    Case("no_error_feedback", {"error_feedback": False}),
    Case("no_consensus_dion", {"consensus": "none", "local_update": "dion", "local_lr_scale": 0.5}),
    Case("bounds_alone", {"tau": math.inf, "warmup_steps": 2, "max_local_steps": 3, "local_update": "dion"}, gate_only=True),
    Case("bounds_and_gate", {"min_local_steps": 1, "max_local_steps": 4}, gate_only=True),
    Case("synchronize", {"local_update": "dion"}, synchronize_after=4),
    Case("asked_every_other_step", {"gate_every": 2, "max_local_steps": 2}, gate_only=True),
    Case("answered_later", {"gate_lag": 1, "max_local_steps": 4, "min_local_steps": 2, "local_update": "dion"}, gate_only=True),
    Case("steered_later", {"gate_lag": 1, "target_sync_rate": 0.5, "tau": 0.8}, gate_only=True),
    Case("steered", {"target_sync_rate": 0.5, "tau": 1.5}, gate_only=True),
    Case("muon", {"local_update": "muon", "local_lr_scale": 0.5}),
    Case("outer", {"local_update": "muon", "consensus": "outer", "outer_lr": 0.7, "outer_momentum": 0.6}, everywhere=True),
    Case(
        "outer_under_way",
        {"local_update": "muon", "consensus": "outer", "outer_lr": 1.3, "outer_momentum": 0.3, "outer_delay": 2},
        synchronize_after=4,
        everywhere=True,
    ),
    Case(
        "outer_in_fragments",
        {"local_update": "muon", "consensus": "outer", "outer_lr": 1.1, "outer_momentum": 0.4, "outer_fragments": 3, "max_local_steps": 1},
        everywhere=True,
    ),
    Case(
        "fragments_under_way",
        {"local_update": "dion", "consensus": "outer", "outer_fragments": 4, "outer_delay": 1, "warmup_steps": 2, "max_local_steps": 1},
        synchronize_after=6,
    ),
    Case(
        "outer_of_all_rules",
        {"local_update": "dion", "consensus": "outer", "outer_lr": 0.9, "min_local_steps": 1},
        {"square.weight": {"local_update": "gradient"}, "wide.weight": {"local_update": "muon"}, "tall.weight": {"error_feedback": False}},
        synchronize_after=4,
    ),
    Case(
        "groups",
        {"local_update": "dion"},
        {
            "square.weight": {"lr": 0.01, "momentum": 0.8, "local_update": "gradient", "error_feedback": False},
            "twin.weight": {"rank_fraction": 0.2, "rank_multiple_of": 2, "right_factor": "qr", "weight_decay": 0.0},
            "wide.weight": {"tau": 0.6, "local_lr_scale": 0.1, "orthogonalization": "qr"},
            "norm.weight": {"lr": 0.001, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0},
            "lion.weight": {"betas": (0.5, 0.6), "lr": 0.002},
        },
        everywhere=True,
    ),
]


@functools.cache
def initial_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    values["zero.weight"].zero_()
    return values


@functools.cache
def gradients(replicas: int) -> list[list[dict[str, Tensor | None]]]:
    """gradients(K)[step][replica][name]."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {n: (draw(s[0], DEFICIENT_RANK), draw(DEFICIENT_RANK, s[1])) for n, s in SHAPES.items() if len(s) == 2}
    steps = []
    for step, scale in enumerate(SCALES):
        common = {name: draw(*shape) for name, shape in SHAPES.items()}
        by_replica: list[dict[str, Tensor | None]] = []
        for replica in range(replicas):
            G: dict[str, Tensor | None] = {n: scale * (common[n] + 0.5 * draw(*shape)) for n, shape in SHAPES.items()}
            for name in ("deficient.weight", "deficient_wide.weight"):
                left, right = factors[name]
                G[name] = scale * left @ draw(DEFICIENT_RANK, DEFICIENT_RANK) @ right
            G["dead_rows.weight"][:5] = 0
            G["silent.weight"] = G["norm_silent.weight"] = None
            if step < AWAKENS_AT:
                G["awakened.weight"] = torch.zeros(SHAPES["awakened.weight"], dtype=torch.float64)
            if step == 4 and replica == replicas - 1:
                G["sleepy.weight"] = G["norm_sleepy.weight"] = None
            by_replica.append(G)
        steps.append(by_replica)
    return steps


def groups_of(named: Iterable[tuple[str, Tensor]], case: Case) -> list[dict]:
    """Parameter groups; parameters with the same options share one."""
    groups: dict[str, dict] = {}
    for name, parameter in named:
        options = {"algorithm": ALGORITHMS.get(name, "dion"), **case.groups.get(name, {})}
        group = groups.setdefault(repr(options), {"params": [], **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def make_optimizer(placed: Placed, case: Case, **changes: object) -> CurvaDion:
    """CurvaDion over all the parameters."""
    groups = groups_of(placed.bag.named_parameters(), case)
    options = {**BASE, **case.options, **changes}
    return CurvaDion(groups, replicate_mesh=placed.replicate_mesh, **options)


@functools.cache
def first_right_factors(case: Case) -> dict[str, Tensor]:
    """Q0 by name, from one process: the first Q depends on the name alone, which every layout's run checks."""
    bag = Bag(initial_values())
    optimizer = make_optimizer(Placed(bag, 0, None), case)
    return {n: optimizer.state[p]["Q"].clone() for n, p in bag.named_parameters() if "Q" in optimizer.state[p]}


@dataclass(frozen=True)
class Moment:
    """The reference after one step."""

    outcome: Outcome
    replicas: list[Replica]


@functools.cache
def trajectory(case: Case, replicas: int) -> list[Moment]:
    options = {**BASE, **case.options}
    groups = {n: {"algorithm": ALGORITHMS.get(n, "dion"), **case.groups.get(n, {})} for n in SHAPES}
    for group in (options, *groups.values()):  # what only Q0's shape or only the method knows
        for key in ("rank_fraction", "rank_multiple_of", "orthogonalization"):
            group.pop(key, None)
    in_order = {name: value for group in groups_of(initial_values().items(), case) for name, value in group["params"]}
    reference = ReferenceReplicas(in_order, replicas=replicas, Q0=first_right_factors(case), groups=groups, **options)
    moments = []
    for step, G in enumerate(gradients(replicas)):
        outcome = reference.step(G)
        if step == case.synchronize_after:
            reference.synchronize()
        moments.append(Moment(outcome, copy.deepcopy(reference.replicas)))
    return moments


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest error on this rank, relative to the whole expected tensor's largest entry."""
    mine, theirs = local(actual), part_of(expected, actual)
    assert mine.shape == theirs.shape, f"this rank holds {tuple(mine.shape)} of it instead of {tuple(theirs.shape)}"
    if torch.equal(mine, theirs):
        return 0.0
    error, largest = float((mine - theirs).abs().max()), float(expected.abs().max())
    return error / largest if largest > 0 and not math.isnan(error) else math.inf


def compare(optimizer: CurvaDion, placed: Placed, moment: Moment) -> list[str]:
    """Every difference of what this rank holds from the reference after one step, in words."""
    problems = []
    expected = moment.replicas[placed.replica]
    synchronized = bool(optimizer.metrics()["curvadion/synchronized"])
    if synchronized != moment.outcome.synchronized:
        problems.append(f"synchronized is {synchronized}, the reference says {moment.outcome.synchronized}")
    rmmc = optimizer.named_rmmc()
    for name, parameter in placed.bag.named_parameters():
        state = optimizer.state[parameter]
        pairs = [("X", parameter, expected.X)]
        if name in expected.M:
            pairs.append(("M", state["momentum"], expected.M))
            want = moment.outcome.rmmc[name][placed.replica]
            both_undefined = math.isnan(want) and math.isnan(rmmc[name])
            # Differences of fp32 norms: their rounding is relative to the norms, so absolute in the RMMC.
            if not both_undefined and not math.isclose(rmmc[name], want, rel_tol=RTOL_NORM, abs_tol=1e-6):
                problems.append(f"the RMMC of {name} is {rmmc[name]}, the reference has {want}")
            if not math.isclose(float(state["last_norm"]), expected.last_norm[name], rel_tol=RTOL_NORM):
                problems.append(f"last_norm of {name} is {float(state['last_norm'])}, not {expected.last_norm[name]}")
        else:
            pairs.append(("exp_avg", state["exp_avg"], expected.exp_avg))
            if "exp_avg_sq" in state:
                pairs.append(("exp_avg_sq", state["exp_avg_sq"], expected.exp_avg_sq))
        if "outer_momentum" in state:
            pairs.append(("U", state["outer_momentum"], expected.U))
        for letter, actual, by_name in pairs:
            error = difference(actual, by_name[name])
            if not error <= RTOL:
                problems.append(f"{letter} of {name} on replica {placed.replica} is off by {error:.1e}")
    return problems


def run_case(placed: Placed, parts: list[dict[str, Tensor | None]], case: Case, replicas: int) -> list[str]:
    placed.set_values(initial_values())
    optimizer = make_optimizer(placed, case)
    for name, parameter in placed.bag.named_parameters():
        if "Q" in optimizer.state[parameter]:
            Q = optimizer.state[parameter]["Q"]
            assert not difference(Q, first_right_factors(case)[name]), f"{name} starts from another Q than alone"
    for step, parts_of_step in enumerate(parts):
        placed.set_gradients(parts_of_step)
        optimizer.step()
        if step == case.synchronize_after:
            optimizer.synchronize()
        problems = compare(optimizer, placed, trajectory(case, replicas)[step])
        found = torch.tensor(len(problems))
        dist.all_reduce(found)  # all ranks stop together: the next step has collectives
        if found:
            return [f"{case.name}, step {step}: {problem}" for problem in problems]
    return []


def run_cases(layout: Layout, replicas: int, quick: bool) -> list[str]:
    placed = layout.build(initial_values(), replicas)
    parts = [placed.parts_of(G[placed.replica]) for G in gradients(replicas)]
    all_cases = replicas > 1 and dist.get_world_size() <= 4 and not quick
    cases = [case for case in CASES if case.everywhere or (all_cases and (not case.gate_only or layout.name in ("plain_mesh", "fsdp2")))]
    return [problem for case in cases for problem in run_case(placed, parts, case, replicas)]


# Three, because a mean over two is exact in binary; one, where nothing crosses replicas, for every third layout.
LAYOUTS_AND_REPLICAS = [*((layout, 1) for layout in LAYOUTS[::3]), *((layout, 2) for layout in LAYOUTS), (LAYOUTS[0], 3)]


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS_AND_REPLICAS, ids=str)
def test_layout_computes_what_one_process_computes(layout: Layout, replicas: int, quick: bool) -> None:
    for case in CASES:
        trajectory(case, replicas)  # here, not in every forked rank
    problems = run_ranks(layout.world_size(replicas), run_cases, layout, replicas, quick)
    lines = [f"rank {rank}: {problem}" for rank, of_rank in enumerate(problems) for problem in of_rank]
    assert not lines, f"{len(lines)} differences from the reference:\n" + "\n".join(lines[:40])


def check_layout(layout: Layout) -> list[str]:
    """DTensor's own gathering must give back what was cut by hand; returns the placements that occur."""
    placed = layout.build(initial_values(), 1)
    placed.set_gradients(placed.parts_of(initial_values()))
    placements = set()
    for name, parameter in placed.bag.named_parameters():
        value = initial_values()[name]
        assert torch.equal(whole(parameter), value), f"{name} is not the value it was built from"
        assert torch.equal(local(parameter), part_of(value, parameter)), f"{name} is cut otherwise than by hand"
        assert parameter.grad is not None and torch.equal(whole(parameter.grad), value), f"the gradient of {name}"
        placements.add(str(getattr(parameter, "placements", "plain")) + " empty" * (local(parameter).numel() == 0))
    return sorted(placements)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_layouts_are_what_they_claim(layout: Layout) -> None:
    placements = " ".join(p for of_rank in run_ranks(layout.world_size(1), check_layout, layout) for p in of_rank)
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
            elif case.options.get("consensus") != "none" and not {"outer_delay", "outer_fragments"} & case.options.keys():
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
        problems += [f"step {step}: {p}" for p in compare(optimizer, placed, trajectory(BACKWARD_CASE, 2)[step])]
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
        assert optimizer.metrics()["curvadion/synchronized"] == 1, f"step {step} is local with max_local_steps=0"
        zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        mean = {n: sum(zeros[n] if g[n] is None else g[n] for g in G) / replicas for n in SHAPES}
        central.step([mean])
        for name, parameter in placed.bag.named_parameters():
            error = difference(parameter.detach(), central.replicas[0].X[name])
            assert error <= RTOL, f"step {step}: X of {name} is off by {error:.1e} from Dion on the mean gradient"
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
        assert len(set(calls["everything else"])) == 1, f"a local step sent something over the replicas: {calls}"


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
    """Once summed by the optimizer, always summed, so that all ranks do the same; a whole one must come out unchanged."""

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
            share = 2 * mesh.get_local_rank() / (1.0 if reduce_op == "avg" else 2.0)  # 0 and 2 (average 1), or 0 and 1 (sum 1)
            whole = torch.full((4,), value * share if partial else value, dtype=torch.float64)
            return DTensor.from_local(whole, mesh, [Partial(reduce_op) if partial else Replicate()], run_check=False)

        return train(norm, weight, place).tolist()

    plain = nn.Parameter(torch.ones(4, dtype=torch.float64)), nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    expected = train(*plain, lambda value, _: torch.full((4,), value, dtype=torch.float64)).tolist()
    for got in run_ranks(2, worker):
        assert got == pytest.approx(expected, rel=1e-12)
