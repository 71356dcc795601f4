"""Mistakes and habits of training loops and of host trainers: what goes wrong silently elsewhere is said
here."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import TinyGPT, Toy, digest, gathered, grid, local, outcome
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from curvadion import LOW_COMMUNICATION, CurvaDion, param_groups_for

OPTIONS: dict[str, dict[str, Any]] = {"defaults": {}, "low": LOW_COMMUNICATION}


class Heard(logging.Handler):
    """What the library has logged, from a level on."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Heard:
        self._before = logging.getLogger("curvadion").level
        logging.getLogger("curvadion").addHandler(self)
        logging.getLogger("curvadion").setLevel(self.level)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("curvadion").removeHandler(self)
        logging.getLogger("curvadion").setLevel(self._before)

    def of(self, words: str) -> list[str]:
        return [message for message in self.messages if words in message]


def shard(model: TinyGPT, mesh: Any) -> TinyGPT:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gpt(seed: int = 0) -> TinyGPT:
    torch.manual_seed(seed)
    return TinyGPT()


def train(model: nn.Module, opt: CurvaDion, steps: int, replica: int = 0) -> None:
    loss: Callable[[int, int], Tensor] = getattr(model, "module", model).loss
    for step in range(steps):
        opt.zero_grad()
        loss(step, replica).backward()
        opt.step()


# ---- gradients that are not there, or not a replica's own


@pytest.mark.parametrize("options", OPTIONS)
def test_an_optimizer_of_parameters_that_sharding_has_replaced_is_refused(options: str) -> None:
    """On all ranks, again and again, and before anything has moved; right after a restart too."""

    def worker() -> list[Any]:
        replicate, mesh = grid(2, 2)
        model = gpt()
        opt = CurvaDion(param_groups_for(model), replicate_mesh=replicate, **OPTIONS[options])
        state = opt.state_dict()
        shard(model, mesh)
        told = [outcome(lambda: train(model, opt, 1)) for _ in range(2)]
        opt.load_state_dict(state)
        return [*told, outcome(lambda: train(model, opt, 1)), opt.metrics()["curvadion/step"]]

    for *told, steps in run_ranks(4, worker):
        assert steps == 0
        for error, message in told:
            assert error == "RuntimeError" and "after the model is sharded" in message, message


def test_one_gradient_on_one_rank_is_enough_for_a_first_step() -> None:
    """And later there may be none: a missing gradient counts as zero."""

    def worker() -> float:
        toy = Toy()
        opt = CurvaDion(toy.groups(), replicate_mesh=grid(2, 1)[0])
        toy.set_gradients(0, 0)
        if dist.get_rank() == 0:
            opt.zero_grad()
        opt.step()
        opt.zero_grad()
        opt.step()
        return opt.metrics()["curvadion/step"]

    assert run_ranks(2, worker) == [2, 2]


def test_gradients_of_zeros_are_gradients() -> None:
    """As torch.distributed.checkpoint gives, to have the state made."""
    w = nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([w])
    w.grad = torch.zeros_like(w)
    opt.step()
    assert opt.metrics()["curvadion/step"] == 1


def test_no_gradient_because_of_an_overflow_is_no_mistake() -> None:
    w = nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([w])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(w.sum() * float("inf")).backward()
    scaler.step(opt)
    scaler.update()
    assert (w == 1).all()
    opt.zero_grad()
    scaler.scale(w.sum()).backward()
    scaler.step(opt)
    assert (w != 1).any()


def replaced_by_a_host(options: str, when: str) -> list[list[bytes]]:
    """Parameters after three steps of an optimizer built on shards, and of one that a host has handed them
    over, as Accelerate's FSDP2 does: built on plain parameters, then with the shards in its groups."""
    replicate, mesh = grid(2, 2)
    results = []
    for handed_over in (False, True):
        toy, plain = Toy(mesh), Toy()
        built_on = plain if handed_over else toy
        opt = CurvaDion(built_on.groups(), replicate_mesh=replicate, **OPTIONS[options])
        if when == "loaded":
            steps(plain, other := CurvaDion(plain.groups(), replicate_mesh=replicate, **OPTIONS[options]), 2)
            other.synchronize()
            opt.load_state_dict(other.state_dict())
        if handed_over:
            assert [list(group["params"]) for group in opt.param_groups] == [
                [built_on.params[n] for n in names] for names in (toy.matrices, toy.dense)
            ]
            for group, names in zip(opt.param_groups, (toy.matrices, toy.dense), strict=True):
                group["params"] = [toy.params[name] for name in names]
            if when == "saved":
                opt.load_state_dict(opt.state_dict())
        steps(toy, opt, 3)
        opt.synchronize()
        assert set(opt.state) == set(toy.params.values())
        assert opt.explain()[0].name == "layers.0.weight"
        results.append([p.full_tensor().detach().numpy().tobytes() for p in toy.params.values()])  # type: ignore[attr-defined]
    return results


