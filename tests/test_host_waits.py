"""What makes the host wait for a GPU, found without one: on which lines of a step a value is read."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from support.models import Toy, grid, shipped
from support.ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvadion import CurvaDion
from curvadion.consensus import CONSENSUS
from curvadion.rules import RULES
from curvadion.sharding.group import ThreadGroup, _Done
from curvadion.signals import SIGNALS

# Operations whose result's value or shape the host has to know.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount"}
# Indexing with a list uploads the list.
WAITING |= {"index", "index_put_"}
# The one wait of a step. On a CPU, which has nothing to wait for, the reference kernel reads the key, and
# orthogonalization whether all columns are independent; on a GPU the device decides.
ALLOWED = {"ask.py:<lambda>", "reference.py:local_step_", "power_iteration.py:_first_factor"}
# Likewise on the CPU only: whether all matrices have gradients; and Householder's QR, "auto" on CPUs alone.
ALLOWED |= {"store.py:_all_live", "power_iteration.py:_householder"}
# On the CPU wherever the parameters are: counters of AdamW, and where shards lie, once.
ALLOWED |= {"scalar.py:scalar_step", "layout.py:_region"}


class Reads(TorchDispatchMode):
    """Counts where values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            ours = [f for f in traceback.extract_stack() if "curvadion" in f.filename]
            self.places[f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


class Silent(ThreadGroup):
    """The first of two ranks, to which nobody answers."""

    def __init__(self) -> None:
        self.size, self.rank, self.ranks = 2, 0, []

    def _meet(self, *arguments: Any) -> Any:
        return _Done()


OPTIONS: list[dict[str, Any]] = [
    {"consensus": consensus, "local_update": rule}
    for consensus in shipped(CONSENSUS)
    for rule in shipped(RULES)
]
OPTIONS += [{"gate": signal} for signal in shipped(SIGNALS)] + [{"gate_lag": 1}]
OUTER: list[dict[str, Any]] = [
    {"outer_bits": 1, "outer_delay": 2},
    {"outer_fragments": 3, "outer_on_host": True},
    {"outer_momentum": 0.6, "outer_on_host": True},
]
OPTIONS += [{"consensus": "outer", **options} for options in OUTER]
OPTIONS += [{"gate_every": 3, "right_factor": "qr"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_host_waits_once_in_a_step(options: dict[str, Any]) -> None:
    matrices = [(f"layers.{k}.weight", nn.Parameter(torch.randn(*s))) for k, s in enumerate([(8, 6), (4, 9)])]
    groups = [{"params": matrices}, {"params": [("n", nn.Parameter(torch.ones(5)))], "algorithm": "adamw"}]
    bounds = {"max_local_steps": 2, "tau": math.inf}
    opt = CurvaDion(groups, replicate_mesh=Silent(), check_every=0, **{**bounds, **options})
    branches = set()
    for step in range(7):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        with Reads() as reads:
            opt.step()
        lagged = {"exchange.py:read"} if options.get("gate_lag") else set()  # of the step before
        if step:  # the first compares all ranks
            branches.add(opt.metrics()["curvadion/synchronized"])
            assert reads.places.keys() <= ALLOWED | lagged, f"step {step} waits in {reads.places}"
            assert reads.places["ask.py:<lambda>"] == 1
    assert branches == {0.0, 1.0}


@pytest.mark.parametrize("rule", [name for name in shipped(RULES) if name not in ("gradient", "dion")])
def test_matrices_go_to_their_owners_without_a_wait(rule: str) -> None:
    def worker() -> Counter[str]:
        _, mesh = grid(1, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), tau=math.inf, check_every=0, local_update=rule, owners="always")
        places: Counter[str] = Counter()
        for step in range(4):
            toy.set_gradients(step, 0)
            with Reads() as reads:
                opt.step()
            places += reads.places if step else Counter()
        return places

    for places in run_ranks(2, worker):
        assert places.keys() <= ALLOWED, f"the host waits in {places}"
