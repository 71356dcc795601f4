"""Construct, save, reshard, resume, fail: the optimizer in the hands of torch's own tools.

A resumed run is compared bitwise with the uninterrupted one; only a changed mesh, where sums are taken in
another order, gets a tolerance.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import TinyGPT, Toy, digest, gathered, grid, local, outcome, state_digest, whole
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.sharding.group import ThreadGroup

OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "tau": math.inf, "max_local_steps": 2}
MATRIX_KEYS = {"step", "momentum", "Q", "last_norm", "local_steps", "synchronized_steps"}
ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq", "local_steps", "synchronized_steps"}
LION_KEYS = {"step", "exp_avg", "local_steps", "synchronized_steps"}


def train(toy: Toy, opt: CurvaDion, steps: range, replica: int = 0) -> None:
    for step in steps:
        toy.set_gradients(step, replica)
        opt.step()


def test_the_state_is_made_at_construction_with_frozen_keys() -> None:
    """The set of keys is a file format."""
    toy = Toy()
    for algorithm, keys in (("adamw", ADAMW_KEYS), ("lion", LION_KEYS)):
        opt = CurvaDion(toy.groups(algorithm), **OPTIONS)
        for name, param in toy.params.items():
            state = opt.state[param]
            assert set(state) == (MATRIX_KEYS if name in toy.matrices else keys), name
            for key in set(state) & {"step", "local_steps", "synchronized_steps", "last_norm"}:
                assert state[key].shape == (), f"{name}: {key} is 0-d"
                assert state[key].dtype == torch.float32, f"{name}: {key} is float32"
            if name in toy.matrices:
                rank = math.ceil(0.25 * min(param.shape))
                assert state["Q"].shape == (min(param.shape), rank), f"{name}: Q lies on the shorter side"
                assert state["momentum"].shape == param.shape
                assert float(state["last_norm"]) == -1.0, "no previous norm yet"
                assert float(state["Q"].norm()) > 0, "Q has its first value at construction"
        before = {name: set(opt.state[param]) for name, param in toy.params.items()}
        train(toy, opt, range(3))
        assert before == {name: set(opt.state[param]) for name, param in toy.params.items()}, (
            "no key appears later"
        )
    opt = CurvaDion(toy.groups(), local_update="normuon", **OPTIONS)
    for name in toy.matrices:
        state = opt.state[toy.params[name]]
        assert set(state) == MATRIX_KEYS | {"second_moment"}, name
        assert state["second_moment"].shape == toy.params[name].shape[:1], "one number for each row"


def test_groups_hold_hyper_parameters_only() -> None:
    opt = CurvaDion(Toy().groups(), replicate_mesh=None, **OPTIONS)
    for group in opt.param_groups:
        for key, value in group.items():
            if key not in ("params", "param_names"):
                assert isinstance(value, int | float | str | bool | tuple | None), f"{key}: {type(value)}"


@pytest.mark.sample
@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=["after-S", "after-SL", "after-SLL", "after-SLLS"])
@pytest.mark.parametrize("local_update", ["gradient", "dion", "normuon", "dion2"])
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_resumed_run_is_the_uninterrupted_run(how: str, local_update: str, at: int) -> None:
    """One replica never diverges, so a checkpoint may be taken anywhere between two synchronized steps."""
    options = OPTIONS | {"local_update": local_update}
    toy = Toy()
    opt = CurvaDion(toy.groups(), **options)
    train(toy, opt, range(at))
    other = Toy(seed=1)  # other weights, so that everything has to come from the checkpoint
    with torch.no_grad():
        for name, param in other.params.items():
            param.copy_(toy.params[name])
    resumed = CurvaDion(
        other.groups(), **options | {"lr": 0.5}
    )  # the checkpoint's learning rate wins, as in torch
    state: Any = opt.state_dict()
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    elif how == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif how == "deepcopy":
        state = copy.deepcopy(state)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.02
    assert state_digest(resumed) == state_digest(opt), "loading restores every bit"
    for step in range(at, at + 5):
        train(toy, opt, range(step, step + 1))
        train(other, resumed, range(step, step + 1))
        assert opt.metrics()["curvadion/synchronized"] == resumed.metrics()["curvadion/synchronized"], (
            f"step {step}"
        )
        assert state_digest(resumed) == state_digest(opt), f"step {step}: the resumed run must go on bitwise"


def test_loading_does_not_alias_what_was_loaded() -> None:
    toy, other = Toy(), Toy()
    opt, resumed = CurvaDion(toy.groups(), **OPTIONS), CurvaDion(other.groups(), **OPTIONS)
    train(toy, opt, range(2))
    resumed.load_state_dict(opt.state_dict())
    before = state_digest(opt)
    train(other, resumed, range(2, 5))
    assert state_digest(opt) == before, "the run that was saved must not move when the loaded one does"


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32])
def test_dtypes_survive(param_dtype: torch.dtype) -> None:
    """Torch casts state to the parameter's dtype on load; fp32 momentum over bf16 parameters must stay
    fp32."""
    toy = Toy(dtype=param_dtype)
    opt = CurvaDion(toy.groups(), momentum_dtype=torch.float32, **OPTIONS)
    train(toy, opt, range(3))
    before = {
        (name, key): value.dtype
        for name, param in toy.params.items()
        for key, value in opt.state[param].items()
    }
    assert {before[name, "momentum"] for name in toy.matrices} == {torch.float32}
    saved = copy.deepcopy(opt.state_dict())
    digest_before = state_digest(opt)
    opt.load_state_dict(saved)
    after = {
        (name, key): value.dtype
        for name, param in toy.params.items()
        for key, value in opt.state[param].items()
    }
    assert after == before
    assert state_digest(opt) == digest_before, "and so must every bit of the values"


def test_deepcopy_of_model_and_optimizer() -> None:
    """As swa_utils and hyper-parameter searches do: the pair is copied and both go on alone."""
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    train(toy, opt, range(3))
    toy_copy, opt_copy = copy.deepcopy((toy, opt))
    before = state_digest(opt)
    train(toy_copy, opt_copy, range(3, 7))
    assert state_digest(opt) == before, "the original must not move with its copy"
    train(toy, opt, range(3, 7))
    assert state_digest(opt_copy) == state_digest(opt), "the copy takes the same steps, bitwise"
    assert opt_copy.metrics()["curvadion/synchronized"] == opt.metrics()["curvadion/synchronized"]
    assert opt_copy.matrix_names == opt.matrix_names


OUTER = {"consensus": "outer", "local_update": "muon", "tau": math.inf, "max_local_steps": 3}


@pytest.mark.parametrize("options", [OUTER, {**OUTER, "outer_fragments": 3, "outer_delay": 2}])
@pytest.mark.parametrize("inside", [False, True])
def test_a_copy_goes_on_with_what_is_under_way(options: dict[str, Any], inside: bool) -> None:
    """Also one that was made inside `consensus()`, which puts nothing back into the copy."""
    toy = Toy()
    opt = CurvaDion(toy.groups(), **options)
    train(toy, opt, range(5))
    with opt.consensus() if inside else nullcontext():
        toy_copy, opt_copy = copy.deepcopy((toy, opt))
        toy_read, opt_read = pickle.loads(pickle.dumps((toy, opt)))
    train(toy, opt, range(5, 12))
    for other, other_opt in ((toy_copy, opt_copy), (toy_read, opt_read)):
        train(other, other_opt, range(5, 12))
        assert state_digest(other_opt) == state_digest(opt)
    refused = pytest.raises(RuntimeError, match=r"inside common_state\(\)")
    with opt.common_state(), refused:
        copy.deepcopy(opt)
    with opt.common_state(), refused:
        opt.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(4, 4)))]})
    train(toy, opt, range(12, 14))  # goes on


def test_repr_and_zero_grad() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    assert "CurvaDion" in repr(opt)
    toy.set_gradients(0, 0)
    opt.zero_grad()
    assert all(param.grad is None for param in toy.params.values())


def test_a_foreign_state_dict_is_refused() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    train(toy, opt, range(2))
    fewer = CurvaDion(Toy(dense={}).groups(), **OPTIONS)
    with pytest.raises(ValueError, match="group"):
        fewer.load_state_dict(opt.state_dict())
    narrow = CurvaDion(Toy().groups(rank_fraction=1.0), **OPTIONS)
    with pytest.raises((ValueError, RuntimeError), match="Q"):
        narrow.load_state_dict(opt.state_dict() | {"param_groups": narrow.state_dict()["param_groups"]})


def test_lambda_lr() -> None:
    """A scheduler's learning rates, against the same rates set by hand; the matrices' and AdamW's alike."""

    def factor(step: int) -> float:
        return 1.0 / (1 + step)

    scheduled, manual = Toy(), Toy()
    opt, other = CurvaDion(scheduled.groups(), **OPTIONS), CurvaDion(manual.groups(), **OPTIONS)
    scheduler = LambdaLR(opt, factor)
    for step in range(5):
        for group in other.param_groups:
            group["lr"] = 0.02 * factor(step)
        train(scheduled, opt, range(step, step + 1))
        train(manual, other, range(step, step + 1))
        scheduler.step()
    assert digest(scheduled.params.values()) == digest(manual.params.values())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.02 / 6)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_one_cycle_lr(tensor_lr: bool) -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS | {"lr": torch.tensor(0.02) if tensor_lr else 0.02})
    scheduler = OneCycleLR(opt, max_lr=0.1, total_steps=6, cycle_momentum=False)
    rates, sizes = [], []
    for step in range(6):
        before = toy.whole()
        rates.append(float(opt.param_groups[0]["lr"]))
        train(toy, opt, range(step, step + 1))
        sizes.append(float(sum((before[name] - param.detach()).norm() for name, param in toy.params.items())))
        scheduler.step() if step < 5 else None
    assert rates[0] == pytest.approx(0.004)
    assert max(rates) > 0.05
    assert sizes[-1] < 1e-2 * max(sizes), (
        "the last learning rate is almost zero, and so must the last update be"
    )


