"""Runs that are saved in one way and on one mesh, and loaded in another: who is equal to whom, bit for bit.

Meshes are R x S, replicas times FSDP2 shards, over the first R S ranks of the world; with one shard
parameters are plain tensors. `tests/resume_matrix.py` tries everything, tests/test_saving.py a part.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from curvadion import LOW_COMMUNICATION, CurvaDion
from support.models import TinyGPT, gathered, state_digest, whole

Shape = tuple[int, int]
AVERAGE: dict[str, Any] = {"tau": float("inf"), "max_local_steps": 2, "momentum": 0.9}
OUTER = AVERAGE | {"consensus": "outer"}
MODES: dict[str, Mapping[str, Any]] = {
    "gradient": AVERAGE,
    "dion": AVERAGE | {"local_update": "dion"},
    "gate": {"tau": 0.3, "max_local_steps": 3},
    "lag": {"tau": 0.3, "max_local_steps": 3, "gate_lag": 1},
    "rate": {"tau": 0.5, "target_sync_rate": 0.5},
    "1 bit": LOW_COMMUNICATION(max_local_steps=3),
    "delay": LOW_COMMUNICATION(max_local_steps=3, outer_delay=2),
    "fragments": LOW_COMMUNICATION(max_local_steps=1, outer_fragments=2),
    "residual kept": LOW_COMMUNICATION(max_local_steps=3, outer_residual_kept=0.5),
    "Nesterov": OUTER | {"outer_lr": 0.7, "outer_momentum": 0.6, "local_update": "normuon"},
    "Dion, outer": OUTER | {"local_update": "dion", "outer_bits": 4},
    "on the host": OUTER | {"local_update": "dion2", "outer_on_host": True, "gate_lag": 1},
}
ASYNCHRONOUS = [name for name, options in MODES.items() if options.get("consensus") == "outer"]
WAYS = ("torch.save", "nested", "flat", "DCP nested", "DCP flat")
STEPS, MORE = 6, 5  # before the save, and after it; the save is in a local phase of most modes


@dataclass(frozen=True)
class Found:
    """What came of one attempt."""

    mode: str
    way: str
    saved_on: Shape
    loaded_on: Shape
    wrong: str = ""


class Place:
    """A mesh over the first ranks of the world, which all ranks must make; and what is trained there."""

    model: Callable[[], TinyGPT] = TinyGPT
    stager: Callable[[], Any] = staticmethod(lambda: None)  # copies what is saved asynchronously

    def __init__(self, shape: Shape):
        self.shape = shape
        ranks = list(range(shape[0] * shape[1]))
        self.mesh = DeviceMesh("cpu", torch.tensor(ranks).view(shape), mesh_dim_names=("replicate", "shard"))
        self.group = dist.new_group(ranks, backend="gloo")
        self.here = dist.get_rank() in ranks

    def build(self, mode: str, seed: int = 0) -> tuple[TinyGPT, CurvaDion]:
        torch.manual_seed(seed)
        model = self.model()
        if self.shape[1] > 1:
            for layer in model.layers:
                fully_shard(layer, mesh=self.mesh["shard"])
            fully_shard(model, mesh=self.mesh["shard"])
        return model, CurvaDion(model.groups(), replicate_mesh=self.mesh["replicate"], **MODES[mode])

    def train(self, model: TinyGPT, opt: CurvaDion, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            model.loss(step, self.mesh.get_local_rank("replicate")).backward()
            opt.step()

    def course(
        self, mode: str, moved: Callable[[TinyGPT], None] = lambda model: None
    ) -> tuple[list[Any], CurvaDion]:
        """Return the digest of all state and the loss of the mean of the replicas after each of six steps;
        `moved` hears of a model whose weights are others now."""
        model, opt = self.build(mode)
        seen: list[Any] = []
        for step in range(6):
            self.train(model, opt, range(step, step + 1))
            seen.append(state_digest(opt))
            with opt.consensus(), torch.no_grad():
                moved(model)
                seen.append(model.loss(step, 0).item())
            moved(model)
        return seen, opt

    def equal_replicas(self, opt: CurvaDion) -> bool:
        """Say whether peers hold the same; every rank of the mesh asks."""
        digests: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(digests, state_digest(opt), group=self.group)
        return all(digests[k] == digests[k % self.shape[1]] for k in range(len(digests)))

    def content(self, model: TinyGPT, opt: CurvaDion) -> dict[str, Tensor]:
        """Return every parameter and state tensor, whole."""
        found = {}
        for name, p in model.named_parameters():
            found[name] = whole(p)
            for key, value in opt.state[p].items():
                found[f"{name}.{key}"] = whole(value)
        return found


@functools.cache
def place(shape: Shape) -> Place:
    return Place(shape)


def save(where: Place, model: TinyGPT, opt: CurvaDion, folder: Path, *, flat: bool = False) -> None:
    model_state, opt_state = get_state_dict(model, opt, options=_options(flat))
    state = {"model": model_state, "optimizer": opt_state}
    dcp.save(state, checkpoint_id=folder, process_group=where.group)


def load(where: Place, model: TinyGPT, opt: CurvaDion, folder: Path, *, flat: bool = False) -> None:
    model_state, opt_state = get_state_dict(model, opt, options=_options(flat))
    state = {"model": model_state, "optimizer": opt_state}
    dcp.load(state, checkpoint_id=folder, process_group=where.group)
    _set(model, opt, state["model"], state["optimizer"], flat)


def _options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def _set(model: TinyGPT, opt: CurvaDion, model_state: Any, opt_state: Any, flat: bool) -> None:
    set_state_dict(
        model, opt, model_state_dict=model_state, optim_state_dict=opt_state, options=_options(flat)
    )


def resume(mode: str, way: str, shape: Shape, folder: Path) -> Found:
    """Save, load on the same mesh, and go on: a resumed run must be the run that was saved."""
    where = place(shape)
    if not where.here:
        return Found(mode, way, shape, shape)
    model, opt = where.build(mode)
    where.train(model, opt, range(STEPS))
    opt.synchronize()
    other, resumed = where.build(mode, seed=1)
    where.train(other, resumed, range(2))  # it has a past of its own
    resumed.discard_divergence()
    if way == "torch.save":
        folder.mkdir(exist_ok=True)
        file = folder / f"{dist.get_rank()}.pt"
        torch.save([model.state_dict(), opt.state_dict()], file)
        saved = torch.load(file, weights_only=True)
        set_model_state_dict(other, saved[0])
        resumed.load_state_dict(saved[1])
    elif way.startswith("DCP"):
        save(where, model, opt, folder, flat="flat" in way)
        load(where, other, resumed, folder, flat="flat" in way)
    else:
        states = copy.deepcopy(get_state_dict(model, opt, options=_options(way == "flat")))
        _set(other, resumed, *states, flat=way == "flat")
    wrong = "" if state_digest(opt) == state_digest(resumed) else "state differs"
    for run in ((model, opt), (other, resumed)):
        where.train(*run, range(STEPS, STEPS + MORE))
    if not wrong and state_digest(opt) != state_digest(resumed):
        wrong = "another run"
    if not wrong and opt.param_groups[0]["tau"] != resumed.param_groups[0]["tau"]:
        wrong = "another tau"
    return Found(mode, way, shape, shape, wrong)


def moves(
    mode: str, saved_on: Shape, shapes: Iterable[Shape], folder: Path, *, live: bool
) -> Iterator[Found]:
    """Save on one mesh, load on others, and go on: everything must arrive there, and replicas be equal.

    Args:
        live: save asynchronously inside `common_state()` while the run goes on, rather than after
            `synchronize()`; the run must be that of a twin which saves nothing.
    """
    where, way, wrong = place(saved_on), "asynchronous" if live else "synchronized", ""
    expected: dict[str, Tensor] = {}
    if where.here:
        model, opt = where.build(mode)
        where.train(model, opt, range(STEPS))
        if live:
            wrong, expected = _save_alive(where, model, opt, mode, folder)
        else:
            opt.synchronize()
            save(where, model, opt, folder)
            expected = where.content(model, opt)
    expected, wrong = gathered((expected, wrong))[0]  # of the first replica
    for shape in shapes:
        there = place(shape)
        if not there.here:
            continue
        other, resumed = there.build(mode, seed=2)
        load(there, other, resumed, folder)
        content = there.content(other, resumed)
        differing = [key for key, value in expected.items() if not torch.equal(content[key], value)]
        why = wrong or (f"{differing[:3]} differ" if differing or content.keys() != expected.keys() else "")
        if not why and not there.equal_replicas(resumed):
            why = "replicas differ after the load"
        there.train(other, resumed, range(STEPS, STEPS + MORE))
        resumed.synchronize()
        if not why and not there.equal_replicas(resumed):
            why = "replicas differ in the end"
        yield Found(mode, way, saved_on, shape, why)
    dist.barrier()


def _save_alive(
    where: Place, model: TinyGPT, opt: CurvaDion, mode: str, folder: Path
) -> tuple[str, dict[str, Tensor]]:
    twin = where.build(mode)
    where.train(*twin, range(STEPS))
    before = state_digest(opt)
    with opt.common_state():
        states = get_state_dict(model, opt)
        expected = {}
        for name, p in model.named_parameters():
            expected[name] = whole(p)
            for key, value in states[1]["state"][name].items():
                expected[f"{name}.{key}"] = whole(value)
        state = dict(zip(("model", "optimizer"), states, strict=True))
        future: Any = dcp.async_save(
            state, checkpoint_id=folder, process_group=where.group, async_stager=where.stager()
        )
    wrong = "" if state_digest(opt) == before else "the save changed something"
    for run in ((model, opt), twin):
        where.train(*run, range(STEPS, STEPS + MORE))
    future.result()
    if not wrong and state_digest(opt) != state_digest(twin[1]):
        wrong = "the run that saved is another run"
    return wrong, expected
