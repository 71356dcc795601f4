"""What must be the same in all replicas is compared where it must be, and nothing broken crosses to
others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, grid, local, outcome
from support.ranks import run_ranks

from curvadion import LOW_COMMUNICATION, CurvaDion

SEND: dict[str, dict[str, Any]] = {
    "low": LOW_COMMUNICATION,
    "delay": LOW_COMMUNICATION(outer_delay=2, max_local_steps=3),
    "fragments": LOW_COMMUNICATION(outer_fragments=2, max_local_steps=3),
    "kept": LOW_COMMUNICATION(outer_residual_kept=0.5, max_local_steps=3),
    "asked": {"consensus": "outer", "tau": 0.05},
    "average": {"tau": 0.05, "max_local_steps": 3},
    "lag": {"tau": 0.05, "max_local_steps": 3, "gate_lag": 1},
}


def train(toy: Toy, opt: CurvaDion, steps: range, replica: int) -> None:
    for step in steps:
        toy.set_gradients(step, replica)
        opt.step()


def nan_in_a_parameter(mode: str, on_nonfinite: str, place: str, value: float) -> list[Any]:
    """On one rank of four, in a place of which no gradient tells."""
    replicate, mesh = grid(2, 2)
    replica = replicate.get_local_rank()
    toy = Toy(mesh)
    opt = CurvaDion(toy.groups(), replicate_mesh=replicate, on_nonfinite=on_nonfinite, **SEND[mode])
    train(toy, opt, range(5), replica)
    if dist.get_rank() == 3:
        with torch.no_grad():
            local(toy.params[place]).view(-1)[-1] = value
    told = outcome(lambda: train(toy, opt, range(5, 20), replica))
    met = [int((~local(p).isfinite()).sum()) for p in toy.params.values()]
    return [*told, sum(met), opt.metrics()["curvadion/skipped_steps"]]


PLACES = [("embedding.weight", math.nan), ("layers.1.weight", -math.inf)]
# Every pair of a mode, a way to go on and a place.
NAN_CASES = [
    (mode, how, *PLACES[(number + skip) % 2])
    for number, mode in enumerate(SEND)
    for skip, how in enumerate(["raise", "skip"])
]


@pytest.mark.parametrize(("mode", "on_nonfinite", "place", "value"), NAN_CASES)
def test_a_nan_in_a_parameter_stays_where_it_is(
    mode: str, on_nonfinite: str, place: str, value: float
) -> None:
    told = run_ranks(4, nan_in_a_parameter, mode, on_nonfinite, place, value)
    assert [found for _, _, found, _ in told] == [0, 0, 0, 1], "no other rank has one"
    for rank, (error, message, _, skipped) in enumerate(told):
        if on_nonfinite == "raise":
            assert error == "NonFiniteError", f"rank {rank}: {error} {message}"
            where = f"on this rank in the parameter {place}" if rank == 3 else "on another rank"
            assert where in message, f"rank {rank}: {message}"
        else:  # for ever would be too long: no skipped step mends a parameter
            assert error == ("NonFiniteError" if rank == 3 else "RuntimeError"), (
                f"rank {rank}: {error} {message}"
            )
            where = f"in the parameter {place}" if rank == 3 else "another rank could not do its part"
            assert where in message and 2 <= skipped <= 3, f"rank {rank}: {skipped}, {message}"


def nan_before_synchronize(mode: str) -> tuple[str, str]:
    replicate, mesh = grid(2, 2)
    toy = Toy(mesh)
    opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **SEND[mode])
    train(toy, opt, range(6), replicate.get_local_rank())
    if dist.get_rank() == 1:
        with torch.no_grad():
            local(toy.params["norm.weight"])[0] = math.nan
    return outcome(opt.synchronize)


@pytest.mark.parametrize("mode", ["low", "average"])
def test_synchronize_refuses_to_spread_a_nan(mode: str) -> None:
    told = run_ranks(4, nan_before_synchronize, mode)
    assert [error for error, _ in told] == ["NonFiniteError"] * 4, told
    assert "the parameter norm.weight" in told[1][1]


def corrupted(mode: str, what: str, every: int) -> tuple[str, str, int]:
    replicate, mesh = grid(2, 2)
    replica = replicate.get_local_rank()
    toy = Toy(mesh)
    momentum = {"outer_momentum": 0.5} if what == "U" else {}
    opt = CurvaDion(
        toy.groups(), replicate_mesh=replicate, check_every=every, **SEND[mode] | {"tau": math.inf} | momentum
    )
    train(toy, opt, range(9), replica)
    if dist.get_rank() == 2:
        index = list(toy.params).index("layers.1.weight")
        tensor = opt._consensus._X0[index] if what == "X_0" else opt._built.store.outer_momenta[index]
        tensor.view(-1)[0] += 0.25
    told = outcome(lambda: train(toy, opt, range(9, 40), replica))
    return *told, int(opt.metrics()["curvadion/step"])


@pytest.mark.sample
@pytest.mark.parametrize("what", ["X_0", "U"])
@pytest.mark.parametrize("mode", ["low", "delay", "fragments"])
def test_what_replicas_have_in_common_is_compared_between_synchronizations_too(mode: str, what: str) -> None:
    """Period 8 never falls on a step on which parameters are equal."""
    for error, message, steps in run_ranks(4, corrupted, mode, what, 16):
        assert error == "ReplicaMismatchError", message
        assert f"{what} of layers.1.weight" in message and "layers.0" not in message
        assert steps == 16, "at the first check"


def test_the_check_of_parameters_waits_for_a_step_on_which_they_are_equal() -> None:
    """consensus="average": a check that falls on a step after local ones is taken up later."""

    def worker() -> tuple[str, str, int]:
        replicate, _ = grid(2, 1)
        replica = replicate.get_local_rank()
        toy = Toy()
        options: dict[str, Any] = {"tau": math.inf, "max_local_steps": 3}  # S L L L S ...
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, check_every=6, **options)
        train(toy, opt, range(5), replica)
        for step in range(5, 40):
            if step in (9, 13) and replica == 1:  # right after a synchronized step
                with torch.no_grad():
                    toy.params["norm.weight"][0] += 1.0
            result = outcome(lambda s=step: train(toy, opt, range(s, s + 1), replica))
            if result[0] != "ok":
                return *result, step
        return "ok", "", 40

    for error, message, step in run_ranks(2, worker):
        assert error == "ReplicaMismatchError" and "norm.weight" in message
        assert step in (9, 13)


def uneven(mode: str, counts: tuple[int, int]) -> tuple[str, str]:
    replicate, mesh = grid(2, 2)
    replica = replicate.get_local_rank()
    toy = Toy(mesh)
    opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **SEND[mode])

    def run() -> None:
        train(toy, opt, range(counts[replica]), replica)
        opt.synchronize()

    return outcome(run)


@pytest.mark.sample
@pytest.mark.parametrize("counts", [(8, 7), (9, 8), (7, 12), (1, 2)], ids=str)
@pytest.mark.parametrize("mode", ["low", "average", "asked"])
def test_replicas_that_took_different_numbers_of_steps_all_raise(mode: str, counts: tuple[int, int]) -> None:
    """Whether the longer run meets synchronize() in a step that asks, or only there."""
    for rank, (error, message) in enumerate(run_ranks(4, uneven, mode, counts)):
        assert error == "ReplicaMismatchError", f"rank {rank}: {error} {message}"
        assert "equally often" in message or "at the same step" in message


def test_one_replica_saves_without_being_asked_to_synchronize() -> None:
    for options in (LOW_COMMUNICATION, LOW_COMMUNICATION(outer_delay=3, max_local_steps=3)):
        toy = Toy()
        opt = CurvaDion(toy.groups(), **options)
        train(toy, opt, range(6), 0)
        state = opt.state_dict()
        other = Toy()
        resumed = CurvaDion(other.groups(), **options)
        resumed.load_state_dict(state)
        assert not opt.diverged
        train(toy, opt, range(6, 9), 0)