def test_a_hook_after_loading_sees_what_was_loaded() -> None:
    toy, other = Toy(), Toy(seed=1)
    opt, fresh = CurvaDion(toy.groups(), **OPTIONS), CurvaDion(other.groups(), **OPTIONS)
    train(toy, opt, range(4))
    told: list[dict[str, float]] = []
    fresh.register_load_state_dict_post_hook(lambda loaded: told.append(loaded.metrics()))
    fresh.load_state_dict(opt.state_dict())
    keys = ["curvadion/step", "curvadion/sync_rate", "curvadion/steps_since_sync"]
    assert [told[0][key] for key in keys] == [opt.metrics()[key] for key in keys]
    assert told[0]["curvadion/step"] == 4


def test_step_hooks_and_closure() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    called: list[str] = []
    opt.register_step_pre_hook(lambda *_: called.append("pre"))
    opt.register_step_post_hook(lambda *_: called.append("post"))
    param = toy.params["layers.0.weight"]

    def closure() -> Tensor:
        called.append("closure")
        opt.zero_grad()
        loss = (param * param).sum()
        assert loss.requires_grad, "the closure runs with gradients enabled"
        loss.backward()
        return loss

    before = float((param * param).sum().detach())
    assert float(opt.step(closure).detach()) == pytest.approx(before)
    assert called == ["pre", "closure", "post"]
    assert opt.step() is None
    assert float((param * param).sum().detach()) < before, "the step used the gradient that the closure made"