def steps(toy: Toy, opt: CurvaDion, count: int) -> None:
    for step in range(count):
        toy.set_gradients(step, dist.get_rank() // 2)
        opt.step()


@pytest.mark.sample
@pytest.mark.parametrize("when", ["new", "saved", "loaded"])
@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_that_a_host_replaces_before_the_first_step_are_taken(options: str, when: str) -> None:
    """As if the optimizer had been built on them, bit for bit, with the state it had."""
    for built, handed_over in run_ranks(4, replaced_by_a_host, options, when):
        assert handed_over == built


def test_parameters_that_a_host_replaces_are_logged_and_not_taken_later_or_in_other_shapes() -> None:
    toy, other = Toy(), Toy(seed=1)
    opt = CurvaDion(toy.groups())
    names = [toy.matrices, toy.dense]

    def hand_over(toy: Toy) -> None:
        for group, these in zip(opt.param_groups, names, strict=True):
            group["params"] = [toy.params[name] for name in these]

    with Heard(logging.INFO) as heard:
        hand_over(other)
        steps_of_one(other, opt)
    assert len(heard.of("in place of 5 parameters")) == 1
    hand_over(toy)
    with pytest.raises(RuntimeError, match="they were replaced"):
        steps_of_one(toy, opt)
    opt = CurvaDion(toy.groups())
    opt.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="they were replaced"):
        steps_of_one(toy, opt)


def steps_of_one(toy: Toy, opt: CurvaDion) -> None:
    toy.set_gradients(0, 0)
    opt.step()


def test_parameters_that_only_part_of_the_sharding_has_replaced_are_named() -> None:
    """Built when the blocks are sharded and the rest is not: the rest would never be trained."""

    def worker() -> list[str]:
        model, mesh = gpt(), grid(1, 2)[1]
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        opt = CurvaDion(param_groups_for(model))
        fully_shard(model, mesh=mesh)
        with Heard() as heard:
            train(model, opt, 2)
        return heard.messages

    for messages in run_ranks(2, worker):
        [message] = messages
        assert message.startswith("3 of 9 parameters have no gradient"), message
        assert all(name in message for name in ("embedding.weight", "norm.weight", "head.weight")), message


