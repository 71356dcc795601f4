"""K optimizers in K threads are K processes: equal parameters after every step, for all that is published."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import Oracle
from simulation import Replica, Replicas, Setting
from support.layouts import local
from support.ranks import DEADLINE, run_ranks
from torch import Tensor, nn
from variants import TopK, rule_of

from curvadion import CurvaDion, param_groups_for
from curvadion.gate.trouble import NonFiniteError

STEPS = 9
# Setting: constructor arguments that mean the same, at interval 3.
EVERY_THIRD = {"tau": math.inf, "max_local_steps": 2, "consensus": "outer"}
SAME: list[tuple[Setting, dict[str, Any]]] = [
    (Setting("muon", interval=3), {"local_update": "muon", **EVERY_THIRD}),
    (Setting("one bit", interval=3, bits=1), {"local_update": "muon", "outer_bits": 1, **EVERY_THIRD}),
    (
        Setting("nesterov", interval=3, bits=4, outer_lr=0.7, outer_momentum=0.6),
        {"local_update": "muon", "outer_bits": 4, "outer_lr": 0.7, "outer_momentum": 0.6, **EVERY_THIRD},
    ),
    (
        Setting("under way", interval=3, bits=1, outer_lr=1.4, delay=2),
        {"local_update": "muon", "outer_bits": 1, "outer_lr": 1.4, "outer_delay": 2, **EVERY_THIRD},
    ),
    (
        Setting("kept", interval=3, bits=1, outer_lr=1.4, kept=0.5),
        {
            "local_update": "muon",
            "outer_bits": 1,
            "outer_lr": 1.4,
            "outer_residual_kept": 0.5,
            **EVERY_THIRD,
        },
    ),
    (
        Setting("dion", rule="dion", rank_fraction=0.5, interval=3),
        {"local_update": "dion", "rank_fraction": 0.5, **EVERY_THIRD},
    ),
    (Setting("gradient", rule="gradient", interval=3), {"local_update": "gradient", **EVERY_THIRD}),
    (Setting("adamw", rule="adamw", interval=3, bits=2), {"outer_bits": 2, **EVERY_THIRD}),
    (
        Setting(
            "the paper's text", rule="gradient", rank_fraction=0.5, consensus="average", gate="rmmc", tau=0.2
        ),
        {"local_update": "gradient", "rank_fraction": 0.5, "tau": 0.2},
    ),
    (
        Setting(
            "the released code's rule",
            rule="dion",
            rank_fraction=0.5,
            consensus="average",
            interval=3,
            warmup=2,
        ),
        {
            "local_update": "dion",
            "rank_fraction": 0.5,
            "warmup_steps": 2,
            "tau": math.inf,
            "max_local_steps": 2,
        },
    ),
    (
        Setting("fragments", interval=9, bits=1, fragments=3, warmup=2),
        {"local_update": "muon", "outer_bits": 1, "outer_fragments": 3, "warmup_steps": 2, **EVERY_THIRD},
    ),
    (Setting("baseline", baseline=True, rule="dion"), {"rank_fraction": 1.0, "max_local_steps": 0}),
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 12), nn.RMSNorm(12)
        self.up, self.down, self.head = (
            nn.Linear(12, 20, bias=False),
            nn.Linear(20, 12, bias=False),
            nn.Linear(12, 16, bias=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def loss_of(model: nn.Module, replica: int, step: int) -> Tensor:
    tokens = torch.randint(16, (8, 2), generator=torch.Generator().manual_seed(100 * step + replica))
    return nn.functional.cross_entropy(model(tokens[:, 0]), tokens[:, 1])


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double()


def factor(step: int) -> float:
    return 1 - 0.1 * step


def distributed(options: dict[str, Any], adamw: bool) -> list[dict[str, Tensor]]:
    model = tiny()
    groups = param_groups_for(model, adamw_lr=3e-3, overrides={"": "adamw"} if adamw else None)
    opt = CurvaDion(groups, lr=0.02, momentum=0.9, replicate_mesh=dist.group.WORLD, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    trace = []
    for step in range(STEPS):
        opt.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        opt.step()
        schedule.step()
        trace.append({name: local(p).clone() for name, p in model.named_parameters()})
    return trace


@pytest.mark.sample
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("setting", "options"), SAME, ids=lambda value: value.name if isinstance(value, Setting) else ""
)
def test_a_setting_means_these_options_in_real_processes(
    setting: Setting, options: dict[str, Any], count: int
) -> None:
    traces = run_ranks(count, distributed, options, setting.rule == "adamw")
    with closing(Replicas(tiny(), setting, count)) as replicas:
        for step in range(STEPS):
            take(replicas, step)
            replicas.step(factor(step))
            compare(replicas, [trace[step] for trace in traces], f"step {step}")
    if setting.consensus == "outer" and not setting.baseline:
        assert replicas.synchronized == 2 + setting.warmup
    else:
        assert 3 <= replicas.synchronized < STEPS or setting.baseline, (
            f"{replicas.synchronized} synchronized steps take one branch only"
        )
    if not setting.baseline:
        ends = {name: model.get_parameter(name) for model in [replicas.consensus()] for name in replicas.X}
        torch.testing.assert_close(ends["up.weight"].detach(), replicas.X["up.weight"].mean(0))


def take(replicas: Replicas, step: int) -> None:
    """Give each replica its gradients."""
    for k, model in enumerate(replicas.models):
        for g in replicas.G.values():
            g[k].zero_()
        loss_of(model, k, step).backward()


def compare(replicas: Replicas, expected: list[dict[str, Tensor]], where: str) -> None:
    for k, tensors in enumerate(expected):
        for name, x in tensors.items():
            got = replicas.X[name][k]
            assert torch.allclose(got, x, rtol=1e-9, atol=1e-11), f"{where}, {name} of replica {k}: {got - x}"


PUBLISHED_STEPS = 18
# The tables whose kinds of settings are always tried in real processes; `--whole` takes all.
SAMPLE = ("headline", "gates", "bits", "outer", "final")


def gentle(step: int) -> tuple[float, bool]:
    return 1 - 0.04 * step, step == PUBLISHED_STEPS - 1


def in_processes(settings: list[Setting]) -> list[tuple[list[dict[str, Tensor]], dict[str, float]]]:
    """Train this rank's replica with each setting; return its parameters after each step, and what it
    sent."""
    results = []
    for setting in settings:
        model = tiny()
        replica = Replica(model, setting, None if setting.baseline else dist.group.WORLD)
        trace = []
        for step in range(PUBLISHED_STEPS):
            model.zero_grad()
            loss_of(model, dist.get_rank(), step).backward()
            for p in model.parameters() if setting.baseline else ():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            at, last = gentle(step)
            replica.step(at, last=last and not math.isinf(setting.interval))
            trace.append({name: p.detach().clone() for name, p in model.named_parameters()})
        counted = replica.opt.ledger.bytes
        sent = {purpose: n for (axis, purpose), n in counted.items() if n and axis == "replicate"}
        results.append((trace, sent))
    return results


def kind_of(s: Setting) -> Setting:
    """Return the setting with the numbers of all others, and intervals that fit into a few steps."""
    numbers: dict[str, Any] = {"lr": 0.02, "adamw_lr": 3e-3, "momentum": 0.8, "tau": s.tau and 0.3}
    numbers["outer_lr"] = 1.4 if s.outer_lr > 1 else s.outer_lr
    return replace(s, **numbers, interval=4 if math.isfinite(s.interval) else s.interval)


def test_all_that_is_published_comes_out_the_same_in_real_processes(complete: bool) -> None:
    pytest.importorskip("rich", reason="the study shows its progress with rich: install the [report] extra")
    from convergence import TABLES, with_controls

    tables = TABLES if complete else SAMPLE
    named = [setting for table in tables for setting in with_controls(TABLES[table])]
    named = [s for s in named if not (s.exact or s.together)]  # what no process can be told
    settings = list({replace(kind_of(s), name=""): kind_of(s) for s in named}.values())
    assert len(settings) > 30
    ranks = run_ranks(2, in_processes, settings, deadline=4 * DEADLINE if complete else DEADLINE)
    for number, setting in enumerate(settings):
        traces = [results[number][0] for results in ranks]
        with closing(Replicas(tiny(), setting, 2)) as replicas:
            for step in range(PUBLISHED_STEPS):
                take(replicas, step)
                at, last = gentle(step)
                replicas.step(at, last=last and not math.isinf(setting.interval))
                compare(replicas, [trace[step] for trace in traces], f"{setting.name}, step {step}")
        if not setting.baseline:
            assert replicas.sent == ranks[0][number][1], setting.name


LIKE: list[tuple[Setting, Setting]] = [
    (Setting("all exact", interval=3, outer_lr=1.4, exact="weight"), Setting("baseline", baseline=True)),
    (Setting("together", interval=3, together=1.0), Setting("apart", interval=3)),
    (Setting("together", interval=1, together=1.4), Setting("each step", interval=1, outer_lr=1.4)),
]


@pytest.mark.parametrize(("told", "plain"), LIKE, ids=["exact", "the mean at once", "further"])
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_what_an_oracle_tells_changes_nothing_else(told: Setting, plain: Setting, rule: str) -> None:
    told, plain = replace(told, rule=rule), replace(plain, rule=rule)
    with closing(Oracle(tiny(), told, 3)) as oracle, closing(Replicas(tiny(), plain, 3)) as replicas:
        for step in range(STEPS):
            for of in (oracle, replicas):
                take(of, step)
                of.step(factor(step))
            compare(oracle, [{n: x[k] for n, x in replicas.X.items()} for k in range(3)], f"step {step}")
        assert oracle.told == 2.0 * STEPS * oracle.numel
        assert oracle.sent["oracle"] == oracle.told and oracle.wire >= oracle.told * 4 / 3


def test_what_is_exact_is_the_same_everywhere_and_the_rest_is_not() -> None:
    setting = Setting("", interval=4, outer_lr=1.4, exact="up,embedding")
    with closing(Oracle(tiny(), setting, 3)) as oracle:
        for step in range(3):
            take(oracle, step)
            oracle.step()
            for name, x in oracle.X.items():
                exact = "up" in name or "embedding" in name
                assert bool((x == x[:1]).all()) is (exact or step == 0), name
    for kept in (replace(setting, kept=0.5), replace(setting, bits=1), replace(setting, together=1.4)):
        with pytest.raises(ValueError, match="bits=32"):
            Oracle(tiny(), kept, 3)


def test_matrices_are_equal_each_time_and_the_others_seldom() -> None:
    setting = Setting("", interval=2, bits=1, others_every=3)
    with closing(Replicas(tiny(), setting, 2)) as replicas:
        for step in range(9):  # synchronized after steps 0, 2, 4, 6 and 8; all at 0 and 6
            take(replicas, step)
            assert replicas.step() is (step % 2 == 0)
            for name, x in replicas.X.items():
                due = step % 6 == 0 if name.split(".")[0] in ("embedding", "norm", "head") else step % 2 == 0
                assert bool((x == x[:1]).all()) is due, f"{name} after step {step}"


@pytest.mark.parametrize("bits", [32, 1])
def test_momenta_turn_toward_the_mean_at_a_synchronization_alone(bits: int) -> None:
    """M' = M + c ||M|| (D / ||D|| - D_i / ||D_i||): D is what all go by, D_i what this replica went alone."""
    keep = Setting("", interval=3, bits=bits, weight_decay=0.0, momentum=0.8)
    turn = replace(keep, at_synchronization="turn 0.4")
    start = {name: p.detach() for name, p in tiny().named_parameters()}
    expected: dict[tuple[int, str], Tensor] = {}

    def momentum(of: Replicas, k: int, name: str) -> Tensor:
        return of._replicas[k].opt.state[of.models[k].get_parameter(name)]["momentum"].clone()

    with ExitStack() as stack:
        kept, turned = (stack.enter_context(closing(Replicas(tiny(), s, 3))) for s in (keep, turn))
        for of in (kept, turned):
            take(of, 0)
            assert of.step() is True
        compare(turned, [{name: x[k] for name, x in kept.X.items()} for k in range(3)], "step 0")
        for k in range(3):
            alone = stack.enter_context(closing(Replicas(tiny(), replace(keep, bits=32), 1)))
            loss_of(alone.models[0], k, 0).backward()
            alone.step()
            for name in ("up.weight", "down.weight"):
                m, d = momentum(kept, k, name), start[name] - kept.X[name][k]
                d_i = start[name] - alone.X[name][0]
                expected[k, name] = m + 0.4 * m.norm() * (d / d.norm() - d_i / d_i.norm())
                torch.testing.assert_close(momentum(turned, k, name), expected[k, name])
        take(turned, 1)
        assert turned.step() is False
        for (k, name), m in expected.items():
            torch.testing.assert_close(momentum(turned, k, name), 0.8 * (m + turned.G[name][k]))


