"""Several backward passes for each step: as many replicas of one process, each with one big batch, end in the
same place, whatever accumulates the gradients and whatever is done between two passes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import TinyGPT, grid, whole
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from curvadion import LOW_COMMUNICATION, CurvaDion

STEPS, PIECES = 9, 3
TOLERANCE = 1e-12  # of float64, in which one big batch is summed in another order

OPTIONS: dict[str, dict[str, Any]] = {
    "gate": {"tau": 0.6, "local_lr_scale": 0.1},
    "gate_lag": {"tau": 0.2, "local_update": "muon", "gate_lag": 1},
    "outer": LOW_COMMUNICATION(max_local_steps=2, outer_bits=32, outer_momentum=0.5),
    "delay": LOW_COMMUNICATION(max_local_steps=3, outer_bits=32, outer_fragments=2, outer_delay=2),
}


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def piece(step: int, replica: int, shard: int, number: int) -> Tensor:
    seed = 1000 * step + 100 * replica + 10 * shard + number
    return torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(seed))


def build(model: nn.Module, replicate: Any, options: dict[str, Any]) -> CurvaDion:
    return CurvaDion(model.groups(), lr=0.02, replicate_mesh=replicate, **options)  # type: ignore[operator]


def one_batch(options: dict[str, Any], shards: int, model: TinyGPT) -> list[Any]:
    replica, model = dist.get_rank(), copy.deepcopy(model)
    opt, synchronized = build(model, dist.group.WORLD, options), []
    for step in range(STEPS):
        pieces = [piece(step, replica, shard, n) for shard in range(shards) for n in range(PIECES)]
        loss_of(model, torch.cat(pieces)).backward()
        opt.step()
        opt.zero_grad()
        synchronized.append(opt.metrics()["curvadion/synchronized"])
    return [*(p.detach() for p in model.parameters()), synchronized]


def in_pieces(options: dict[str, Any], model: TinyGPT, how: str) -> list[Any]:
    shards = 2 if how != "no_sync of DDP" else 1
    replicate, mesh = grid(2, shards)
    replica, shard = replicate.get_local_rank(), mesh.get_local_rank()
    model = copy.deepcopy(model)
    forward: nn.Module = model
    if how == "no_sync of DDP":
        forward = DistributedDataParallel(model)
    elif how == "DDP in each replica":
        forward = DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt, synchronized = build(model, replicate, options), []
    for step in range(STEPS):
        for n in range(PIECES):
            last = n == PIECES - 1
            if isinstance(model, FSDPModule) and how != "each piece reduced":
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
                if how == "kept gathered":
                    model.set_reshard_after_backward(last)
            alone = how == "no_sync of DDP" or (how == "DDP in each replica" and not last)
            with forward.no_sync() if alone else nullcontext():  # type: ignore[operator]
                (loss_of(forward, piece(step, replica, shard, n)) / PIECES).backward()
            if how in ("looked at between", "kept gathered"):
                with opt.consensus(), torch.no_grad():
                    model(piece(99, replica, shard, 0))
        opt.step()
        opt.zero_grad(set_to_none=how != "each piece reduced")
        synchronized.append(opt.metrics()["curvadion/synchronized"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [*(whole(p) for p in model.parameters()), synchronized]


HOW = ["each piece reduced", "last piece reduced", "looked at between", "kept gathered"]
HOW += ["DDP in each replica", "no_sync of DDP"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", OPTIONS)
def test_pieces_of_a_batch_are_worth_the_batch(options: str, how: str) -> None:
    torch.manual_seed(0)
    model, shards = TinyGPT().double(), 1 if how == "no_sync of DDP" else 2
    expected = run_ranks(2, one_batch, OPTIONS[options], shards, model)
    assert 0 < sum(expected[0][-1]) < STEPS
    for rank, (*X, synchronized) in enumerate(run_ranks(2 * shards, in_pieces, OPTIONS[options], model, how)):
        *wanted, when = expected[rank // shards]
        assert synchronized == when
        for x, y in zip(X, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE)