def gradients_of(averaged_by: str, sharded: bool, **options: Any) -> list[str]:
    """What is logged in three steps of two replicas."""
    replicate, mesh = grid(2, 2 if sharded else 1)
    replica = replicate.get_local_rank()
    model: nn.Module = gpt()
    if sharded:
        shard(model, mesh)  # type: ignore[arg-type]
    opt = CurvaDion(param_groups_for(model), replicate_mesh=replicate, **options)
    wrapped = DistributedDataParallel(model) if averaged_by == "ddp" else model
    with Heard() as heard:
        for step in range(3):
            opt.zero_grad()
            seen = 0 if averaged_by == "data" else replica
            generator = torch.Generator().manual_seed(10 * step + seen)
            tokens = torch.randint(0, 20, (4, 9), generator=generator)
            logits = wrapped(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            (loss * (averaged_by != "zero")).backward()
            if averaged_by == "hand":
                for p in model.parameters():
                    dist.all_reduce(getattr(p.grad, "_local_tensor", p.grad), group=replicate.get_group())
            opt.step()
    return heard.of("bit for bit")


@pytest.mark.parametrize(
    ("averaged_by", "sharded", "told"),
    [
        ("ddp", False, 1),
        ("hand", False, 1),
        ("hand", True, 1),
        ("data", True, 1),
        ("nobody", False, 0),
        ("nobody", True, 0),
        ("zero", False, 0),
    ],
)
def test_gradients_that_are_averaged_already_are_noticed(averaged_by: str, sharded: bool, told: int) -> None:
    """Or read from the same data. Zeros say nothing."""
    for messages in run_ranks(4 if sharded else 2, gradients_of, averaged_by, sharded):
        assert len(messages) == told, messages
        assert all("DistributedDataParallel" in message for message in messages)


@pytest.mark.parametrize(
    ("averaged_by", "sharded", "raises"), [("ddp", False, True), ("nobody", True, False)]
)
def test_gradients_that_are_averaged_already_may_be_an_error(
    averaged_by: str, sharded: bool, raises: bool
) -> None:
    """On all ranks, where the option says so."""

    def worker() -> tuple[str, str]:
        return outcome(lambda: gradients_of(averaged_by, sharded, on_equal_gradients="raise"))

    for error, message in run_ranks(4 if sharded else 2, worker):
        assert error == ("ReplicaMismatchError" if raises else "ok")
        assert not raises or "the same gradients, bit for bit" in message


# ---- parameters that FSDP2 has gathered


def gather(model: TinyGPT, how: str) -> None:
    if how == "forward":
        with torch.no_grad():
            model(torch.zeros(2, 3, dtype=torch.long))
    elif how == "unshard":
        for module in (*model.layers, model):
            module.unshard()  # type: ignore[operator]


def weights_after(how: str, shards: int, options: str, call: str) -> list[bytes] | str:
    """Parameters after three steps, of an optimizer built when FSDP2 has gathered them so."""
    replicate, mesh = grid(1, shards)
    model = shard(gpt(), mesh)
    gather(model, how)
    listed = list(model.named_parameters())
    if call == "groups":
        opt = CurvaDion(param_groups_for(model), replicate_mesh=replicate, **OPTIONS[options])
    elif call == "listed":
        return outcome(lambda: CurvaDion([{"params": listed, "algorithm": "adamw"}]))[1]
    else:
        groups = param_groups_for(model)
        opt = CurvaDion(groups[:1], replicate_mesh=replicate, **OPTIONS[options])
        gather(model, how)
        late = [p for p in model.named_parameters() if not p[0].startswith("layers.")]
        added = lambda: opt.add_param_group({"params": late, "algorithm": "adamw"})  # noqa: E731
        return outcome(added)[1]
    train(model, opt, 3)
    return [p.full_tensor().detach().numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["forward", "unshard"])
def test_gathered_parameters_are_sharded_again(how: str, options: str) -> None:
    expected = run_ranks(2, weights_after, "no", 2, options, "groups")
    assert run_ranks(2, weights_after, how, 2, options, "groups") == expected


@pytest.mark.parametrize("call", ["listed", "added"])
@pytest.mark.parametrize("how", ["forward", "unshard"])
def test_gathered_parameters_are_refused(how: str, call: str) -> None:
    for message in run_ranks(2, weights_after, how, 2, "defaults", call):
        assert "call module.reshard() before" in message and "embedding.weight" in message, message


# ---- one replica


def taken(steps: int, **options: Any) -> tuple[list[bool], dict[str, Tensor], list[str]]:
    """Which steps of a run on one process are synchronized, the weights at its end, and what is logged."""
    toy, how = Toy(), []
    with Heard(logging.INFO) as heard:
        groups = toy.groups(**options.pop("group", {}))
        opt = CurvaDion(groups, **options)
        for step in range(steps):
            toy.set_gradients(step, 0, scale=0.1 + (step == 0))
            opt.step()
            how.append(bool(opt.metrics()["curvadion/synchronized"]))
    return how, toy.whole(), heard.of("one replica")


@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "momentum": 0.8}, {"warmup_steps": 2}], ids=str)
def test_one_replica_takes_synchronized_steps(options: dict[str, Any]) -> None:
    """There is nobody to be local to: Dion, as max_local_steps=0 asks for, bit for bit."""
    how, weights, said = taken(8, **options)
    expected = taken(8, **options, max_local_steps=0)
    assert how == expected[0] == [True] * 8
    assert all(torch.equal(value, weights[name]) for name, value in expected[1].items())
    assert len(said) == 1 and not expected[2]


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.5},
        {"max_local_steps": 3},
        {"local_update": "dion"},
        {"group": {"tau": 0.5}},
        {"group": {"local_update": "muon"}},
        {"target_sync_rate": 0.5},
        {"consensus": "outer"},
        LOW_COMMUNICATION,
    ],
    ids=str,
)
def test_one_replica_takes_local_steps_if_asked(options: dict[str, Any]) -> None:
    how, _, said = taken(8, **options)
    assert how[0] and not all(how) and not said


