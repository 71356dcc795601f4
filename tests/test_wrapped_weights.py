"""Weights inside wrappers that hold one tensor alike, as float8 training has them: trained as plain ones are,
bit for bit, with state that is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TinyGPT, digest, local, state_digest
from support.ranks import run_ranks
from support.resume import Found, Place, Shape, moves, place, resume
from support.wrapped import Wrapped, WrappedGPT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from curvadion import CurvaDion, param_groups_for
from curvadion.sharding.layout import local_tensor

SHAPES: list[Shape] = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("mode", ["gradient", "dion", "1 bit", "Nesterov", "on the host"])
def test_a_model_of_wrapped_weights_trains_as_one_of_plain_ones(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter, every state tensor and the loss of the mean of the replicas, in every step."""

    def run(where: Place) -> list[Any]:
        seen, opt = where.course(mode)
        values = [local(v) for state in opt.state.values() for v in state.values()]
        assert {type(v) for v in values if isinstance(v, Tensor)} == {Tensor}
        return seen

    def worker() -> list[tuple[Shape, bool]]:
        found = []
        for where in filter(lambda where: where.here, map(place, SHAPES)):
            plain = run(where)
            monkeypatch.setattr(Place, "model", WrappedGPT)
            found.append((where.shape, run(where) == plain))
            monkeypatch.undo()
        return found

    for found in run_ranks(4, worker):
        assert found and all(same for _, same in found), found


def test_wrapped_weights_under_fsdp_and_tensor_parallelism() -> None:
    def worker() -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
        found = []
        for kind in (TinyGPT, WrappedGPT):
            torch.manual_seed(0)
            model = kind()
            for layer in model.layers:
                parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
                fully_shard(layer, mesh=mesh["shard"])
            fully_shard(model, mesh=mesh["shard"])
            opt = CurvaDion(model.groups())
            for step in range(4):
                model.loss(step, 0).backward()
                opt.step()
                opt.zero_grad()
            found.append(state_digest(opt))
        return found

    for plain, wrapped in run_ranks(4, worker):
        assert plain == wrapped


def test_what_was_saved_of_wrapped_weights_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same mesh and on others. torch's usual stager copies a wrapper's own memory: nothing."""
    monkeypatch.setattr(Place, "model", WrappedGPT)
    monkeypatch.setattr(Place, "stager", BlockingAsyncStager)

    def worker() -> list[Found]:
        return [
            resume("1 bit", "DCP nested", (2, 2), tmp_path / "0"),
            resume("gradient", "torch.save", (1, 1), tmp_path / "1"),
            *moves("1 bit", (2, 2), [(1, 4), (2, 1)], tmp_path / "2", live=False),
            *moves("delay", (1, 2), [(4, 1)], tmp_path / "3", live=True),
        ]

    for rank, found in enumerate(run_ranks(4, worker)):
        assert not [one for one in found if one.wrong], f"rank {rank}"
        assert len(found) >= 2


def test_a_wrapper_that_is_given_more_later_is_trained_on() -> None:
    """As scales that float8 training finds out after each step."""
    runs = []
    for model in (WrappedGPT, Place.model):
        torch.manual_seed(0)
        trained = model()
        opt = CurvaDion(param_groups_for(trained))
        for step in range(3):
            trained.loss(step, 0).backward()
            opt.step()
            opt.zero_grad()
            for p in trained.parameters():
                if isinstance(p, Wrapped):
                    p.inner = (p.inner[0], torch.ones(()))
        runs.append(digest(trained.parameters()))
    assert runs[0] == runs[1]


def test_a_dry_run_of_wrapped_weights() -> None:
    with FakeTensorMode():
        p = nn.Parameter(Wrapped(torch.ones(4, 3)))
        opt = CurvaDion([("w", p)])
        p.grad = torch.ones(4, 3)
        opt.step()
    with torch.device("meta"):
        CurvaDion(param_groups_for(WrappedGPT()))


@pytest.mark.parametrize("tensor", [torch.ones(4, 3), nn.Parameter(torch.ones(4, 3)), Wrapped(torch.ones(4))])
def test_what_is_updated_is_what_the_model_has(tensor: Tensor) -> None:
    inner = local_tensor(tensor)
    assert inner is (tensor.inner[0] if isinstance(tensor, Wrapped) else tensor)