def test_profiler_spans() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(toy, opt, range(2))
    names = {event.key for event in profile.key_averages() if event.key.startswith("curvadion::")}
    for part in ("gate", "synchronized", "local", "orthogonalize"):
        assert any(part in name for name in names), f"a span for {part} is missing: {sorted(names)}"


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_grad_scaler_overflow_on_one_rank_skips_on_every_rank(on_nonfinite: str, unscale_first: bool) -> None:
    """An overflow is normal under AMP: no error, and no rank may go on alone. The other steps equal a plain
    run."""

    def worker() -> Any:
        rank = dist.get_rank()

        def run(scaled: bool) -> tuple[str, list[bool]]:
            toy = Toy()
            opt = CurvaDion(
                toy.groups(), replicate_mesh=dist.group.WORLD, on_nonfinite=on_nonfinite, **OPTIONS
            )
            scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=1000)
            unchanged = []
            for step in range(6):
                if step == 3 and not scaled:
                    continue
                toy.set_gradients(step, rank)
                if scaled:
                    scaler.scale(torch.zeros(()))  # creates the scale; the gradients are scaled by hand
                    for param in toy.params.values():
                        assert param.grad is not None
                        param.grad.mul_(scaler.get_scale())
                    if step == 3 and rank == 1:
                        toy.params["layers.1.weight"].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
                    if (
                        unscale_first
                    ):  # and clip, which hides the infinity: found_inf is then all that is left of it
                        scaler.unscale_(opt)
                        nn.utils.clip_grad_value_(toy.params.values(), 100.0)
                before = state_digest(opt)
                scaler.step(opt)
                if step == 3:
                    unchanged.append(state_digest(opt) == before)
                    unchanged.append(opt.metrics()["curvadion/skipped_steps"] == 1.0)
                scaler.update()
            return state_digest(opt), unchanged

        return run(scaled=True), run(scaled=False)

    for rank, ((scaled, unchanged), (plain, _)) in enumerate(run_ranks(4, worker)):
        assert unchanged == [True, True], f"rank {rank}: nothing may change, and the skipped step is counted"
        assert scaled == plain, (
            f"rank {rank}: unscaled by a power of two, the other steps equal a plain run bitwise"
        )