def test_asking_for_local_steps_later_is_heard() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups())
    for step in range(4):
        toy.set_gradients(0, 0)
        if step == 2:
            opt.param_groups[0]["tau"] = math.inf
        opt.step()
        assert opt.metrics()["curvadion/synchronized"] == (step < 2)


def test_several_replicas_are_local_by_default() -> None:
    def worker() -> list[float]:
        toy = Toy()
        opt = CurvaDion(toy.groups(), replicate_mesh=grid(2, 1)[0])
        how = []
        for step in range(6):
            toy.set_gradients(step, dist.get_rank(), scale=1e-3 if step else 1.0)
            opt.step()
            how.append(opt.metrics()["curvadion/synchronized"])
        return how

    for how in run_ranks(2, worker):
        assert how[0] == 1 and 0 in how


# ---- options and schedulers of torch


@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_may_be_clipped_and_a_scaler_still_leaves_skipping_to_the_step(unscale: bool) -> None:
    """Lightning asks this of an optimizer before it clips, with a GradScaler or without."""
    w = nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([w])
    assert not getattr(opt, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for slope in (math.inf, 1.0):
        opt.zero_grad()
        scaler.scale(w.sum() * slope).backward()
        if unscale:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_([w], 1.0)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 1.0, "halved once"
    told = opt.metrics()
    assert (told["curvadion/step"], told["curvadion/skipped_steps"]) == (1, 1), (
        "step() was called, and skipped"
    )


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (4, 3)))


@pytest.mark.parametrize(
    "given",
    [{"foreach": True}, {"fused": True}, {"fused": None}, {"maximize": False, "capturable": False}],
    ids=str,
)
def test_what_hosts_pass_to_any_optimizer_changes_nothing(given: dict[str, Any]) -> None:
    assert CurvaDion([weight()], **given).defaults == CurvaDion([weight()]).defaults


@pytest.mark.parametrize("name", ["maximize", "capturable", "differentiable"])
def test_what_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"does not implement {name}.*leave it out"):
        CurvaDion([weight()], **{name: True})
    with pytest.raises(ValueError, match=f"does not implement {name}.*in a parameter group"):
        CurvaDion([{"params": [weight()], name: True}])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mu", "momentum"),
        ("beta1", "betas"),
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
        ("rank", "rank_fraction"),
        ("ns_steps", "newton_schulz_steps"),
        ("inner_steps", "max_local_steps"),
        ("process_group", "replicate_mesh"),
        ("nestrov", "nesterov"),
    ],
)
def test_other_names_of_options_are_understood(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"got '{name}'; did you mean '{meant}'"):
        CurvaDion([weight()], **{name: 1})
    with pytest.raises(ValueError, match=f"got '{name}' in one; did you mean '{meant}'"):
        CurvaDion([{"params": [weight()], name: 1}])


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_may_be_wider_than_parameters(algorithm: str, dtype: torch.dtype) -> None:
    """Float64 moments: the step of float64 parameters, rounded once."""
    results = []
    for parameter in (dtype, torch.float64):
        p = nn.Parameter(torch.linspace(1, 2, 6, dtype=parameter))
        opt = CurvaDion([{"params": [p], "algorithm": algorithm}], momentum_dtype=torch.float64)
        p.grad = torch.linspace(-1, 1, 6, dtype=dtype).to(parameter)
        opt.step()
        results.append(p.detach().to(dtype))
    exact = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*results, rtol=exact, atol=0)


