"""A rank that ends, stops or does something else is told on all the others, by name and in time.

A few of the faults of faults.py, which tries all of them; some random runs of fuzz.py, which makes any
number; and that docs/failures.md quotes the errors as they are."""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import faults
import pytest
import torch
import torch.distributed as dist
from faults import Fault, attempt
from fuzz import fuzz
from support.faults import Reporter, run_faulty
from support.models import Toy, grid
from support.ranks import GROUP_TIMEOUT, run_ranks
from torch.distributed.constants import default_pg_timeout

from curvadion import CurvaDion, NonFiniteError
from curvadion.sharding.lost import LostRankError, Place, explained, meet, timeout_of

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 5.0


def fault(name: str) -> Fault:
    return next(fault for fault in faults.FAULTS if fault.name == name)


@pytest.mark.parametrize(
    ("name", "mode", "shape", "missing"),
    [
        ("SIGKILL in the gate", "default", (2, 2), "[3]"),
        ("SIGSTOP in a synchronized step, at pseudo_gradients", "low", (2, 1), "[1]"),
        ("SIGSTOP while outer_delay is under way", "delay", (2, 1), "[1]"),
        ("SIGSTOP while outer_delay is under way", "fragments under way", (2, 1), "[1]"),
    ],
)
def test_survivors_say_who_is_missing(name: str, mode: str, shape: tuple[int, int], missing: str) -> None:
    """Also over a group of a DeviceMesh, which has torch's 30 minutes."""
    *others, gone = attempt(fault(name), mode, shape, TIMEOUT)
    assert gone.kind in ("killed", "stopped")
    for told in others:
        assert told.kind == "LostRankError", told
        assert told.seconds < TIMEOUT + 20, "and not after 30 minutes"
        assert "in step() after" in told.message and "load the last checkpoint" in told.message
    assert f"nothing was heard of {missing}" in others[-1].message


def test_ranks_of_a_replica_that_do_different_things_are_told() -> None:
    """Of two, one leaves out a step, and is at synchronize() while the other takes the last."""
    for told in attempt(fault("a rank skips step()"), "default", (1, 2), TIMEOUT):
        assert told.kind == "LostRankError", told
        assert "in step() after 19 steps" in told.message or "in synchronize() after 19 steps" in told.message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a group added on one rank", (2, 1)),
        ("a parameter frozen and synchronize() on one rank", (2, 1)),
        ("a replica skips a step(), then consensus()", (2, 1)),
        ("version differs on one rank", (1, 2)),
    ],
)
def test_replicas_that_do_different_things_are_told_at_once(name: str, shape: tuple[int, int]) -> None:
    for told in attempt(fault(name), "default", shape, 60.0):
        assert told.kind == "ReplicaMismatchError", told


def test_a_load_on_one_replica_meets_the_step_of_the_other() -> None:
    other, own = attempt(fault("a state loaded on one rank"), "default", (2, 1), 60.0)
    assert other.kind == "ReplicaMismatchError", other
    assert own.kind == "ValueError" and "by all ranks or by none" in own.message, own


def test_a_load_on_one_rank_of_a_replica_is_told() -> None:
    for told in attempt(fault("a state loaded on one rank"), "default", (1, 2), TIMEOUT):
        assert told.kind == "LostRankError", told
    assert "in load_state_dict() after 5 steps" in told.message


def test_a_closure_that_raises_is_told_to_all_replicas() -> None:
    other, own = attempt(fault("a closure raises on one rank, which lives on"), "default", (2, 1), 60.0)
    assert own.kind == "ZeroDivisionError"
    assert other.kind == "RuntimeError" and "another rank could not do its part" in other.message


def test_what_a_rank_raised_is_quoted_by_those_that_miss_it() -> None:
    other, own = attempt(fault("a closure raises on one rank, which ends"), "default", (1, 2), 60.0)
    assert own.kind == "ZeroDivisionError"
    assert other.kind == "LostRankError"
    assert "rank 1 was in step() after 5 steps, and raised ZeroDivisionError: this batch" in other.message