def test_grad_scaler_with_sharded_parameters() -> None:
    """The overflow sits in one shard of one replica; the scaler sees DTensor gradients."""

    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        replica = replicate.get_local_rank()
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        skipped = []
        for step in range(4):
            toy.set_gradients(step, replica)
            scaler.scale(torch.zeros(()))
            for param in toy.params.values():
                local(param.grad).mul_(scaler.get_scale())
            if step == 2 and dist.get_rank() == 3:
                local(toy.params["embedding.weight"].grad).view(-1)[0] = math.nan
            before = state_digest(opt)
            scaler.step(opt)
            skipped.append(state_digest(opt) == before)
            scaler.update()
        return skipped

    assert run_ranks(4, worker) == [[False, False, True, False]] * 4


def test_add_param_group_in_the_middle_of_a_run() -> None:
    """The group joins with fresh state while the old state stays; replicas agree from its first step on."""

    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        replica = replicate.get_local_rank()
        toy = Toy(mesh)
        late = {"late.0.weight": (8, 6), "late.1.weight": (12, 8)}
        later = Toy(mesh, matrices=late, dense={"late.norm": (4,)}, seed=5)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
        train(toy, opt, range(3), replica)
        before = {name: digest(opt.state[param].values()) for name, param in toy.params.items()}
        for group in later.groups():
            opt.add_param_group(group)
        kept = before == {name: digest(opt.state[param].values()) for name, param in toy.params.items()}
        trace = []
        for step in range(3, 8):
            later.set_gradients(step, replica)
            train(toy, opt, range(step, step + 1), replica)
            hashes = gathered(digest([*toy.params.values(), *later.params.values()]))
            trace.append((bool(opt.metrics()["curvadion/synchronized"]), hashes[:2] == hashes[2:]))
        return kept, trace, opt.matrix_names[-2:]

    for kept, trace, names in run_ranks(4, worker):
        assert kept, "add_param_group must not touch the state of the others"
        assert trace == [(True, True), (False, False), (False, False), (True, True), (False, False)]
        assert names == ["late.0.weight", "late.1.weight"]


def test_a_group_added_while_replicas_are_apart_leaves_the_others_as_they_are() -> None:
    """Local Dion steps leave each replica a Q of its own, and the next synchronized one needs replica 0's."""

    def run(added: bool) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
        def replica(group: ThreadGroup) -> tuple[dict[str, Tensor], list[Tensor]]:
            toy = Toy()
            options: dict[str, Any] = {"local_update": "dion", "max_local_steps": 2, "gate_every": None}
            # Triton's interpreter is not made for threads.
            opt = CurvaDion(toy.groups(), replicate_mesh=group, kernels="reference", **options)
            train(toy, opt, range(3), group.rank)
            Q = [opt.state[toy.params[name]]["Q"].clone() for name in toy.matrices]
            if added:
                opt.add_param_group({"params": [("extra.weight", nn.Parameter(torch.eye(5, 4)))]})
            train(toy, opt, range(3, 4), group.rank)
            return toy.whole(), Q

        return ThreadGroup.run(2, replica)

    (plain, _), _ = run(added=False)
    (one, Q), (other, their_Q) = run(added=True)
    assert not any(map(torch.equal, Q, their_Q))
    for name, expected in plain.items():
        assert torch.equal(one[name], expected) and torch.equal(other[name], expected), name


