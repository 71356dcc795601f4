"""Saving while replicas differ, and loading elsewhere; tests/resume_matrix.py tries all modes and meshes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import Toy, outcome, state_digest
from support.ranks import run_ranks
from support.resume import Found, moves, resume
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.sharding.group import ThreadGroup
from curvadion.state.newest import load_newest, saved_steps

AVERAGE: dict[str, Any] = {"tau": math.inf, "max_local_steps": 2}


def test_what_was_saved_in_one_way_and_on_one_mesh_goes_on_in_others(tmp_path: Path) -> None:
    """Bitwise the same run on the same mesh; bitwise the same state on another. The asynchronous saves are
    written while the run takes steps, which are those of a twin that saves nothing."""

    def worker() -> list[Found]:
        return [
            resume("1 bit", "torch.save", (2, 2), tmp_path / "0"),
            resume("rate", "flat", (2, 1), tmp_path / "1"),
            resume("delay", "DCP flat", (1, 2), tmp_path / "2"),
            *moves("fragments", (4, 1), [(2, 1)], tmp_path / "3", live=False),
            *moves("1 bit", (2, 2), [(2, 2), (1, 3)], tmp_path / "4", live=True),
            *moves("on the host", (2, 1), [(1, 1)], tmp_path / "5", live=True),
            *moves("delay", (1, 2), [(4, 1)], tmp_path / "6", live=True),
            resume("residual kept", "DCP nested", (2, 2), tmp_path / "7"),
            *moves("residual kept", (2, 1), [(2, 2)], tmp_path / "8", live=True),
        ]

    for rank, found in enumerate(run_ranks(4, worker)):
        assert not [one for one in found if one.wrong], f"rank {rank}"
        assert len(found) >= 4


def test_common_state_holds_what_replicas_were_equal_in_last() -> None:
    """X_0 and U bitwise as a synchronization would have saved them there; the rest is the first replica's."""

    def replica(group: ThreadGroup) -> dict[str, Any]:
        toy = Toy()
        settings = LOW_COMMUNICATION(max_local_steps=3, outer_bits=32, outer_momentum=0.5)
        opt = CurvaDion(toy.groups(), replicate_mesh=group, **settings)

        def train(steps: range) -> None:
            for step in steps:
                toy.set_gradients(step, group.rank)
                opt.step()

        train(range(5))  # synchronized in steps 0 and 4
        synchronized = toy.whole()
        momentum = {name: opt.state[p]["outer_momentum"].clone() for name, p in toy.params.items()}
        train(range(5, 7))
        own, parameters = state_digest(opt), toy.whole()
        with opt.common_state():
            inside, state = toy.whole(), copy.deepcopy(opt.state_dict())
            refused = [outcome(call) for call in (opt.step, opt.synchronize, opt.consensus().__enter__)]
            refused.append(outcome(lambda: opt.load_state_dict(state)))
        assert all(torch.equal(parameters[name], toy.params[name]) for name in parameters)
        assert state_digest(opt) == own
        for kind, message in refused:
            assert kind == "RuntimeError" and "inside common_state()" in message, message
        for number, name in enumerate(toy.params):
            values = state["state"][number]
            assert torch.equal(inside[name], synchronized[name])
            assert not torch.equal(inside[name], parameters[name])
            assert torch.equal(values["outer_momentum"], momentum[name])
            assert (values["step"], values["local_steps"], values["synchronized_steps"]) == (7, 0, 2)
            has_own = values.keys() & {"momentum", "exp_avg", "exp_avg_sq", "last_norm"}
            assert bool(has_own) == (group.rank == 0), "one replica's own, with which all go on"
        return {name: value.clone() for name, value in inside.items()}

    one, other = ThreadGroup.run(2, replica)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("consensus", ["average", "none"])
def test_common_state_says_what_to_do_where_nobody_keeps_it(consensus: str) -> None:
    """On every replica alike, and before anything is touched; right after a synchronized step it is there."""

    def replica(group: ThreadGroup) -> list[tuple[str, str]]:
        toy = Toy()
        opt = CurvaDion(toy.groups(), replicate_mesh=group, consensus=consensus, **AVERAGE)
        told = []
        for step in range(3):  # synchronized, local, local
            toy.set_gradients(step, group.rank)
            opt.step()
            before = state_digest(opt)

            def look() -> None:
                with opt.common_state():
                    opt.state_dict()

            told.append(outcome(look))
            assert state_digest(opt) == before
        assert not opt.keeps_common_state
        return told

    told, other = ThreadGroup.run(2, replica)
    assert told == other
    assert told[0][0] == ("ok" if consensus == "average" else "RuntimeError")
    for kind, message in told[1:]:
        assert kind == "RuntimeError"
        assert "right after a synchronized step" in message and "consensus='outer'" in message


