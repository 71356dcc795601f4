"""What load_state_dict refuses, before anything changes and with a sentence; and what it puts in order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, grid, local, outcome, state_digest
from support.ranks import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
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


def twist(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Spoil by a function whose value nobody looks at."""

    def spoil(state: dict[str, Any]) -> None:
        change(state)

    return spoil


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "NaN in a momentum": (fill(0, "momentum", math.nan), "momentum of 'a'"),
    "infinity in a momentum": (fill(1, "momentum", math.inf), "momentum of 'b'"),
    "a momentum whose norm overflows": (fill(0, "momentum", 1e25), "finite norm in float32"),
    "a momentum that overflows in all": (put(1, "momentum", torch.full((8, 8), 1e19)), "finite norm"),
    "a Q that is no Q": (fill(0, "Q", 1e38), "columns of norm 1"),
    "a Q of twos": (put(1, "Q", torch.full((8, 2), 2.0)), "columns of norm 1"),
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
    "steps in words": (put(0, "step", "three"), "dense tensors"),
    "steps of nothing": (put(0, "step", None), "dense tensors"),
    "a complex momentum": (put(0, "momentum", torch.zeros(8, 8, dtype=torch.complex64)), "dense tensors"),
    "an integer momentum": (put(0, "momentum", torch.zeros(8, 8, dtype=torch.int64)), "dense tensors"),
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
    "a name too few": (option("param_names", ["a"]), "'state' and 'param_groups'"),
    "numbers for names": (option("param_names", [1, 2]), "'state' and 'param_groups'"),
    "one parameter twice": (option("params", [0, 0]), "once, in one group"),
    "parameters that are no numbers": (option("params", [0, [1]]), "'state' and 'param_groups'"),
    "no parameters": (option("params", None), "'state' and 'param_groups'"),
    "state of a stranger": (twist(lambda s: s["state"].update({9: {}})), r"got \['9'\]"),
    "a parameter of the other group": (
        twist(lambda s: s["param_groups"][0]["params"].append(s["param_groups"][1]["params"].pop())),
        "'state' and 'param_groups'",
    ),
    "a momentum that overflows here": (put(0, "momentum", torch.ones(8, 8).double() * 1e300), "float32 too"),
    "a momentum in numpy": (put(0, "momentum", torch.ones(8, 8).numpy()), "dense tensors"),
    "a momentum in lists": (put(0, "momentum", [[0.0] * 8] * 8), "dense tensors"),
    "a sparse momentum": (put(0, "momentum", torch.ones(8, 8).to_sparse()), "dense tensors"),
    "a momentum without values": (put(0, "momentum", torch.empty(8, 8, device="meta")), "dense tensors"),
    "a step that is true": (put(0, "step", True), "dense tensors"),
    "a negative norm": (fill(0, "last_norm", -7.0), "none negative"),
    "more local steps than steps": (fill(2, "local_steps", 5.0), "no more local"),
    "more synchronized steps than steps": (fill(0, "synchronized_steps", 5.0), "no more local"),
    "a decay of more than there is": (option("lr", 101.0), r"lr \* weight_decay must be"),
    "a learning rate that is true": (option("lr", True), "lr must be"),
    "a learning rate of two": (option("lr", torch.ones(2)), "lr must be"),
    "a NaN where a schedule began": (option("initial_lr", math.nan), "initial_lr must be"),
    "a tau that is true": (option("tau", True), "tau must be"),
    "a tau that is a NaN": (option("tau", torch.tensor(math.nan)), "tau must be"),
    "betas in a tensor": (option("betas", torch.tensor([0.9, 0.95])), "betas must be"),
    "a flag that is a number": (option("nesterov", 1), "nesterov must be"),
    "a dtype in words": (option("newton_schulz_dtype", "float32"), "newton_schulz_dtype must be"),
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


@pytest.mark.parametrize("state", [None, [], 3, "checkpoint.pt", {}], ids=str)
def test_what_is_no_checkpoint_at_all_is_refused(state: Any) -> None:
    opt = build()
    before = state_digest(opt)
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        opt.load_state_dict(state)
    assert state_digest(opt) == before


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Muon"])
@pytest.mark.parametrize("stepped", [True, False])
def test_state_of_torchs_optimizers_is_refused_with_what_to_do(kind: str, stepped: bool) -> None:
    opt = build()
    like = build()
    matrices = like.param_groups[0]["params"]
    groups = [{"params": matrices}]
    if kind != "Muon":  # which takes matrices only
        groups += [{"params": like.param_groups[1]["params"]}]
    other: torch.optim.Optimizer = getattr(torch.optim, kind)(groups, lr=0.1)
    if stepped:
        for group in other.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        other.step()
    before = state_digest(opt)
    with pytest.raises(ValueError, match=r"must be one of CurvaDion.* load the model alone"):
        opt.load_state_dict(other.state_dict())
    assert state_digest(opt) == before