def test_a_group_that_is_no_group_or_has_no_rows_is_refused() -> None:
    opt = CurvaDion([weight()])
    with pytest.raises(TypeError, match="must be a dict"):
        opt.add_param_group([weight()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have elements"):
        opt.add_param_group({"params": [weight(0, 3)]})
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    opt.step()
    assert len(opt.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("algorithm", ["dion", "adamw"])
def test_a_parameter_that_stands_twice_in_a_group_is_refused(algorithm: str) -> None:
    opt, p = CurvaDion([weight()]), weight(4, 3)
    for add in (lambda group: CurvaDion([group]), opt.add_param_group):
        with pytest.raises(ValueError, match="must stand once in a group.* number 1 again"):
            add({"params": [p, p], "algorithm": algorithm})
    assert len(opt.param_groups) == 1


SCHEDULERS: dict[str, Callable[[CurvaDion], Any]] = {
    "one_cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=20),
    "cyclic": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.02, step_size_up=5),
    "one_cycle_of_lr": lambda opt: torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=0.02, total_steps=20, cycle_momentum=False
    ),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7),
        ],
        [3],
    ),
    "swa": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.005, anneal_epochs=4),
    "plateau": lambda opt: Plateau(opt, patience=1),
}


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """With a loss that does not fall."""

    def step(self, *_: Any) -> None:
        super().step(1.0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_that_cycle_momentum_cycle_that_of_matrices_too(scheduler: str) -> None:
    """As a run in which somebody sets mu and beta1 by hand; torch would cycle the latter alone."""
    cycled, by_hand = Toy(), Toy()
    options: dict[str, Any] = {"max_local_steps": 0}
    opt, other = (CurvaDion(toy.groups(), **options) for toy in (cycled, by_hand))
    schedule = SCHEDULERS[scheduler](opt)
    cycles, seen = scheduler in ("one_cycle", "cyclic"), set()
    for step in range(10):
        for toy in (cycled, by_hand):
            toy.set_gradients(step, 0)
        for group, mine in zip(other.param_groups, opt.param_groups, strict=True):
            group["lr"] = mine["lr"]
            if cycles and group["algorithm"] == "dion":
                group["momentum"] = mine["betas"][0]
            elif cycles:
                group["betas"] = mine["betas"]
        opt.step()
        other.step()
        schedule.step()
        seen.add(opt.param_groups[0]["momentum" if cycles else "lr"])
    assert len(seen) > 2
    assert all(
        torch.equal(a, b) for a, b in zip(cycled.params.values(), by_hand.params.values(), strict=True)
    )


def by_pickle(opt: CurvaDion) -> CurvaDion:
    return pickle.loads(pickle.dumps(opt))


def by_checkpoint(opt: CurvaDion) -> CurvaDion:
    other = CurvaDion(Toy().groups())
    SCHEDULERS["cyclic"](other)  # as the program that saved it made one
    other.load_state_dict(opt.state_dict())
    return other


CARRIED: dict[str, Callable[[CurvaDion], CurvaDion]] = {
    "same": lambda opt: opt,
    "copy": copy.deepcopy,
    "pickle": by_pickle,
    "checkpoint": by_checkpoint,
}
MU = 0.8
# What a user writes into the group of matrices after the scheduler's step.
BY_HAND: dict[str, Callable[[int], float | None]] = {
    "never": lambda step: None,
    "always": lambda step: MU,
    "once": lambda step: MU if step == 3 else None,
    "at_the_end": lambda step: MU if step == 7 else None,
    "grows": lambda step: 0.5 + 0.01 * step,
}


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
@pytest.mark.parametrize("carried", CARRIED)
@pytest.mark.parametrize("by_hand", BY_HAND)
@pytest.mark.parametrize("scheduler", ["one_cycle", "cyclic"])
def test_momentum_is_what_was_written_last(scheduler: str, by_hand: str, carried: str) -> None:
    """By the scheduler, which ends after a few steps, or by the user; whoever takes the optimizer on."""
    toy = Toy()
    opt = CurvaDion(toy.groups())
    schedule = SCHEDULERS[scheduler](opt)
    expected = opt.param_groups[0]["betas"][0]
    for step in range(12):
        written = BY_HAND[by_hand](step)
        if written is not None:
            opt.param_groups[0]["momentum"] = expected = written
        opt = schedule.optimizer = CARRIED[carried](opt)
        for p in (p for group in opt.param_groups for p in group["params"]):
            p.grad = torch.full_like(p, 1e-3)
        opt.step()
        assert [group["momentum"] for group in opt.param_groups if group["algorithm"] == "dion"] == [expected]
        if step < 6:
            schedule.step()
            expected = opt.param_groups[0]["betas"][0]
        opt = schedule.optimizer = CARRIED[carried](opt)


def test_saving_on_one_rank_leaves_all_with_the_same_momentum() -> None:
    """Somebody who saves sees what was written; whose turn it was last must not depend on that."""

    def momenta(saves: Collection[str]) -> list[float]:
        opt = CurvaDion(Toy().groups())
        schedule, found = SCHEDULERS["one_cycle"](opt), list[float]()
        for step in range(6):
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = torch.full_like(p, 1e-3)
            opt.step()
            found.append(opt.param_groups[0]["momentum"])
            for what in ("hand", "scheduler") if step % 2 else ("scheduler", "hand"):
                if what == "scheduler":
                    schedule.step()
                elif step < 4:
                    opt.param_groups[0]["momentum"] = MU
                if what in saves:
                    opt.state_dict()
        return found

    first, *others = [momenta(saves) for saves in ((), ("hand",), ("scheduler",), ("hand", "scheduler"))]
    assert MU in first and len(set(first)) > 2
    assert others == [first] * 3


@pytest.mark.parametrize("momentum", [0, 0.0])
def test_a_momentum_of_a_whole_number_is_cycled_too(momentum: float) -> None:
    opt = CurvaDion(Toy().groups(), momentum=momentum)
    schedule = SCHEDULERS["one_cycle"](opt)
    for _ in range(3):
        for p in (p for group in opt.param_groups for p in group["params"]):
            p.grad = torch.full_like(p, 1e-3)
        opt.step()
        assert opt.param_groups[0]["momentum"] == opt.param_groups[0]["betas"][0] > 0.8
        schedule.step()


# ---- freezing

FREEZE = {
    "one": (1, 1, {"tau": 0.5}),
    "one_outer": (1, 1, LOW_COMMUNICATION(max_local_steps=2)),
    "fsdp": (1, 2, {"local_update": "muon", "max_local_steps": 2}),
    "average": (2, 2, {"tau": math.inf, "max_local_steps": 2}),
    "low": (2, 2, LOW_COMMUNICATION(max_local_steps=2)),
    "under_way": (2, 1, LOW_COMMUNICATION(max_local_steps=2, outer_delay=1, outer_momentum=0.5)),
    "lag": (2, 1, {"gate_lag": 1, "local_update": "dion"}),
}
CHILLED = ("layers.1.weight", "norm.weight")


def freeze_and_thaw(case: str) -> list[tuple[list[str], list[str]]]:
    """In each phase, which parameters move at all, and which have a state; on one rank."""
    replicas, shards, options = FREEZE[case]
    replicate, mesh = grid(replicas, shards) if replicas * shards > 1 else (None, None)
    toy = Toy(mesh if shards > 1 else None)
    named = {"replicate_mesh": replicate} if replicas > 1 else {}
    opt = CurvaDion(toy.groups(weight_decay=0.1), **named, **options)
    told = []
    for phase, frozen in enumerate((False, True, False)):
        for name in CHILLED:
            toy.params[name].requires_grad_(not frozen)
            toy.params[name].grad = None
        if replicate is not None:
            opt.synchronize()
        before = {name: local(p).detach().clone() for name, p in toy.params.items()}
        for step in range(5 * phase, 5 * phase + 5):
            toy.set_gradients(step, dist.get_rank() // shards if replicate is not None else 0)
            for name in CHILLED if frozen else ():
                toy.params[name].grad = None
            opt.step()
        opt.synchronize()
        moved = [name for name, p in toy.params.items() if not torch.equal(local(p), before[name])]
        told.append((moved, [name for name, p in toy.params.items() if p in opt.state]))
        if replicate is not None:
            assert len(set(gathered(digest(toy.params.values()))[::shards])) == 1, "replicas are equal"
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    return told


@pytest.mark.parametrize("case", FREEZE)
def test_what_is_frozen_between_steps_does_not_move(case: str) -> None:
    """Neither by its momentum, nor by weight decay, nor by what one bit leaves out; thawed, it is trained."""
    replicas, shards, _ = FREEZE[case]
    ranks = replicas * shards
    for told in run_ranks(ranks, freeze_and_thaw, case) if ranks > 1 else [freeze_and_thaw(case)]:
        everything = list(Toy().params)
        others = [name for name in everything if name not in CHILLED]
        assert told == [(everything, everything), (others, others), (everything, everything)]


UNDER_WAY = {
    "one_delay": (1, 1, LOW_COMMUNICATION(max_local_steps=2, outer_delay=2, outer_momentum=0.5)),
    "one_lr": (1, 1, LOW_COMMUNICATION(max_local_steps=2, outer_delay=2, outer_lr=0.5)),
    "one_fragments": (1, 1, LOW_COMMUNICATION(max_local_steps=1, outer_fragments=2, outer_momentum=0.5)),
    "delay": (2, 1, LOW_COMMUNICATION(max_local_steps=2, outer_delay=2, outer_momentum=0.5)),
    "kept_back": (2, 2, LOW_COMMUNICATION(max_local_steps=2)),
    "fragments": (2, 1, LOW_COMMUNICATION(max_local_steps=1, outer_fragments=2, outer_delay=1, outer_lr=0.5)),
    "own_share": (2, 2, LOW_COMMUNICATION(max_local_steps=2, outer_residual_kept=0.5)),
    "own_share_delay": (2, 1, LOW_COMMUNICATION(max_local_steps=2, outer_delay=2, outer_residual_kept=1.0)),
}


def freeze_under_way(case: str) -> None:
    """Freeze after 4, 5 or 6 steps; what is under way then, or was kept back, moves the others alone."""
    replicas, shards, options = UNDER_WAY[case]
    replicate, mesh = grid(replicas, shards) if replicas * shards > 1 else (None, None)
    replica = replicate.get_local_rank() if replicate is not None else 0
    for steps in (4, 5, 6):
        toy = Toy(mesh if shards > 1 else None)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **options)
        frozen = [toy.params[name] for name in CHILLED]
        for step in range(steps + 6):
            if step == steps:
                for p in frozen:
                    p.requires_grad_(False)
                own = [local(p).detach().clone() for p in frozen]
                if replicate is None:
                    expected = own
                else:
                    expected = [mean_over(x, replicate) for x in own]
                    opt.synchronize()
            toy.set_gradients(step, replica)
            for p in frozen if step >= steps else ():
                p.grad = None
            opt.step()
            if step >= steps:
                found = [local(p).detach() for p in frozen]
                assert all(map(torch.equal, found, expected)), f"{case}: frozen after {steps} steps, {step}"
        X_0 = dict(zip(opt._built.table.names, opt._consensus.common(opt._built.store)["X_0"], strict=True))
        assert not X_0.keys() & set(CHILLED)
        assert len(set(gathered(digest(X_0.values()))[::shards] if replicate is not None else ["one"])) == 1


def mean_over(x: Tensor, replicate: DeviceMesh) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=replicate.get_group())
    return total / replicate.size()


