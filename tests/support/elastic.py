"""A small run for replicas that come and go."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.fsdp import fully_shard

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup, LeftBehindError, param_groups_for
from support.layouts import local
from support.replicas import on_operations

LEASE = 8.0  # longer than any rank may have to wait for a core


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
    """Return the loss on a permutation, a fifth of which is noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(16, (32,), generator=generator)
    noisy = torch.rand(32, generator=generator) < 0.2
    noise = torch.randint(16, (32,), generator=generator)
    return nn.functional.cross_entropy(model(tokens), torch.where(noisy, noise, (5 * tokens + 3) % 16))


def batches(model: nn.Module, replica: int, rank: int, begin: int, end: int) -> Iterator[Tensor]:
    """Yield the loss of each step."""
    for step in range(begin, end):
        yield loss_of(model, 1000 * step + 10 * replica + rank)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups_for(model, adamw_lr=3e-3)


def train(
    address: str,
    name: str,
    steps: int,
    options: dict[str, Any],
    dies: Callable[[int, str, int, bool], bool] | None = None,
    lease: float = LEASE,
    how: signal.Signals = signal.SIGKILL,
) -> dict[str, Any]:
    """Train a replica until so many steps have been taken, and return what became of it.

    Args:
        dies: whether to end now; told the rank, and what `on_operations` says, or "step" and its number.
        lease: of the group.
        how: by which signal.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def happened(what: str, count: int, after: bool) -> None:
        if dies is not None and dies(rank, what, count, after):
            os.kill(os.getpid(), how)

    on_operations(happened)
    torch.manual_seed(0)
    model = Tiny()
    if ranks > 1:
        mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    group = ElasticGroup(address, name, expected=3, lease=lease, timeout=60)
    opt = CurvaDion(groups_of(model), lr=0.02, replicate_mesh=group, **LOW_COMMUNICATION(**options))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / (2 * steps))
    host, port = address.split(":")
    watched = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    taken, longest = [], 0.0
    try:
        begin = opt.join(schedule=schedule)
    except LeftBehindError as error:
        return {"too late": str(error)}
    for step, loss in enumerate(batches(model, ord(name), rank, begin, steps), begin):
        opt.zero_grad()
        loss.backward()
        happened("step", step, False)
        before = time.monotonic()
        opt.step()
        longest = max(longest, time.monotonic() - before)
        schedule.step()
        taken.append(step)
        if rank == 0:
            watched.add(f"steps of {name}", 1)
        time.sleep(0.002)
    with torch.no_grad():
        held_out = sum(float(loss_of(model, 10**6 + k)) for k in range(20)) / 20
    group.leave(finished=True)
    return {
        "X": [local(p).tolist() for p in model.parameters()],
        "X_0": [x.tolist() for x in opt._consensus.common(opt._built.store)["X_0"]],
        "lr": [group["lr"] for group in opt.param_groups],
        "taken": taken,
        "loss": held_out,
        "history": group.history,
        "longest": longest,
    }