def test_one_rank_that_refuses_a_checkpoint_keeps_all_from_loading(tmp_path: Path) -> None:
    """Damage in one rank's shard, in its options, or another file; and shards of another layout."""

    def damage(what: str, state: dict[str, Any], rank: int) -> Any:
        values = [v for v in state["state"].values() if "exp_avg_sq" in v]
        if what == "infinity" and rank == 1:
            local(values[0]["exp_avg_sq"]).view(-1)[0] = math.inf
        if what == "option" and rank == 2:
            state["param_groups"][0]["lr"] = math.nan
        if what == "steps" and rank == 3:
            for value in state["state"].values():
                value["step"] += 1
        return None if what == "nothing" and rank == 0 else state

    def worker() -> list[tuple[str, bool, str, str]]:
        replicate, mesh = grid(2, 2)
        rank, toy, told = dist.get_rank(), Toy(mesh), []
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate)
        toy.set_gradients(0, replicate.get_local_rank())
        opt.step()
        opt.synchronize()
        torch.save(opt.state_dict(), tmp_path / f"{rank}.pt")
        toy.set_gradients(1, replicate.get_local_rank())
        opt.step()
        opt.synchronize()

        def attempt(what: str, opt: CurvaDion) -> None:
            state = damage(what, torch.load(tmp_path / f"{rank}.pt", weights_only=True), rank)
            before = state_digest(opt)
            found = outcome(lambda: opt.load_state_dict(state))
            told.append((what, state_digest(opt) == before, *found))

        for what in ("infinity", "option", "steps", "nothing"):
            attempt(what, opt)
        attempt("unsharded", CurvaDion(Toy().groups()))
        attempt("other shards", CurvaDion(Toy(grid(1, 4)[1]).groups()))
        attempt("intact", opt)
        return told

    for told in run_ranks(4, worker):
        *refused, intact = told
        assert intact == ("intact", False, "ok", "")
        for what, unchanged, kind, message in refused:
            assert (unchanged, kind) == (True, "ValueError"), f"{what}: {message}"
            assert "checkpoint" in message or "file" in message, message


OVERFLOWS = {"one rank": 1e25, "all together": 0.9 * math.sqrt(torch.finfo(torch.float32).max / 64)}


@pytest.mark.parametrize("where", OVERFLOWS)
def test_a_momentum_whose_norm_overflows_over_the_shards_is_refused_on_all_ranks(where: str) -> None:
    """One rank's part overflows, or that of none does, but their sum. It loaded, and the next step raised."""

    def worker() -> list[tuple[str, str]]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate)
        good = opt.state_dict()
        momentum = local(next(v["momentum"] for v in good["state"].values() if "momentum" in v))
        before = momentum.clone()
        if where == "all together":
            momentum.fill_(OVERFLOWS[where] * math.sqrt(64 / momentum.numel()))
        elif dist.get_rank() == 3:
            momentum.view(-1)[0] = OVERFLOWS[where]
        told = [outcome(lambda: opt.load_state_dict(good))]
        told.append(outcome(opt.step))  # state_dict() had its own memory, which is spoiled now
        momentum.copy_(before)
        told.append(outcome(lambda: opt.load_state_dict(good)))
        toy.set_gradients(0, replicate.get_local_rank())
        return [*told, outcome(opt.step)]

    for told in run_ranks(4, worker):
        kinds, messages = zip(*told, strict=True)
        assert kinds == ("ValueError", "RuntimeError", "ok", "ok"), messages
        assert "checkpoint" in messages[0] and "load another one" in messages[1]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_a_rank_that_takes_a_step_while_others_load_is_waited_for_once(sizes: tuple[int, int]) -> None:
    """It raises, and comes to no second collective of those whose load was refused."""

    def worker() -> list[tuple[str, str]]:
        replicate, mesh = grid(*sizes)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate)
        state = opt.state_dict()
        toy.set_gradients(0, replicate.get_local_rank())
        steps = dist.get_rank() == dist.get_world_size() - 1
        told = [outcome(opt.step if steps else lambda: opt.load_state_dict(state))]
        dist.barrier()
        return [*told, outcome(lambda: opt.load_state_dict(state)), outcome(opt.step)]

    *loads, steps = run_ranks(math.prod(sizes), worker)
    assert steps[0][0] == "ReplicaMismatchError" and "all ranks must be at the same step" in steps[0][1]
    for told in loads:
        assert told[0][0] == "ValueError" and "is at something else" in told[0][1]
    for told in [*loads, steps]:
        assert told[1:] == [("ok", "")] * 2


