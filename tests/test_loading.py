"""What load_state_dict refuses, before anything changes and with a sentence; and what it puts in order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import state_digest
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from curvadion import LOW_COMMUNICATION, CurvaDion


def build(names: tuple[str, ...] = ("a", "b"), **options: Any) -> CurvaDion:
    """Two matrices of one shape, and a vector."""
    torch.manual_seed(0)
    matrices = [(name, nn.Parameter(torch.randn(8, 8))) for name in names]
    vector = nn.Parameter(torch.ones(8))
    groups = [{"params": matrices}, {"params": [("n", vector)], "algorithm": "adamw", "lr": 1e-3}]
    return CurvaDion(groups, **options)


def train(opt: CurvaDion, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        opt.step()


def saved(steps: int = 4, **options: Any) -> dict[str, Any]:
    opt = build(**options)
    train(opt, range(steps))
    opt.synchronize()
    return copy.deepcopy(opt.state_dict())


def state_of(state: dict[str, Any], number: int, key: str) -> Tensor:
    value = state["state"][number][key]
    assert isinstance(value, Tensor)
    return value


def fill(number: int, key: str, value: float) -> Callable[[dict[str, Any]], None]:
    """Spoil one element."""

    def spoil(state: dict[str, Any]) -> None:
        tensor = state_of(state, number, key)
        tensor.view(-1)[0] = value

    return spoil


def put(number: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        state["state"][number][key] = value

    return spoil


def option(key: str, value: Any, group: int = 0) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        state["param_groups"][group][key] = value

    return spoil


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        place: Any = state
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return spoil


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "NaN in a momentum": (fill(0, "momentum", math.nan), "momentum of 'a'"),
    "infinity in a momentum": (fill(1, "momentum", math.inf), "momentum of 'b'"),
    "NaN in Q": (fill(0, "Q", math.nan), "Q of 'a'"),
    "NaN in a first moment": (fill(2, "exp_avg", math.nan), "exp_avg of 'n'"),
    "infinity in a second moment": (fill(2, "exp_avg_sq", math.inf), "exp_avg_sq of 'n'"),
    "a negative second moment": (fill(2, "exp_avg_sq", -1.0), "none negative"),
    "NaN in the norm that the gate saw": (fill(0, "last_norm", math.nan), "last_norm of 'a'"),
    "NaN steps": (fill(0, "step", math.nan), "step of 'a'"),
    "negative steps": (fill(0, "step", -3.0), "whole numbers"),
    "half a step": (fill(2, "step", 1.5), "whole numbers"),
    "more steps than there are": (fill(0, "step", 1e30), "whole numbers"),
    "local steps": (fill(0, "local_steps", math.inf), "local_steps of 'a'"),
    "steps in words": (put(0, "step", "three"), "real numbers"),
    "steps of nothing": (put(0, "step", None), "real numbers"),
    "a complex momentum": (put(0, "momentum", torch.zeros(8, 8, dtype=torch.complex64)), "real numbers"),
    "an integer momentum": (put(0, "momentum", torch.zeros(8, 8, dtype=torch.int64)), "real numbers"),
    "a momentum of another shape": (put(0, "momentum", torch.zeros(8, 4)), "same shape"),
    "no momentum": (drop("state", 0, "momentum"), "missing"),
    "something else beside": (put(0, "variance", torch.zeros(8, 8)), "unknown"),
    "no state of one": (drop("state", 1), "missing"),
    "no state": (drop("state"), "'state' and 'param_groups'"),
    "no groups": (drop("param_groups"), "'state' and 'param_groups'"),
    "a group without parameters": (drop("param_groups", 0, "params"), "'state' and 'param_groups'"),
    "a group less": (drop("param_groups", 1), "group"),
    "another rank": (option("rank_fraction", 0.5), "rank_fraction"),
    "maximize": (option("maximize", True), "maximize"),
    "an unknown option": (option("momentun", 0.9), "momentun"),
    "an option of all groups": (option("max_local_steps", 3), "max_local_steps"),
    "an option out of range": (option("lr", -1.0), "lr must be"),
    "another algorithm": (option("algorithm", "lion", 1), "algorithm"),
    "another local rule": (option("local_update", "muon"), "local_update"),
    "a gate that never opens": (option("tau", math.inf), "tau"),
    "another name": (option("param_names", ["a", "c"]), r"lacks \['b'\] and has \['c'\]"),
    "one name twice": (option("param_names", ["a", "a"]), r"lacks \['b'\]"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_checkpoint_is_refused_and_nothing_changes(what: str) -> None:
    state, (spoil, message) = saved(), SPOILED[what]
    spoil(state)
    opt = build()
    train(opt, range(2))
    opt.synchronize()
    before, options = state_digest(opt), copy.deepcopy([{**g, "params": 0} for g in opt.param_groups])
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)
    assert state_digest(opt) == before
    assert [{**g, "params": 0} for g in opt.param_groups] == options
    train(opt, range(2, 4))


def test_an_optimizer_of_another_kind_is_refused() -> None:
    for settings, into in (
        ({}, LOW_COMMUNICATION),
        (LOW_COMMUNICATION, {}),
        (LOW_COMMUNICATION, {"tau": 0.2}),
    ):
        with pytest.raises(ValueError, match="local_update"):
            build(**into).load_state_dict(saved(**settings))
    muon = {"local_update": "muon"}
    with pytest.raises(ValueError, match="never opens by itself"):
        build(**muon).load_state_dict(saved(**muon, tau=math.inf))


def test_parameters_are_found_by_their_names() -> None:
    opt = build()
    train(opt, range(4))
    opt.synchronize()
    other = build(("b", "a"))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    (a, b), (b2, a2) = opt.param_groups[0]["params"], other.param_groups[0]["params"]
    for mine, theirs in ((a, a2), (b, b2)):
        for key, value in opt.state[mine].items():
            assert torch.equal(value, other.state[theirs][key]), key
    assert other.param_groups[0]["param_names"] == ["b", "a"]


def test_names_with_the_prefixes_of_wrappers_are_the_same_names() -> None:
    state = saved()
    state["param_groups"][0]["param_names"] = ["module._orig_mod.b", "module._orig_mod.a"]
    opt = build()
    opt.load_state_dict(state)
    [a, b] = opt.param_groups[0]["params"]
    assert torch.equal(opt.state[a]["momentum"], state_of(state, 1, "momentum"))
    assert torch.equal(opt.state[b]["momentum"], state_of(state, 0, "momentum"))


def test_without_names_the_order_counts() -> None:
    state = saved()
    del state["param_groups"][0]["param_names"]
    opt = build(("b", "a"))
    opt.load_state_dict(state)
    assert torch.equal(
        opt.state[opt.param_groups[0]["params"][0]]["momentum"], state_of(state, 0, "momentum")
    )


@pytest.mark.parametrize("flat", [False, True])
def test_names_stay_with_their_parameters_where_torch_puts_the_state_in_order(flat: bool) -> None:
    """torch.distributed.checkpoint brings parameters into the optimizer's order, but not the saved names."""

    def holder(opt: CurvaDion) -> nn.Module:
        module = nn.Module()
        for group in opt.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                module.register_parameter(name, p)
        return module

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    opt, other, third = build(("a", "b")), build(("b", "a")), build(("a", "b"))
    train(opt, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(holder(opt), opt, options=options))
    set_optimizer_state_dict(holder(other), other, state, options=options)
    assert other.param_groups[0]["param_names"] == ["b", "a"]
    third.load_state_dict(copy.deepcopy(other.state_dict()))
    for p, q in zip(opt.param_groups[0]["params"], third.param_groups[0]["params"], strict=True):
        assert torch.equal(opt.state[p]["momentum"], third.state[q]["momentum"])
