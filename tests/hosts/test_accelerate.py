"""Accelerate's `prepare`, `backward`, clipping, accumulation, saving and loading, against the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from support.models import outcome
from support.ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from curvadion import LOW_COMMUNICATION
from curvadion.hosts.accelerate import replicate_mesh_of
from hosts.loops import DEADLINE, Net, Tokens, in_steps, optimizer, plain, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "low": LOW_COMMUNICATION(max_local_steps=2),
    "delayed": LOW_COMMUNICATION(max_local_steps=2, outer_delay=1),
}


def accelerator_of(shards: int, replicas: int, kind: str, **more: Any) -> Accelerator:
    """Accelerate on this CPU. It has FSDP for accelerators only, and is told to take this one for such."""
    accelerator = Accelerator(cpu=True, **more)
    if shards > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type=kind, cpu_ram_efficient_loading=False
        )
    if replicas > 1 and shards > 1:
        config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        accelerator.state.parallelism_config = config
        accelerator.state.device_mesh = config.get_device_mesh("cpu")
    return accelerator


def prepared(shards: int, replicas: int, name: str, folder: str, kind: str) -> dict[str, Any]:
    """Six steps of two batches with clipping, saved after the fourth; the last two once more after loading;
    and the same by the plain loop."""
    accelerator = accelerator_of(shards, replicas, kind, gradient_accumulation_steps=2)
    replicate = replicate_mesh_of(accelerator)
    net = Net()
    own = optimizer(net, replicate, **OPTIONS[name])
    loader = torch.utils.data.DataLoader(Tokens(12 * shards * replicas * 2), batch_size=2, shuffle=True)
    model, opt, loader = accelerator.prepare(net, own, loader)
    raw = accelerator.unwrap_model(model)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0))
    told: dict[str, Any] = {"wrapped": type(model).__name__}

    def train(batches: Any, start: int) -> None:
        for number, batch in enumerate(batches, start):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)[0])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                schedule.step()
                opt.zero_grad()
            if number == 7:
                own.synchronize()
                told["saved"] = weights(model)
                accelerator.save_state(folder)

    torch.manual_seed(5)
    train(loader, 0)
    told["weights"], seen = weights(model), list(raw.seen)
    own.discard_divergence()
    accelerator.load_state(folder)
    told["loaded"] = weights(model)
    train([{"input_ids": tokens} for tokens in seen[8:]], 8)
    told["again"] = weights(model)

    other = Net()
    if shards > 1:
        mesh = accelerator.torch_device_mesh
        fully_shard(other, mesh=mesh["dp_shard"] if mesh is not None else None)
    expected = optimizer(other, replicate, **OPTIONS[name])
    after = lambda step: expected.synchronize() if step == 4 else None  # noqa: E731
    plain(other, expected, in_steps(seen, 2), clip=0.5, after=after)
    told["expected"], told["batches"] = weights(other), [int(tokens.sum()) for tokens in seen]
    return told


@pytest.mark.parametrize(
    ("shards", "replicas", "name", "kind"),
    [
        (1, 1, "low", "FULL_STATE_DICT"),
        (1, 2, "low", "FULL_STATE_DICT"),
        (2, 1, "defaults", "SHARDED_STATE_DICT"),
        (2, 1, "low", "FULL_STATE_DICT"),
        (2, 2, "delayed", "SHARDED_STATE_DICT"),
        (2, 2, "low", "FULL_STATE_DICT"),
    ],
)
def test_accelerate_trains_saves_and_resumes_as_the_plain_loop(
    shards: int, replicas: int, name: str, kind: str, tmp_path: Path
) -> None:
    results = run_ranks(
        shards * replicas,
        prepared,
        shards,
        replicas,
        name,
        str(tmp_path),
        kind,
        deadline=DEADLINE,
        group=False,
    )
    for told in results:
        assert replicas == 1 or told["wrapped"] != "DistributedDataParallel"
        assert told["weights"] == told["expected"], "bit for bit"
        assert told["loaded"] == told["saved"] and told["again"] == told["weights"]
    assert len({str(told["batches"]) for told in results}) == len(results), "each rank its own data"
    ends = {told["weights"] for told in results[::shards]}
    assert len(ends) == replicas, "local steps have come since"


def refused() -> list[tuple[str, str]]:
    late, ddp = Accelerator(cpu=True), Net()
    late.prepare(Net())
    messages = [outcome(lambda: replicate_mesh_of(late))]
    wrapped = torch.nn.parallel.DistributedDataParallel(ddp)
    opt = optimizer(ddp, dist.group.WORLD, on_equal_gradients="raise")
    torch.manual_seed(dist.get_rank())
    wrapped(torch.randint(0, 32, (2, 9)))[0].backward()
    return [*messages, outcome(opt.step)]


def test_what_averages_gradients_is_refused() -> None:
    for late, ddp in run_ranks(2, refused, deadline=DEADLINE, group=False):
        assert late[0] == "RuntimeError" and "before a model is prepared" in late[1], late
        assert ddp[0] == "ReplicaMismatchError" and "bit for bit" in ddp[1], ddp


class Passing(Accelerator):
    """Its method passes on what it gets."""

    def prepare_model(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        return super().prepare_model(model, **kwargs)


def alone(cls: type[Accelerator]) -> str:
    accelerator = cls(cpu=True)
    replicate_mesh_of(accelerator)
    return type(accelerator.prepare(Net())).__name__


@pytest.mark.parametrize("cls", [Accelerator, Passing])
def test_an_accelerator_may_pass_its_arguments_on(cls: type[Accelerator]) -> None:
    assert run_ranks(2, alone, cls, deadline=DEADLINE, group=False) == ["Net"] * 2, "not in DDP"
