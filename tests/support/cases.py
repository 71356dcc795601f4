"""Cases of mesh parity, as data: parameters, gradients, options, the reference's trajectory, and what is
compared.

All in fp64. Each case runs long enough to take both branches of the gate several times, with replicas that
drift apart, over matrices of many kinds at once (rank-deficient, zero, dead rows, missing gradients) next to
AdamW and Lion parameters. X, M and the moments are compared, never P or Q: their column signs are free.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvadion import CurvaDion
from support.layouts import Bag, Placed, local, part_of
from support.reference import Outcome, ReferenceReplicas, Replica

# Summation order differs between layouts, and QR amplifies rounding (1e-16) by the condition of m Q, below
# 1e4 here. Relative to the tensor's largest entry: rounding of a sum is relative to its summands, not to what
# cancels.
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

# How large the gradients are, step by step: a jump opens the gate, the steps around it leave it closed at tau
# = 0.4.
SCALES = [1.0, 0.2, 0.2, 2.0, 0.2, 0.2, 0.1, 4.0]


@dataclass(frozen=True)
class Case:
    """Options of one run; `groups` are per parameter name."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    synchronize_after: int | None = None  # call synchronize() after this step
    gate_only: bool = False  # says when to synchronize, not what: unsharded and FSDP2 layouts will do
    everywhere: bool = False  # on all layouts; the others on some (`runs_on`)

    def __hash__(self) -> int:
        return hash(self.name)


def rounded_case(bits: int, delay: int, fragments: int = 1, kept: float = 0.0, local_steps: int = 2) -> Case:
    """Return local Muon steps, and pseudo-gradients of so many bits; common after a local step, with
    something kept back."""
    options = {
        "consensus": "outer",
        "local_update": "muon",
        "tau": math.inf,
        "max_local_steps": local_steps,
        "outer_bits": bits,
        "outer_lr": 0.8,
        "outer_momentum": 0.5,
        "outer_fragments": fragments,
        "outer_delay": delay,
        "outer_residual_kept": kept,
    }
    name = f"{bits} bits, {fragments} fragments, delay {delay}, {kept} of the residuals kept"
    return Case(name, options, synchronize_after=5)


