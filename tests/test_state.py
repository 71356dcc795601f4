"""What state there is: a right factor where something uses one, and nowhere else."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import TinyGPT, Toy, digest, grid, state_digest
from support.ranks import run_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from curvadion import CurvaDion

OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "tau": math.inf, "max_local_steps": 2}
OUTER = OPTIONS | {"consensus": "outer"}


def train(toy: Toy, opt: CurvaDion, steps: range, replica: int = 0) -> None:
    for step in steps:
        toy.set_gradients(step, replica)
        opt.step()


def with_Q(toy: Toy, opt: CurvaDion) -> set[bool]:
    return {"Q" in opt.state[toy.params[name]] for name in toy.matrices}


@pytest.mark.parametrize("consensus", ["average", "none", "outer"])
@pytest.mark.parametrize("local_update", ["gradient", "dion", "muon", "normuon", "dion2"])
def test_there_is_a_right_factor_where_one_is_used(consensus: str, local_update: str) -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS | {"consensus": consensus, "local_update": local_update})
    assert with_Q(toy, opt) == {consensus != "outer" or local_update == "dion"}
    train(toy, opt, range(4))  # local and synchronized steps find what they need


def checkpoint(local_update: str, **options: Any) -> tuple[Toy, CurvaDion, dict[str, Any]]:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS | {"local_update": local_update} | options)
    train(toy, opt, range(3))
    opt.synchronize()
    return toy, opt, copy.deepcopy(opt.state_dict())


def test_a_saved_right_factor_that_nobody_uses_is_ignored() -> None:
    """Checkpoints of muon with consensus="outer" held one; the run goes on as without it."""
    toy, opt, state = checkpoint("muon", consensus="outer")
    other = Toy()
    with torch.no_grad():
        for name, p in other.params.items():
            p.copy_(toy.params[name])
    resumed = CurvaDion(other.groups(), local_update="muon", **OUTER)
    for number, name in enumerate(toy.params):
        if name in toy.matrices:
            state["state"][number]["Q"] = torch.full((3, 2), math.nan)  # of any shape
    resumed.load_state_dict(state)
    assert with_Q(other, resumed) == {False}
    for run in ((toy, opt), (other, resumed)):
        train(*run, range(3, 6))
    assert digest(toy.params.values()) == digest(other.params.values())


def test_a_right_factor_that_nobody_has_moved_starts_at_its_first_value() -> None:
    """A checkpoint without Q, loaded where synchronized steps need one, also over one that has moved."""
    _, _, state = checkpoint("muon", consensus="outer")
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS | {"local_update": "muon"})
    first = {name: opt.state[toy.params[name]]["Q"].clone() for name in toy.matrices}
    train(toy, opt, range(3))
    opt.load_state_dict(state)
    for name, Q in first.items():
        assert torch.equal(opt.state[toy.params[name]]["Q"], Q), name
    train(toy, opt, range(3, 6))


@pytest.mark.parametrize("lacks", ["checkpoint", "optimizer"])
def test_a_right_factor_that_the_saved_rule_uses_must_be_on_both_sides(lacks: str) -> None:
    _, _, state = checkpoint("dion", consensus="outer")
    opt = CurvaDion(Toy().groups(), **OUTER | {"local_update": "muon" if lacks == "optimizer" else "dion"})
    if lacks == "checkpoint":
        for values in state["state"].values():
            values.pop("Q", None)
    with pytest.raises(ValueError, match=r"missing \['Q'\]|local_update"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("saved", ["muon", "dion2"])
def test_a_checkpoint_of_another_rank_is_refused_without_a_right_factor_too(saved: str) -> None:
    _, _, state = checkpoint(saved, consensus="outer", rank_fraction=1.0)
    opt = CurvaDion(Toy().groups(), local_update=saved, **OUTER)
    with pytest.raises(ValueError, match="rank_fraction"):
        opt.load_state_dict(state)


def test_a_group_may_not_turn_to_a_rule_that_needs_a_right_factor() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), local_update="gradient", **OUTER)
    opt.param_groups[0]["local_update"] = "muon"
    train(toy, opt, range(1))
    opt.param_groups[0]["local_update"] = "dion"
    with pytest.raises(ValueError, match="local_update"):
        train(toy, opt, range(1, 2))


def test_a_group_that_has_turned_from_its_rule_leaves_its_state_behind_when_another_is_added() -> None:
    for local_update in ("dion", "normuon"):
        toy = Toy()
        opt = CurvaDion(toy.groups(), local_update=local_update, **OUTER)
        train(toy, opt, range(2))
        opt.param_groups[0]["local_update"] = "muon"
        opt.synchronize()
        name = next(iter(toy.matrices))
        momentum = opt.state[toy.params[name]]["momentum"].clone()
        opt.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(4, 3)))]})
        assert with_Q(toy, opt) == {False}
        assert torch.equal(opt.state[toy.params[name]]["momentum"], momentum)


@pytest.mark.parametrize("saved_with_Q", [False, True], ids=["new", "old"])
def test_distributed_checkpoints_without_a_right_factor(tmp_path: Path, saved_with_Q: bool) -> None:
    """Saved and loaded by torch's own tools, on 2 replicas of 2 shards; one of earlier code has a Q that is
    left where it is."""

    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        replica = replicate.get_local_rank()

        def build() -> tuple[TinyGPT, CurvaDion]:
            torch.manual_seed(0)
            model = TinyGPT()
            fully_shard(model, mesh=mesh)
            return model, CurvaDion(model.groups(), replicate_mesh=replicate, local_update="muon", **OUTER)

        def step(model: TinyGPT, opt: CurvaDion, number: int) -> None:
            opt.zero_grad()
            model.loss(number, replica).backward()
            opt.step()

        model, opt = build()
        for number in range(3):
            step(model, opt, number)
        opt.synchronize()
        model_state, opt_state = get_state_dict(model, opt)
        if saved_with_Q:
            unused = {"Q": torch.full((3, 2), math.nan)}
            for name, values in opt_state["state"].items():
                if "momentum" in values:
                    opt_state["state"][name] = {**values, **unused}
        dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=tmp_path)
        resumed_model, resumed = build()
        model_state, opt_state = get_state_dict(resumed_model, resumed)
        state = {"model": model_state, "optimizer": opt_state}
        dcp.load(state, checkpoint_id=tmp_path)
        set_state_dict(
            resumed_model, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        for number in range(3, 6):
            step(model, opt, number)
            step(resumed_model, resumed, number)
        keys = {key for values in resumed.state.values() for key in values}
        return keys, state_digest(opt), state_digest(resumed)

    for keys, one, other in run_ranks(4, worker):
        assert "Q" not in keys
        assert one == other
