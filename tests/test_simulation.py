"""The simulation of K replicas in one process is the distributed optimizer: same gradients, same parameters after every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulation import Replicas, Setting
from support.layouts import local
from support.ranks import run_ranks
from torch import Tensor, nn

from curvadion import CurvaDion, param_groups_for

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
    (Setting("dion", rule="dion", rank_fraction=0.5, interval=3), {"local_update": "dion", "rank_fraction": 0.5, **EVERY_THIRD}),
    (Setting("gradient", rule="gradient", interval=3), {"local_update": "gradient", **EVERY_THIRD}),
    (Setting("adamw", rule="adamw", interval=3, bits=2), {"outer_bits": 2, **EVERY_THIRD}),
    (
        Setting("the paper's text", rule="gradient", rank_fraction=0.5, consensus="average", gate="rmmc", tau=0.2),
        {"local_update": "gradient", "rank_fraction": 0.5, "tau": 0.2},
    ),
    (
        Setting("the released code's rule", rule="dion", rank_fraction=0.5, consensus="average", interval=3, warmup=2),
        {"local_update": "dion", "rank_fraction": 0.5, "warmup_steps": 2, "tau": math.inf, "max_local_steps": 2},
    ),
    (Setting("baseline", baseline=True, rule="dion"), {"rank_fraction": 1.0, "max_local_steps": 0}),
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 12), nn.RMSNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False), nn.Linear(12, 16, bias=False)

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


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("setting", "options"), SAME, ids=lambda value: value.name if isinstance(value, Setting) else "")
def test_the_simulation_takes_the_steps_of_the_optimizer(setting: Setting, options: dict[str, Any], count: int) -> None:
    traces = run_ranks(count, distributed, options, setting.rule == "adamw")
    replicas = Replicas(tiny(), setting, count)
    for step in range(STEPS):
        for k, model in enumerate(replicas.models):
            for g in replicas.G.values():
                g[k].zero_()
            loss_of(model, k, step).backward()
        replicas.step(factor(step))
        for k in range(count):
            for name, expected in traces[k][step].items():
                got = replicas.X[name][k]
                assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11), f"step {step}, {name} of replica {k}: {got - expected}"
    if setting.consensus == "outer" and not setting.baseline:
        assert replicas.synchronized == 3
    else:
        assert 3 <= replicas.synchronized < STEPS or setting.baseline, f"{replicas.synchronized} synchronized steps take one branch only"
    if not setting.baseline:
        ends = {name: model.get_parameter(name) for model in [replicas.consensus()] for name in replicas.X}
        torch.testing.assert_close(ends["up.weight"].detach(), replicas.X["up.weight"].mean(0))
