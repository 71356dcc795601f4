"""A step that every rank refuses has changed nothing: mended, it is taken, as if nothing had happened. Where
one rank alone refuses, the momenta of the others hold its gradients, and all want a checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, grid, outcome, state_digest
from support.ranks import run_ranks

from curvadion import LOW_COMMUNICATION, CurvaDion

Spoil = Callable[[Toy, CurvaDion], Callable[[], None]]


def put(option: str, value: Any, group: int = 0) -> Spoil:
    def spoil(toy: Toy, opt: CurvaDion) -> Callable[[], None]:
        before = opt.param_groups[group][option]
        opt.param_groups[group][option] = value
        return lambda: opt.param_groups[group].update({option: before})

    return spoil


def sparse_gradient(toy: Toy, opt: CurvaDion) -> Callable[[], None]:
    p = toy.params["plain.weight"]
    before = p.grad
    assert before is not None
    p.grad = before.to_sparse()
    return lambda: setattr(p, "grad", before)


CAUSES: dict[str, Spoil] = {
    "lr too large": put("lr", 200.0),
    "lr too large for AdamW": put("lr", 200.0, group=1),
    "a lr that is none": put("lr", math.nan),
    "another rank": put("rank_fraction", 1.0),
    "a sparse gradient": sparse_gradient,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "average": {"tau": 0.3, "local_update": "muon"},
    "outer": LOW_COMMUNICATION(max_local_steps=2, gate_every=1, outer_momentum=0.5),
    "delay": LOW_COMMUNICATION(max_local_steps=3, gate_every=1, outer_delay=2, outer_fragments=2),
    "drift": {"gate": "drift", "tau": 1e-3, "local_update": "muon"},
}
LAG = {"lag": {"tau": math.inf, "local_update": "muon", "gate_lag": 1}}
LAYOUTS = {"one process": (1, 1), "shards": (1, 2), "replicas": (2, 1), "both": (2, 2)}
STEPS = 8


def build(layout: str, options: str) -> tuple[Toy, CurvaDion, int]:
    replicas, shards = LAYOUTS[layout]
    replicate, mesh = grid(replicas, shards) if dist.is_initialized() else (None, None)
    toy = Toy(mesh if shards > 1 else None)
    plain = Toy(None, matrices={}, dense={"plain.weight": (5, 3)})
    toy.params |= plain.params
    toy.dense = toy.dense | plain.dense
    place = toy.place
    toy.place = lambda name, x: x.clone() if name == "plain.weight" else place(name, x)  # type: ignore[method-assign]
    opt = CurvaDion(toy.groups(), replicate_mesh=replicate, check_every=3, **(OPTIONS | LAG)[options])
    return toy, opt, replicate.get_local_rank() if replicate is not None else 0


def trained(layout: str, options: str, cause: str | None, refused: tuple[int, ...]) -> tuple[str, list[Any]]:
    toy, opt, replica = build(layout, options)
    told = []
    for step in range(STEPS):
        toy.set_gradients(step, replica)
        if cause and step in refused:
            before = state_digest(opt)
            mend = CAUSES[cause](toy, opt)
            for _ in range(2):  # refused as often as it is called
                error, message = outcome(opt.step)
                told.append((error, message, state_digest(opt) == before))
            mend()
        opt.step()
    opt.synchronize()
    return state_digest(opt), told


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_all_ranks_refuse_can_be_mended(layout: str, options: str) -> None:
    def worker() -> Any:
        undisturbed, _ = trained(layout, options, None, ())
        return undisturbed, {cause: trained(layout, options, cause, (0, 2, 5)) for cause in CAUSES}

    for undisturbed, found in run_ranks(math.prod(LAYOUTS[layout]), worker):
        for cause, (digest, told) in found.items():
            assert {error for error, _, _ in told} == {"ValueError"}, (cause, told)
            assert all(untouched for *_, untouched in told), (cause, told)
            assert digest == undisturbed, cause


@pytest.mark.parametrize("cause", ["lr too large", "a sparse gradient"])
@pytest.mark.parametrize("layout", ["shards", "replicas", "both"])
def test_what_one_rank_refuses_wants_a_checkpoint_on_all(layout: str, cause: str) -> None:
    def worker() -> Any:
        toy, opt, replica = build(layout, "outer")
        toy.set_gradients(0, replica)
        opt.step()
        opt.synchronize()
        saved = copy.deepcopy(opt.state_dict())
        for step in (1, 2):
            toy.set_gradients(step, replica)
            mend = CAUSES[cause](toy, opt) if step == 2 and dist.get_rank() == 1 else lambda: None
            first = outcome(opt.step)
            mend()
        then = outcome(opt.step)
        opt.discard_divergence()
        opt.load_state_dict(saved)
        return first, then, outcome(opt.step)[0]

    for rank, (first, then, after) in enumerate(run_ranks(math.prod(LAYOUTS[layout]), worker)):
        assert first[0] == ("ValueError" if rank == 1 else "RuntimeError"), (rank, first)
        assert "load the last checkpoint" in then[1], (rank, then)
        assert after in ("ok", "ReplicaMismatchError"), "parameters were not loaded"


@pytest.mark.parametrize("call", ["synchronize", "consensus", "load"])
def test_a_step_that_is_refused_meets_a_replica_that_is_elsewhere(call: str) -> None:
    """Both raise, and neither waits for the other."""

    def worker() -> tuple[str, str]:
        toy, opt, replica = build("replicas", "outer")
        toy.set_gradients(0, replica)
        opt.step()
        opt.synchronize()
        saved = copy.deepcopy(opt.state_dict())
        toy.set_gradients(1, replica)
        opt.step()
        if replica == 0:
            CAUSES["lr too large"](toy, opt)
            toy.set_gradients(2, replica)
            return outcome(opt.step)
        if call == "load":
            opt.discard_divergence()
            return outcome(lambda: opt.load_state_dict(saved))
        return outcome(opt.synchronize if call == "synchronize" else opt.consensus().__enter__)

    refused, elsewhere = run_ranks(2, worker)
    assert refused[0] == "ValueError" and "lr * weight_decay" in refused[1], refused
    assert elsewhere[0] != "ok" and "LostRankError" not in elsewhere[0], elsewhere


@pytest.mark.parametrize("call", ["synchronize", "consensus"])
def test_with_gate_lag_nobody_asks_whether_all_refuse(call: str) -> None:
    """Who refuses reads that in the step after; who is elsewhere does at once, and must not wait for it."""

    def worker() -> list[tuple[str, str]]:
        toy, opt, replica = build("replicas", "lag")
        toy.set_gradients(0, replica)
        opt.step()
        opt.synchronize()
        saved = copy.deepcopy(opt.state_dict())
        if replica == 0:
            CAUSES["lr too large"](toy, opt)
            toy.set_gradients(1, replica)
            return [outcome(opt.step) for _ in range(3)]
        elsewhere = opt.synchronize if call == "synchronize" else opt.consensus().__enter__
        return [outcome(elsewhere), outcome(lambda: opt.load_state_dict(saved))]

    refused, elsewhere = run_ranks(2, worker)
    assert [error for error, _ in refused] == ["ok", "ValueError", "RuntimeError"], refused
    assert "load the last checkpoint" in refused[-1][1], refused
    assert [error for error, _ in elsewhere] == ["RuntimeError"] * 2, elsewhere
    assert all("another rank could not do its part" in message for _, message in elsewhere), elsewhere


@pytest.mark.parametrize("how", ["raise", "skip", "GradScaler"])
def test_a_step_that_ends_early_wants_a_checkpoint(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its momenta hold its gradients, and parameters have not moved: also where non-finite steps are skipped,
    whose momenta swallow gradients after the gate's answer."""

    def out_of_luck(*args: Any, **kwargs: Any) -> None:
        raise OSError("out of luck")

    toy = Toy(None)
    opt = CurvaDion(toy.groups(), on_nonfinite="raise" if how == "raise" else "skip")
    if how == "GradScaler":
        opt = CurvaDion(toy.groups())
        opt.grad_scale, opt.found_inf = torch.ones(()), torch.zeros(1)  # type: ignore[attr-defined]
    toy.set_gradients(0, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    with monkeypatch.context() as context:
        context.setattr(opt._consensus, "step", out_of_luck)
        toy.set_gradients(1, 0)
        assert outcome(opt.step)[0] == "OSError"
    error, message = outcome(opt.step)
    assert error == "RuntimeError" and "did not come to its end" in message, message
    opt.load_state_dict(saved)
    opt.step()