def healed_then_killed(reporter: Reporter) -> None:
    """A NaN on rank 1, a load everywhere, a step; then rank 1 is gone."""
    replicate, _ = grid(2, 1)
    toy, rank = Toy(), dist.get_rank()
    opt = CurvaDion(toy.groups(), replicate_mesh=replicate, max_local_steps=0)
    saved = copy.deepcopy(opt.state_dict())
    toy.set_gradients(0, rank)
    if rank == 1:
        param = toy.params[next(iter(toy.matrices))]
        param.grad = torch.full_like(param, math.nan)
    with pytest.raises(NonFiniteError):
        opt.step()
    opt.discard_divergence()
    opt.load_state_dict(saved)
    for step in range(3):
        if rank == 1 and step == 1:
            reporter.fault()
            os.kill(os.getpid(), signal.SIGKILL)
        toy.set_gradients(step, rank)
        opt.step()


def test_what_a_rank_raised_and_was_healed_from_is_no_sign_of_life() -> None:
    told, gone = run_faulty(2, healed_then_killed, timeout=60.0, deadline=60.0)
    assert gone.kind == "killed", gone
    assert told.kind == "LostRankError", told
    assert "nothing was heard of [1]" in told.message and "NonFiniteError" not in told.message


def timeouts() -> tuple[list[timedelta | None], list[str]]:
    replicate, mesh = grid(2, 2)
    theirs = timeout_of(mesh.get_group())
    set_by_hand = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=7))
    for group in (replicate, set_by_hand):
        CurvaDion(Toy(mesh if group is replicate else None).groups(), replicate_mesh=group)
    started, errors = time.monotonic(), []
    if dist.get_rank() < 2:
        try:  # the others never come; what torch waits for is the job's timeout, here a short one
            group = dist.group.WORLD
            assert group is not None
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
            meet(Place(), [0, 1, 2, 3], "a test")
        except LostRankError as error:
            errors = [str(error)]
        assert time.monotonic() - started < 30
    return [theirs, *map(timeout_of, (replicate.get_group(), mesh.get_group(), set_by_hand))], errors


def test_groups_of_a_mesh_get_the_timeout_of_the_job_and_others_keep_their_own() -> None:
    job = timedelta(seconds=GROUP_TIMEOUT)
    for rank, (found, errors) in enumerate(run_ranks(4, timeouts)):
        assert found == [default_pg_timeout, job, job, timedelta(seconds=7)]
        assert len(errors) == (rank < 2)
        assert all("these did not come: [2, 3]" in error for error in errors)


def test_errors_that_no_backend_raised_are_left_alone() -> None:
    for error in (RuntimeError("shapes differ"), torch.OutOfMemoryError("out of memory")):
        assert explained(error, Place(), "the all_reduce", [0, 1]) is None
    assert explained(RuntimeError("gloo/transport: timed out"), Place(), "the all_reduce", []) is None, (
        "threads of one process"
    )


def test_random_runs_agree(complete: bool) -> None:
    """The same seeds every time; `python tests/fuzz.py` takes new ones."""
    done, wrong = fuzz(0, 7 if complete else 4, math.inf)
    assert not wrong, wrong
    assert done["run"]


def test_the_page_of_failures_quotes_errors_as_they_are() -> None:
    sources = [path.read_text() for path in sorted((ROOT / "curvadion").rglob("*.py"))]
    # Neighbouring strings are one; what is filled in is any text.
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    text = re.sub(r"\{[^{}]*\}", "...", text)
    page = (ROOT / "docs" / "failures.md").read_text()
    quoted = re.findall(r"`(?:\w+Error): ([^`]+?)`", page)
    assert len(quoted) > 10
    for sentence in quoted:
        for part in filter(None, (part.strip(" ,;") for part in sentence.split("..."))):
            assert part in text, f"no error says {part!r}"