def test_frozen_parameters_are_left_alone() -> None:
    """They have no gradient, so the rule of the missing gradient would decay them; frozen means frozen."""
    toy = Toy()
    toy.params["layers.1.weight"].requires_grad_(False)
    toy.params["norm.weight"].requires_grad_(False)
    before = toy.whole()
    opt = CurvaDion(toy.groups(), weight_decay=0.5, **OPTIONS)
    for step in range(3):
        for name in ("layers.0.weight", "layers.2.weight", "embedding.weight"):
            toy.params[name].grad = torch.full_like(toy.params[name], 1.0 + step)
        opt.step()
    for name in ("layers.1.weight", "norm.weight"):
        assert torch.equal(toy.params[name].detach(), before[name]), f"{name} is frozen"
    assert not torch.equal(toy.params["layers.0.weight"].detach(), before["layers.0.weight"])


@pytest.mark.parametrize("kind", ["dion", "adamw"])
def test_parameters_swapped_after_construction_are_refused(kind: str) -> None:
    """Accelerate does this: the optimizer would go on with the old tensors, in silence."""
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS)
    train(toy, opt, range(1))
    group = opt.param_groups[0 if kind == "dion" else 1]
    group["params"][0] = nn.Parameter(group["params"][0].detach().clone())
    toy.set_gradients(1, 0)
    with pytest.raises(RuntimeError, match="replaced.*construct CurvaDion after"):
        opt.step()


def test_a_hyper_parameter_changed_in_a_group_takes_effect() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), **OPTIONS | {"weight_decay": 0.0})
    train(toy, opt, range(1))
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = digest(toy.params.values())
    train(toy, opt, range(1, 3))
    assert digest(toy.params.values()) == before, "with lr = 0 no weight moves, on either branch"


def test_state_dict_while_diverged_is_refused_and_says_why() -> None:
    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
        fresh = opt.diverged, outcome(opt.state_dict)
        saved = copy.deepcopy(opt.state_dict())
        found = []
        for step in range(3):
            train(toy, opt, range(step, step + 1), replicate.get_local_rank())
            found.append((opt.diverged, outcome(opt.state_dict)))
        opt.synchronize()
        synchronized = opt.diverged, outcome(opt.state_dict)
        train(toy, opt, range(3, 4), replicate.get_local_rank())
        again = opt.diverged, outcome(opt.state_dict)
        opt.discard_divergence()
        discarded = opt.diverged, outcome(opt.state_dict)
        opt.load_state_dict(saved)
        loaded = opt.diverged, outcome(opt.state_dict)
        return fresh, found, synchronized, again, discarded, loaded

    for fresh, found, synchronized, again, discarded, loaded in run_ranks(4, worker):
        ok = (False, ("ok", ""))
        assert fresh == ok
        assert synchronized == ok, "synchronize() makes a checkpoint possible"
        assert discarded == ok, "discard_divergence() is the way to load over a diverged run"
        assert loaded == ok
        for diverged, (kind, message) in (*found, again):
            assert diverged, "momenta differ even after a synchronized step"
            assert kind == "RuntimeError"
            assert "synchronize()" in message, f"the message must say what to call: {message}"
            assert "discard_divergence()" in message, f"and how to load over a diverged run: {message}"