@pytest.mark.parametrize("case", UNDER_WAY)
def test_what_is_frozen_does_not_move_by_what_arrives(case: str) -> None:
    """It stays where it was when it was frozen, with several replicas where they were on average."""
    replicas, shards, _ = UNDER_WAY[case]
    if replicas * shards > 1:
        run_ranks(replicas * shards, freeze_under_way, case)
    else:
        freeze_under_way(case)


def test_one_that_is_frozen_leaves_the_others_steps_as_they_are() -> None:
    """Bit for bit those of an optimizer that never had it."""
    both, alone = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    other = nn.Parameter(torch.ones(6, 4))
    opt, expected = CurvaDion([both, other]), CurvaDion([alone])
    for step in range(8):
        if step == 3:
            other.requires_grad_(False)
        both.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        alone.grad = both.grad.clone()
        other.grad = torch.ones(6, 4) if step < 3 else None
        opt.step()
        expected.step()
    assert torch.equal(both, alone)


@pytest.mark.parametrize("call", ["step", "synchronize"])
@pytest.mark.parametrize(("replicas", "shards"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_freezing_is_agreed_on(replicas: int, shards: int, call: str, everywhere: bool) -> None:
    """A rank that freezes alone, or forgets to say so, stops all of them; nobody waits."""

    def worker() -> tuple[str, str]:
        replicate, mesh = grid(replicas, shards)
        toy = Toy(mesh if shards > 1 else None)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate if replicas > 1 else None)
        toy.set_gradients(0, 0)
        opt.step()
        if everywhere or dist.get_rank() == 1:
            toy.params["layers.1.weight"].requires_grad_(False)
        return outcome(opt.step if call == "step" else opt.synchronize)

    told = run_ranks(2, worker)
    if call == "synchronize":
        expected = "ok" if everywhere else "ReplicaMismatchError"
        assert [error for error, _ in told] == [expected] * 2, told
    else:
        assert [error for error, _ in told] == ["RuntimeError"] * 2, told
        assert "'layers.1.weight'" in told[1][1] and "opt.synchronize()" in told[1][1]