def test_one_replica_saves_its_state_inside_common_state() -> None:
    """What `state_dict()` is without outer steps; X_0 with them, and nothing is settled."""
    toy = Toy()
    opt = CurvaDion(toy.groups(), local_update="muon", **AVERAGE)
    toy.set_gradients(0, 0)
    opt.step()
    assert opt.keeps_common_state
    with opt.common_state():
        inside = opt.state_dict()
    for number, values in opt.state_dict()["state"].items():
        assert inside["state"][number].keys() == values.keys()
        assert all(torch.equal(inside["state"][number][key], value) for key, value in values.items())


def test_common_state_is_refused_after_a_failed_step() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **LOW_COMMUNICATION)
    toy.set_gradients(0, 0)
    next(iter(toy.params.values())).grad[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(RuntimeError):
        opt.step()
    with pytest.raises(RuntimeError, match="load the last checkpoint"), opt.common_state():
        pass


def test_an_error_inside_common_state_gives_the_parameters_back() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **LOW_COMMUNICATION)
    for step in range(2):
        toy.set_gradients(step, 0)
        opt.step()
    before = state_digest(opt)
    with pytest.raises(OSError, match="disk"), opt.common_state():
        raise OSError("disk full")
    assert state_digest(opt) == before
    opt.step()


def test_all_ranks_pass_over_what_one_cannot_load(tmp_path: Path) -> None:
    """Before the optimizer's part, in it, or after it; and folders that are no checkpoints are none."""
    for step in (10, 20, 30, 40, 50):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / ".metadata").touch()
    for name in ("step-60", "step-70.old/.metadata", "old-step-80/.metadata", "step-x/.metadata"):
        (tmp_path / name).mkdir(parents=True)

    def worker() -> tuple[int | None, list[str], bool, tuple[str, str], int | None]:
        rank, lines = dist.get_rank(), []
        p = torch.nn.Parameter(torch.ones(4, 3))
        opt = CurvaDion([p], replicate_mesh=dist.group.WORLD)
        good = copy.deepcopy(opt.state_dict())
        bad = copy.deepcopy(good)
        momentum: Tensor = bad["state"][0]["momentum"]
        momentum[0, 0] = math.nan

        def load(step: int) -> None:
            if (step, rank) == (50, 1):
                raise OSError("the model's file is cut")
            opt.load_state_dict(bad if (step, rank) == (40, 0) else good)
            if (step, rank) == (30, 1):
                raise KeyError("no schedule")

        steps = saved_steps(tmp_path) if rank == 0 else []  # another rank may see less
        step = load_newest(steps, load, opt.loading, lines.append)
        none = outcome(lambda: load_newest([50, 40], load, opt.loading, lines.append))
        return (
            step,
            lines,
            bool(opt.state[p]["momentum"].isfinite().all()),
            none,
            load_newest([], load, opt.loading),
        )

    for rank, (step, lines, finite, none, empty) in enumerate(run_ranks(2, worker)):
        assert step == 20 and finite and empty is None
        assert none[0] == "RuntimeError" and "none of 2 is" in none[1]
        assert len(lines) == (5 if rank == 0 else 0)
        if rank == 0:
            for line, words in zip(
                lines, ("rank 1: OSError", "rank 0: ValueError", "rank 1: KeyError"), strict=False
            ):
                assert words in line, line


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_refused_checkpoint_that_was_read_into_the_optimizer_itself_is_not_trained_on(
    tmp_path: Path,
) -> None:
    """torch.distributed.checkpoint reads into the tensors of `state_dict()`, before anybody can look."""
    toy = Toy()
    model = torch.nn.ParameterDict({name.replace(".", "_"): p for name, p in toy.params.items()})
    opt = CurvaDion([{"params": [(n, p) for n, p in model.named_parameters() if p.ndim == 2]}], **AVERAGE)

    def steps(count: int) -> None:
        for step in range(count):
            toy.set_gradients(step, 0)
            opt.step()

    def read(name: str) -> None:
        state = {"optimizer": get_optimizer_state_dict(model, opt)}
        dcp.load(state, checkpoint_id=tmp_path / name)
        set_optimizer_state_dict(model, opt, state["optimizer"])

    steps(2)
    state = get_optimizer_state_dict(model, opt)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "good")
    spoiled = copy.deepcopy(state)
    next(iter(spoiled["state"].values()))["momentum"][0, 0] = math.nan
    dcp.save({"optimizer": spoiled}, checkpoint_id=tmp_path / "bad")
    renamed = copy.deepcopy(state)
    renamed["state"]["another"] = renamed["state"].pop(next(iter(renamed["state"])))
    dcp.save({"optimizer": renamed}, checkpoint_id=tmp_path / "renamed")
    steps(1)
    before = state_digest(opt)
    with pytest.raises(CheckpointException, match="Missing key"):
        read("renamed")
    assert state_digest(opt) == before
    steps(1)
    with pytest.raises(ValueError, match="finite numbers"):
        read("bad")
    with pytest.raises(RuntimeError, match="own state"):
        steps(1)
    read("good")
    steps(1)