def test_a_replica_that_fails_ends_the_step_of_all() -> None:
    def fail(factor: float, *, last: bool) -> None:
        raise OSError("out of luck")

    with closing(Replicas(tiny(), Setting("", interval=3), 3)) as replicas:
        take(replicas, 0)
        replicas.step()
        replicas.G["up.weight"][1, 0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="after 1 steps"):  # which is local, and tells nobody
            replicas.step()
    with closing(Replicas(tiny(), Setting("", interval=3), 3)) as replicas:
        replicas._replicas[2].step = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="out of luck"):
            replicas.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_keeps_the_largest(dtype: torch.dtype) -> None:
    codec = TopK(8)
    x = 0.1 * torch.randn(3 * codec.block, generator=torch.Generator().manual_seed(0)).to(dtype)
    large = torch.tensor([5, 4095, 4096, 9000])
    x[large] = torch.tensor([3.0, -3.0, 4.0, -5.0], dtype=dtype)
    payload = codec.encode(x)
    assert len(payload) * 8 == len(x) * codec.bits_per_value
    got = codec.decode(payload, dtype)
    assert got.dtype == dtype and int((got != 0).sum()) == 3 * 8
    assert (got[large].sign() == x[large].sign()).all()
    assert (got - x).norm() < 0.9 * x.norm()
    assert not codec.decode(codec.encode(torch.zeros(codec.block))).any()


def test_what_is_left_out_decays_by_the_retention() -> None:
    """M' = beta (m - A) + mu A, where A, P R^T, is m projected on the columns of a matrix of that rank."""
    mu, beta, rank = 0.7, 0.9, 3
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(12, 8, generator=generator, dtype=torch.float64))
    options = {"local_update": rule_of("dion, retention 0.9"), "momentum": mu, "rank_fraction": rank / 8}
    opt = CurvaDion([("weight", p)], orthogonalization="qr", tau=math.inf, consensus="alone", **options)
    M = torch.zeros_like(p)
    for _ in range(3):
        p.grad = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        m = M + p.grad
        opt.step()
        M = opt.state[p]["momentum"].clone()
        A = (beta * m - M) / (beta - mu)
        assert torch.linalg.matrix_rank(A) == rank
        torch.testing.assert_close(A.T @ (m - A), torch.zeros(8, 8, dtype=torch.float64))
    assert opt.param_groups[0]["momentum"] == mu
    with pytest.raises(ValueError, match="a rule is one of"):
        rule_of("dion, retained")