def sharded_model(mesh: DeviceMesh, dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyGPT:
    torch.manual_seed(seed)
    model = TinyGPT().to(dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def model_steps(model: TinyGPT, opt: CurvaDion, steps: range, replica: int) -> None:
    for step in steps:
        opt.zero_grad()
        model.loss(step, replica).backward()
        opt.step()


def gradient_steps(model: nn.Module, opt: CurvaDion, steps: range) -> None:
    """Steps with gradients that depend on neither mesh nor model: what a changed mesh is compared on."""
    for step in steps:
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1_009 * step + index)
            full = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
            assert isinstance(param, DTensor)
            param.grad = torch.distributed.tensor.distribute_tensor(
                full, param.device_mesh, param.placements, src_data_rank=None
            )
        opt.step()


@pytest.mark.parametrize(
    ("param_dtype", "flatten"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["nested", "flattened"],
)
def test_dcp_round_trip_on_the_same_mesh_is_bitwise(
    tmp_path: Path, param_dtype: torch.dtype, flatten: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build(seed: int) -> tuple[TinyGPT, CurvaDion, int]:
        replicate, mesh = grid(2, 2)
        model = sharded_model(mesh, param_dtype, seed)
        settings = OPTIONS | {"momentum_dtype": torch.float32, "lr": 0.02 if seed == 0 else 0.7}
        return (
            model,
            CurvaDion(model.groups(), replicate_mesh=replicate, **settings),
            replicate.get_local_rank(),
        )

    def worker() -> Any:
        model, opt, replica = build(0)
        model_steps(model, opt, range(5), replica)
        opt.synchronize()
        model_state, optimizer_state = get_state_dict(model, opt, options=options)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        saved = state_digest(opt)

        other, resumed, _ = build(1)
        model_steps(other, resumed, range(3), replica)  # a diverged run of its own
        refused = outcome(lambda: get_state_dict(other, resumed, options=options))
        resumed.discard_divergence()
        model_state, optimizer_state = get_state_dict(other, resumed, options=options)
        target = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=tmp_path)
        set_state_dict(
            other,
            resumed,
            model_state_dict=target["model"],
            optim_state_dict=target["optimizer"],
            options=options,
        )
        loaded = state_digest(resumed)
        momentum = {s["momentum"].dtype for s in resumed.state.values() if "momentum" in s}
        rate = resumed.param_groups[0]["lr"]
        model_steps(model, opt, range(5, 10), replica)
        model_steps(other, resumed, range(5, 10), replica)
        return (
            saved == loaded,
            state_digest(opt) == state_digest(resumed),
            momentum,
            refused,
            rate,
            resumed.metrics(),
        )

    for rank, (restored, same, momentum, refused, rate, metrics) in enumerate(run_ranks(4, worker)):
        assert refused[0] == "RuntimeError", f"rank {rank}: a diverged run must not be saved, got {refused}"
        assert "synchronize()" in refused[1]
        assert restored, f"rank {rank}: every parameter and every state tensor must come back bitwise"
        assert same, f"rank {rank}: the resumed run must go on bitwise as the uninterrupted one"
        assert momentum == {torch.float32}, "fp32 momentum must stay fp32 over bf16 parameters"
        assert rate == 0.02, "hyper-parameters come from the checkpoint"
        assert metrics["curvadion/step"] == 10.0, "counters survive through DCP"


@pytest.mark.parametrize("how", ["torch.save", "deepcopy"])
def test_a_sharded_state_dict_is_saved_and_copied(how: str, tmp_path: Path) -> None:
    """Matrices of one shape share a stack of momenta; each rank saves its own file."""

    def build(settings: dict[str, Any]) -> tuple[TinyGPT, CurvaDion, int]:
        replicate, mesh = grid(2, 2)
        model = sharded_model(mesh)
        return (
            model,
            CurvaDion(model.groups(), replicate_mesh=replicate, **settings),
            replicate.get_local_rank(),
        )

    def worker() -> list[str]:
        wrong = []
        for settings in (
            OPTIONS | {"local_update": "normuon"},
            LOW_COMMUNICATION,
            LOW_COMMUNICATION(outer_delay=2),
        ):
            model, opt, replica = build(settings)
            model_steps(model, opt, range(3), replica)
            opt.synchronize()
            state = opt.state_dict()
            if how == "deepcopy":
                state = copy.deepcopy(state)
            else:
                file = tmp_path / f"{dist.get_rank()}.pt"
                torch.save(state, file)
                state = torch.load(file, weights_only=True)
            other, resumed, _ = build(settings)
            resumed.load_state_dict(state)
            with torch.no_grad():
                for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
            before = state_digest(opt)
            if state_digest(resumed) != before:
                wrong.append(f"{settings}: another state")
            model_steps(other, resumed, range(3, 6), replica)
            if state_digest(opt) != before:
                wrong.append(f"{settings}: steps of the one change the other")
            model_steps(model, opt, range(3, 6), replica)
            if state_digest(opt) != state_digest(resumed):
                wrong.append(f"{settings}: another run")
        return wrong

    assert run_ranks(4, worker) == [[]] * 4


@pytest.mark.sample
@pytest.mark.parametrize("local_update", ["normuon", "gradient"])  # the first has what the second has
def test_a_checkpoint_of_two_replicas_and_two_shards_loads_on_another_mesh(
    tmp_path: Path, local_update: str, quick: bool
) -> None:
    """DCP reshards; momentum, Q, what a rule keeps, and counters arrive whole, and the run goes on as on the
    first mesh."""
    options = OPTIONS | {"local_update": local_update}

    def build(replicas: int, shards: int) -> tuple[TinyGPT, CurvaDion, int]:
        replicate, mesh = grid(replicas, shards)
        model = sharded_model(mesh, torch.float64, seed=replicas)
        return (
            model,
            CurvaDion(model.groups(), replicate_mesh=replicate, **options),
            replicate.get_local_rank(),
        )

    def everything(model: nn.Module, opt: CurvaDion) -> dict[str, Any]:
        return {
            f"{name}.{key}": whole(value).numpy()
            for name, param in model.named_parameters()
            for key, value in {**opt.state[param], "param": param}.items()
        }

    def save() -> Any:
        model, opt, replica = build(2, 2)
        model_steps(model, opt, range(5), replica)
        opt.synchronize()
        model_state, optimizer_state = get_state_dict(model, opt)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        saved = everything(model, opt)
        gradient_steps(model, opt, range(4))
        return saved, everything(model, opt)

    def load(replicas: int, shards: int) -> Any:
        model, opt, _ = build(replicas, shards)
        model_state, optimizer_state = get_state_dict(model, opt)
        target = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=tmp_path)
        set_state_dict(model, opt, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
        loaded = everything(model, opt)
        gradient_steps(model, opt, range(4))
        return loaded, everything(model, opt)

    def worker() -> Any:
        world = dist.get_world_size()
        written = save() if world == 4 else None
        dist.barrier()
        return written, {shape: load(*shape) for shape in ((1, world), (world, 1))[: 1 if quick else 2]}

    four = run_ranks(4, worker)
    saved, continued = four[0][0]
    assert any(key.endswith(".second_moment") and value.all() for key, value in saved.items()) == (
        local_update == "normuon"
    )
    results = [
        (f"{shape}, rank {rank}", *result)
        for ranks in (four, run_ranks(2, worker))
        for rank, (_, by_shape) in enumerate(ranks)
        for shape, result in by_shape.items()
    ]
    assert len(results) == (6 if quick else 12)
    for where, loaded, went_on in results:
        assert saved.keys() == loaded.keys()
        for key, value in saved.items():
            assert (loaded[key] == value).all(), f"{where}: {key} must be loaded bitwise"
        for key, value in continued.items():
            torch.testing.assert_close(
                torch.as_tensor(went_on[key]),
                torch.as_tensor(value),
                rtol=1e-9 if value.dtype.name == "float64" else 1e-5,  # last_norm is kept in fp32
                atol=1e-12,
                msg=lambda text, w=where, k=key: f"{w}, {k} after four more steps: {text}",
            )


def test_a_nonfinite_run_is_healed_by_a_checkpoint(tmp_path: Path) -> None:
    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        replica = replicate.get_local_rank()
        model = sharded_model(mesh)
        opt = CurvaDion(model.groups(), replicate_mesh=replicate, **OPTIONS)
        model_steps(model, opt, range(3), replica)
        opt.synchronize()
        model_state, optimizer_state = get_state_dict(model, opt)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        saved = state_digest(opt)
        opt.zero_grad()
        model.loss(3, replica).backward()
        if dist.get_rank() == 1:
            local(model.layers[0].up.weight.grad).view(-1)[0] = math.nan
        raised = outcome(opt.step)[0]
        opt.discard_divergence()
        model_state, optimizer_state = get_state_dict(model, opt)
        target = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=tmp_path)
        set_state_dict(model, opt, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
        healed = state_digest(opt) == saved
        model_steps(model, opt, range(3, 5), replica)
        return raised, healed

    assert run_ranks(4, worker) == [("NonFiniteError", True)] * 4


def test_q_depends_on_the_canonical_name_alone() -> None:
    """Not on rank, mesh, order or wrapper prefixes; unnamed parameters use their index."""

    def first_q(names: list[str], mesh: DeviceMesh | None = None) -> list[Tensor]:
        toy = Toy(mesh, matrices=dict.fromkeys(names, (8, 6)), dense={})
        opt = CurvaDion(toy.groups(), rank_fraction=0.5)
        return [whole(opt.state[param]["Q"]) for param in toy.params.values()]

    a, b = first_q(["layers.0.weight", "layers.1.weight"])
    assert not torch.allclose(a, b), "each matrix has a Q of its own"
    assert torch.equal(first_q(["layers.1.weight", "layers.0.weight"])[1], a), "the order does not matter"
    for prefix in ("_orig_mod.", "module.", "_fsdp_wrapped_module."):
        assert torch.equal(first_q([f"{prefix}layers.0.weight"])[0], a), (
            f"the wrapper prefix {prefix} does not matter"
        )
    wrapped = first_q(["layers.0._checkpoint_wrapped_module.weight"])[0]
    assert torch.equal(wrapped, a), "nor does the name that activation checkpointing inserts"
    torch.manual_seed(123)
    assert torch.equal(first_q(["layers.0.weight"])[0], a), "the global generator does not matter"

    def worker() -> Any:
        before = torch.get_rng_state()
        values = first_q(["layers.0.weight"], grid(2, 2)[1])[0].numpy()
        return values, torch.equal(torch.get_rng_state(), before)

    for values, untouched in run_ranks(4, worker):
        assert (values == a.numpy()).all(), "neither rank nor mesh matters"
        assert untouched, "the global generator is not used"


@pytest.mark.parametrize("other", [torch.ones(3, 4), torch.ones(4, 3, dtype=torch.bfloat16)])
def test_another_shape_or_dtype_of_a_parameter_is_refused(other: Tensor) -> None:
    """Kernels work on addresses, and what is kept of a parameter, as X_0, is in its dtype: one that was
    swapped for another kind must not be written to."""
    p = nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([p])
    p.grad = torch.ones_like(p)
    opt.step()
    p.grad, p.data = None, other.clone()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="must keep the shapes and dtypes"):
        opt.step()
    assert (p == 1).all()


@pytest.mark.parametrize(("before", "after"), [("adamw", "lion"), ("lion", "adamw"), ("adamw", "dion")])
def test_another_algorithm_is_refused_before_anything_moves(before: str, after: str) -> None:
    matrix, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([{"params": [matrix]}, {"params": [other], "algorithm": before}])
    matrix.grad, other.grad = torch.ones_like(matrix), torch.ones_like(other)
    opt.step()
    opt.param_groups[1]["algorithm"] = after
    here = matrix.detach().clone()
    with pytest.raises(ValueError, match="algorithm of a group must stay"):
        opt.step()
    assert torch.equal(matrix, here)


@pytest.mark.parametrize("key", ["tau", "lr", "weight_decay", "rank_fraction", "local_update"])
@pytest.mark.parametrize("change", ["none", "gone"])
def test_options_spoiled_on_one_rank_fail_on_every_rank(key: str, change: str) -> None:
    """Whatever a callback does to the groups of one rank, no other rank may be left waiting in a
    collective."""

    def worker() -> str:
        p = nn.Parameter(torch.ones(4, 3))
        opt = CurvaDion([p], replicate_mesh=grid(2, 1)[0], warmup_steps=1, tau=math.inf)
        for step in range(3):
            p.grad = torch.full_like(p, 1.0 + step)
            if step == 2 and dist.get_rank() == 0:
                if change == "none":
                    opt.param_groups[0][key] = None
                else:
                    del opt.param_groups[0][key]
            try:
                opt.step()
            except Exception as error:
                assert step == 2
                with pytest.raises(RuntimeError, match="load the last checkpoint"):
                    opt.step()
                return type(error).__name__
        return "nothing"

    names = run_ranks(2, worker)
    assert names[1] == "RuntimeError", "the other rank is told"
    assert names[0] in ("ValueError", "TypeError", "KeyError"), names