@pytest.mark.parametrize("dry", ["meta", "fake"])
def test_a_dry_run_says_why_it_refuses_a_checkpoint(dry: str) -> None:
    with FakeTensorMode() if dry == "fake" else torch.device("meta"):
        opt = CurvaDion([torch.nn.Parameter(torch.empty(6, 4))])
        with pytest.raises(ValueError, match="as many parameters in each group"):
            opt.load_state_dict({"state": {}, "param_groups": []})


def test_options_in_tensors_are_loaded_as_numbers() -> None:
    state = saved()
    state["param_groups"][0] |= {"momentum": torch.tensor(0.5), "lr": torch.tensor(0.25)}
    opt = build()
    opt.load_state_dict(state)
    group = opt.param_groups[0]
    assert type(group["momentum"]) is float and group["momentum"] == 0.5
    assert isinstance(group["lr"], Tensor), "a learning rate may be a tensor"
    train(opt, range(4, 6))


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


def test_what_was_saved_before_a_parameter_was_frozen_loads_and_the_other_way_round_after_it() -> None:
    whole, frozen = saved(), build()
    b = frozen.param_groups[0]["params"][1]
    b.requires_grad_(False)
    frozen.synchronize()
    frozen.load_state_dict(whole)
    train(frozen, range(4, 6))
    without = frozen.state_dict()
    thawed = build()
    with pytest.raises(ValueError, match="if it was frozen when that was saved, load with requires_grad=F"):
        thawed.load_state_dict(without)
    b = thawed.param_groups[0]["params"][1]
    b.requires_grad_(False)
    thawed.synchronize()
    thawed.load_state_dict(without)
    b.requires_grad_(True)
    train(thawed, range(6, 8))
    assert int(thawed.state[b]["step"]) == 2, "it has started afresh"


def test_groups_are_found_by_the_names_in_them() -> None:
    state = saved()
    state["param_groups"].reverse()
    opt, plain = build(), build()
    opt.load_state_dict(state)
    plain.load_state_dict(saved())
    assert state_digest(opt) == state_digest(plain)
    assert [group["algorithm"] for group in opt.param_groups] == ["dion", "adamw"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_of_another_dtype_is_rounded_to_that_of_the_optimizer(dtype: torch.dtype) -> None:
    state = saved()
    for values in state["state"].values():
        values |= {key: values[key].to(dtype) for key in values.keys() & {"momentum", "exp_avg", "Q"}}
    opt = build()
    opt.load_state_dict(state)
    p = opt.param_groups[0]["params"][0]
    assert opt.state[p]["momentum"].dtype == torch.float32
    assert torch.equal(opt.state[p]["momentum"], state_of(state, 0, "momentum").float())


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


@pytest.mark.parametrize("given_by", ["all ranks", "rank 0"])
def test_a_full_state_dict_is_loaded_on_shards(given_by: str) -> None:
    broadcast = given_by == "rank 0"

    def worker() -> tuple[bool, str, str]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(local_update="muon"), replicate_mesh=replicate, consensus="outer")
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
        opt.synchronize()
        other_toy = Toy(mesh, seed=1)
        other = CurvaDion(other_toy.groups(local_update="muon"), replicate_mesh=replicate, consensus="outer")
        full = StateDictOptions(full_state_dict=True, cpu_offload=broadcast, broadcast_from_rank0=False)
        state = get_optimizer_state_dict(module_of(toy), opt, options=full)
        full.broadcast_from_rank0 = broadcast
        set_optimizer_state_dict(module_of(other_toy), other, state, options=full)
        for p, q in zip(toy.params.values(), other_toy.params.values(), strict=True):
            local(q).data.copy_(local(p).data)
        return bool(state), state_digest(opt), state_digest(other)

    results = run_ranks(4, worker)
    assert [given for given, *_ in results] == [True, *[not broadcast] * 3]
    for _, saved, loaded in results:
        assert saved == loaded


def module_of(toy: Toy) -> nn.Module:
    module = nn.Module()
    for name, p in toy.params.items():
        module.register_parameter(name.replace(".", "_"), p)
    return module
