"""Dry runs: parameters of shapes only, under FakeTensorMode and on the meta device, in worlds that are not
there."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import TinyGPT, grid, local
from support.ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from curvadion import LOW_COMMUNICATION, CurvaDion

WAYS: dict[str, dict[str, Any]] = {
    "dion": {"max_local_steps": 2, "tau": math.inf, "local_update": "dion"},
    "synchronous": {"max_local_steps": 0},
    "muon": {**LOW_COMMUNICATION(max_local_steps=2)},
    "lagging": {"local_update": "muon", "gate_lag": 1, "tau": math.inf, "max_local_steps": 2},
}


def world(size: int) -> None:
    """Make this process rank 0 of a world of this size."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


def build(meshes: tuple[DeviceMesh, DeviceMesh], way: str, device: str = "cpu") -> tuple[TinyGPT, CurvaDion]:
    replicate, mesh = meshes
    with torch.device(device):
        model = TinyGPT(width=32)
    fully_shard(model, mesh=mesh)
    return model, CurvaDion(model.groups(), replicate_mesh=replicate, **WAYS[way])


def shapes(opt: CurvaDion) -> list[dict[str, tuple[int, ...]]]:
    return [shapes_of(values) for values in opt.state.values()]


def shapes_of(values: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(local(value).shape) for key, value in values.items()}


def take_steps(model: TinyGPT, opt: CurvaDion) -> list[dict[Any, Any]]:
    """Return what left this rank in each step, and whether the step was synchronized."""
    sent = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        synchronized = opt.metrics()["curvadion/synchronized"]
        sent.append({"synchronized": synchronized, **opt.ledger.last_step_wire})
    return sent


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_says_what_a_real_one_holds_and_sends(way: str) -> None:
    """State of the same shapes, the same bytes in each step and the same steps synchronized, on 2 x 2."""

    def real() -> Any:
        model, opt = build(grid(2, 2), way)
        return shapes(opt), take_steps(model, opt)

    def dry() -> Any:
        world(4)
        meshes = grid(2, 2)  # torch makes none under FakeTensorMode
        with FakeTensorMode():
            model, opt = build(meshes, way)
            found = shapes(opt), take_steps(model, opt)
        assert all(isinstance(local(p), FakeTensor) for p in model.parameters())
        return found

    assert run_ranks(1, dry) == run_ranks(4, real)[:1]


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("size", [64, 1024])
def test_an_optimizer_is_built_without_values_at_any_scale(size: int, device: str) -> None:
    def worker() -> Any:
        world(size)
        meshes = grid(size // 8, 8)
        with FakeTensorMode() if device == "fake" else nullcontext():
            model, opt = build(meshes, "dion", "cpu" if device == "fake" else device)
        states = [
            (tuple(p.shape), tuple(local(p).shape), shapes_of(opt.state[p])) for p in model.parameters()
        ]
        return opt.replicas, states

    [(replicas, states)] = run_ranks(1, worker)
    assert replicas == size // 8
    for shape, part, state in states:
        assert {state[key] for key in {"momentum", "exp_avg"} & state.keys()} == {part}
        if "Q" in state:  # of the shorter side, 32; split where that side is
            assert state["Q"] == (4 if shape[0] == 32 else 32, 8)


def test_a_step_on_the_meta_device_is_refused() -> None:
    """It would do nothing, and say nothing: most likely the model was materialized after the optimizer."""
    with torch.device("meta"):
        model = TinyGPT()
    opt = CurvaDion(model.groups())
    with pytest.raises(RuntimeError, match="meta device"):
        opt.step()


def test_a_dry_run_does_not_guess_what_only_values_say() -> None:
    with FakeTensorMode():
        model = TinyGPT()
        opt = CurvaDion(model.groups(), tau=0.2)  # with all defaults one replica synchronizes every step
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()  # the first is always synchronized
        with pytest.raises(RuntimeError, match=r"tau=0\.2.*max_local_steps"):
            opt.step()


def one_backward() -> float:
    weight = torch.ones(3, requires_grad=True)
    weight.sum().backward()
    assert weight.grad is not None
    return weight.grad.sum().item()


def test_ranks_forked_after_a_dry_run_can_run_backward() -> None:
    """FakeTensorMode claims GPUs where a CUDA build finds none; autograd would start threads for them, and
    refuse backward in every later fork (support/__init__.py). Other builds claim nothing."""
    with FakeTensorMode():
        model = TinyGPT()
    del model
    assert one_backward() == 3.0
    assert run_ranks(2, one_backward) == [3.0, 3.0]