BASE = {"lr": 0.05, "tau": 0.4, "momentum": 0.9, "weight_decay": 0.1, "rank_fraction": 0.5}
CASES = [
    Case("gradient", everywhere=True),
    Case(
        "dion_right_qr",
        {"local_update": "dion", "right_factor": "qr", "orthogonalization": "cholesky_qr"},
        everywhere=True,
    ),
    Case(
        "householder_right_qr",
        {"orthogonalization": "qr", "right_factor": "qr", "error_feedback": False, "local_update": "dion"},
    ),
    Case("full_rank", {"local_update": "dion", "rank_fraction": 1.0}),
    Case("dion_owners", {"local_update": "dion", "rank_fraction": 1.0, "owners": "always"}, everywhere=True),
    Case(
        "right_qr_owners",
        {
            "local_update": "dion",
            "right_factor": "qr",
            "orthogonalization": "cholesky_qr",
            "owners": "always",
            "error_feedback": False,
        },
    ),
    Case("dion_together", {"local_update": "dion", "owners": "never", "error_feedback": False}),
    Case("householder_owners", {"local_update": "dion", "orthogonalization": "qr", "owners": "always"}),
    Case("no_error_feedback", {"error_feedback": False}),
    Case("no_consensus_dion", {"consensus": "none", "local_update": "dion", "local_lr_scale": 0.5}),
    Case(
        "bounds_alone",
        {"tau": math.inf, "warmup_steps": 2, "max_local_steps": 3, "local_update": "dion"},
        gate_only=True,
    ),
    Case("bounds_and_gate", {"min_local_steps": 1, "max_local_steps": 4}, gate_only=True),
    Case("synchronize", {"local_update": "dion"}, synchronize_after=4),
    Case("asked_every_other_step", {"gate_every": 2, "max_local_steps": 2}, gate_only=True),
    Case(
        "answered_later",
        {"gate_lag": 1, "max_local_steps": 4, "min_local_steps": 2, "local_update": "dion"},
        gate_only=True,
    ),
    Case("steered_later", {"gate_lag": 1, "target_sync_rate": 0.5, "tau": 0.8}, gate_only=True),
    Case("steered", {"target_sync_rate": 0.5, "tau": 1.5}, gate_only=True),
    Case("muon", {"local_update": "muon", "local_lr_scale": 0.5}),
    Case(
        "owners_in_all_replicas",
        {"rank_fraction": 1.0, "owners": "always", "replica_gbit": math.inf},
        {"wide.weight": {"orthogonalization": "qr"}, "twin.weight": {"right_factor": "qr"}},
    ),
    Case("muon_together", {"local_update": "muon", "owners": "never"}, everywhere=True),
    # The reference's SVD leaves 1e-16 in rows of zeros, which a division by less than eps would show.
    Case(
        "normuon",
        {"local_update": "normuon", "eps": 1e-6},
        {"wide.weight": {"betas": (0.9, 0.6), "eps": 1e-4}},
        everywhere=True,
    ),
    Case(
        "normuon_outer",
        {"local_update": "normuon", "eps": 1e-6, "consensus": "outer", "outer_lr": 0.8},
        synchronize_after=4,
    ),
    Case(
        "dion2",
        {"local_update": "dion2"},
        {"twin.weight": {"rank_fraction": 0.2, "rank_multiple_of": 2}},
        everywhere=True,
    ),
    Case(
        "dion2_outer",
        {"local_update": "dion2", "consensus": "outer", "outer_lr": 0.8},
        synchronize_after=4,
    ),
    Case(
        "conventions",
        {
            "local_update": "muon",
            "nesterov": True,
            "newton_schulz": "polar_express",
            "newton_schulz_steps": 6,
            "update_scale": "original",
        },
        {
            "tall.weight": {"newton_schulz_steps": 9},  # more than there are polynomials
            "wide.weight": {"newton_schulz": "jordan", "update_scale": "match_rms_adamw"},
            "twin.weight": {"local_update": "normuon", "eps": 1e-6, "newton_schulz_steps": 3},
            "square.weight": {"local_update": "dion2", "nesterov": False, "update_scale": "match_rms_adamw"},
            "odd.weight": {
                "local_update": "dion",
                "nesterov": False,
                "newton_schulz": "jordan",
                "newton_schulz_steps": 5,
            },
        },
        everywhere=True,
    ),
    Case("outer", {"local_update": "muon", "consensus": "outer", "outer_lr": 0.7, "outer_momentum": 0.6}),
    Case(
        "outer_under_way",
        {
            "local_update": "muon",
            "consensus": "outer",
            "outer_lr": 1.3,
            "outer_momentum": 0.3,
            "outer_delay": 2,
        },
        synchronize_after=4,
    ),
    Case(
        "outer_in_fragments",
        {
            "local_update": "muon",
            "consensus": "outer",
            "outer_lr": 1.1,
            "outer_momentum": 0.4,
            "outer_fragments": 3,
            "max_local_steps": 1,
        },
        everywhere=True,
    ),
    Case(
        "fragments_under_way",
        {
            "local_update": "dion",
            "consensus": "outer",
            "outer_fragments": 4,
            "outer_delay": 1,
            "warmup_steps": 1,
            "max_local_steps": 1,
        },
        synchronize_after=6,
    ),
    Case(
        "outer_of_all_rules",
        {"local_update": "dion", "consensus": "outer", "outer_lr": 0.9, "min_local_steps": 1},
        {
            "square.weight": {"local_update": "gradient"},
            "wide.weight": {"local_update": "muon"},
            "tall.weight": {"error_feedback": False},
        },
        synchronize_after=4,
    ),
    Case(
        "groups",
        {"local_update": "dion"},
        {
            "square.weight": {
                "lr": 0.01,
                "momentum": 0.8,
                "local_update": "gradient",
                "error_feedback": False,
            },
            "twin.weight": {
                "rank_fraction": 0.2,
                "rank_multiple_of": 2,
                "right_factor": "qr",
                "weight_decay": 0.0,
            },
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

    factors = {
        n: (draw(s[0], DEFICIENT_RANK), draw(DEFICIENT_RANK, s[1])) for n, s in SHAPES.items() if len(s) == 2
    }
    steps = []
    for step, scale in enumerate(SCALES):
        common = {name: draw(*shape) for name, shape in SHAPES.items()}
        by_replica: list[dict[str, Tensor | None]] = []
        for replica in range(replicas):
            G: dict[str, Tensor | None] = {
                n: scale * (common[n] + 0.5 * draw(*shape)) for n, shape in SHAPES.items()
            }
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
    """Q0 by name, from one process: the first Q depends on the name alone, which every layout's run
    checks."""
    bag = Bag(initial_values())
    optimizer = make_optimizer(Placed(bag, 0, None), case)
    return {
        n: optimizer.state[p]["Q"].clone() for n, p in bag.named_parameters() if "Q" in optimizer.state[p]
    }


@dataclass(frozen=True)
class Moment:
    """The reference after one step."""

    outcome: Outcome
    replicas: list[Replica]


@functools.cache
def trajectory(case: Case, replicas: int) -> list[Moment]:
    options = {**BASE, **case.options}
    groups = {n: {"algorithm": ALGORITHMS.get(n, "dion"), **case.groups.get(n, {})} for n in SHAPES}
    for group in (options, *groups.values()):  # what only the method knows
        for option in ("orthogonalization", "owners", "replica_gbit"):
            group.pop(option, None)
    in_order = {
        name: value for group in groups_of(initial_values().items(), case) for name, value in group["params"]
    }
    reference = ReferenceReplicas(
        in_order, replicas=replicas, Q0=first_right_factors(case), groups=groups, **options
    )
    moments = []
    for step, G in enumerate(gradients(replicas)):
        outcome = reference.step(G)
        if step == case.synchronize_after:
            reference.synchronize()
        moments.append(Moment(outcome, copy.deepcopy(reference.replicas)))
    return moments


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest error on this rank, relative to the whole expected tensor's largest entry."""
    [error] = differences([(actual, expected)])
    return error


def differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """`difference` of many (actual, expected), in few operations."""
    mine = [local(actual) for actual, _ in pairs]
    theirs = [part_of(expected, actual) for actual, expected in pairs]
    for held, part in zip(mine, theirs, strict=True):
        assert held.shape == part.shape, f"this rank holds {tuple(held.shape)} of it, not {tuple(part.shape)}"
    filled = [k for k, part in enumerate(theirs) if part.numel()]
    errors = [0.0] * len(pairs)
    if filled:
        off = torch._foreach_sub([mine[k] for k in filled], [theirs[k] for k in filled])
        error = torch.stack(torch._foreach_norm(off, math.inf))
        largest = torch.stack(torch._foreach_norm([pairs[k][1] for k in filled], math.inf))
        relative = torch.where(error == 0, 0.0, error / largest).nan_to_num(nan=math.inf, posinf=math.inf)
        for k, value in zip(filled, relative.tolist(), strict=True):
            errors[k] = value
    return errors


def compare(optimizer: CurvaDion, placed: Placed, moment: Moment) -> list[str]:
    """Every difference of what this rank holds from the reference after one step, in words."""
    problems: list[str] = []
    compared: list[tuple[str, Tensor, Tensor]] = []
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
                problems.append(
                    f"last_norm of {name} is {float(state['last_norm'])}, not {expected.last_norm[name]}"
                )
        else:
            pairs.append(("exp_avg", state["exp_avg"], expected.exp_avg))
            if "exp_avg_sq" in state:
                pairs.append(("exp_avg_sq", state["exp_avg_sq"], expected.exp_avg_sq))
        if name in expected.second_moment:
            pairs.append(("v", state["second_moment"], expected.second_moment))
        if "outer_momentum" in state:
            pairs.append(("U", state["outer_momentum"], expected.U))
        compared += [(f"{letter} of {name}", actual, by_name[name]) for letter, actual, by_name in pairs]
    errors = differences([(actual, whole) for _, actual, whole in compared])
    for (what, *_), error in zip(compared, errors, strict=True):
        if not error <= RTOL:
            problems.append(f"{what} on replica {placed.replica} is off by {error:.1e}")
    return problems


def run_case(placed: Placed, parts: list[dict[str, Tensor | None]], case: Case, replicas: int) -> list[str]:
    """Run a case on this rank, which gets these gradients step by step; all differences from the
    reference."""
    placed.set_values(initial_values())
    optimizer = make_optimizer(placed, case)
    for name, parameter in placed.bag.named_parameters():
        if "Q" in optimizer.state[parameter]:
            Q = optimizer.state[parameter]["Q"]
            assert not difference(Q, first_right_factors(case)[name]), (
                f"{name} starts from another Q than alone"
            )
    problems: list[str] = []
    for step, parts_of_step in enumerate(parts):
        placed.set_gradients(parts_of_step)
        optimizer.step()
        if step == case.synchronize_after:
            optimizer.synchronize()
        if not problems:  # a rank that found some goes on: the next step has collectives
            found = compare(optimizer, placed, trajectory(case, replicas)[step])
            problems = [f"{case.name}, step {step}: {problem}" for problem in found]
    return problems
