"""Replicas that leave and come back: no step is lost on the others, and all are equal at the end."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from support.replicas import Jobs
from torch import Tensor, nn
from torch.distributed import TCPStore

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup, param_groups_for

LEASE = 1.5


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 12), nn.RMSNorm(12)
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)
        self.head = nn.Linear(12, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Of a noisy permutation, which can be learned down to a known loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(16, (32,), generator=generator)
    other = torch.rand(32, generator=generator) < 0.2
    noise = torch.randint(16, (32,), generator=generator)
    return nn.functional.cross_entropy(model(tokens), torch.where(other, noise, (5 * tokens + 3) % 16))


def train(address: str, name: str, steps: int, dies_at: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tiny()
    group = ElasticGroup(address, name, expected=3, lease=LEASE, timeout=30)
    opt = CurvaDion(
        param_groups_for(model, adamw_lr=3e-3), lr=0.02, replicate_mesh=group, **LOW_COMMUNICATION(**options)
    )
    host, port = address.split(":")
    watched = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    begin = opt.join()
    taken, longest = [], 0.0
    for step in range(begin, steps):
        opt.zero_grad()
        loss_of(model, 1000 * step + ord(name)).backward()
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        before = time.monotonic()
        opt.step()
        longest = max(longest, time.monotonic() - before)
        taken.append(step)
        watched.add(f"steps of {name}", 1)
        time.sleep(0.002)
    with torch.no_grad():
        loss = sum(float(loss_of(model, 10**6 + k)) for k in range(20)) / 20
    found = {"X": [p.detach().tolist() for p in model.parameters()], "taken": taken, "loss": loss}
    group.leave()
    return {**found, "history": group.history, "longest": longest}


def run(steps: int, killed_at: int | None, **options: Any) -> tuple[list[dict[str, Any]], Jobs]:
    with Jobs() as jobs:
        for name in "abc":
            jobs.start(
                name, train, steps, killed_at if name == "b" and killed_at is not None else -1, options
            )
        if killed_at is not None:
            jobs.died("b")
            jobs.wait_for("steps of a", killed_at + 50)
            jobs.start("b", train, steps, -1, options)
        return jobs.results("a", "b", "c"), jobs


def test_a_replica_that_is_killed_and_comes_back_costs_the_others_no_step() -> None:
    t0 = time.time()
    (a, b, c), _ = run(161, 43)
    print(time.time() - t0)
    for r in (a, b, c):
        print(r["loss"], r["history"], r["longest"], r["taken"][0], len(r["taken"]))
    assert a["taken"] == c["taken"] == list(range(161))
    assert a["X"] == b["X"] == c["X"]
    t0 = time.time()
    (a, b, c), _ = run(161, None)
    print(time.time() - t0)
    for r in (a, b, c):
        print(r["loss"], r["history"], r["longest"], r["taken"][0], len(r["taken"]))
