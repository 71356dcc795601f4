"""Mistakes and habits of training loops and of host trainers: what goes wrong silently elsewhere is said
here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import TinyGPT, Toy, grid, outcome
from support.ranks import run_ranks
from torch import Tensor, nn
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


def gradients_of(averaged_by: str, sharded: bool) -> list[str]:
    """What is logged in three steps of two replicas."""
    replicate, mesh = grid(2, 2 if sharded else 1)
    replica = replicate.get_local_rank()
    model: nn.Module = gpt()
    if sharded:
        shard(model, mesh)  # type: ignore[arg-type]
    opt = CurvaDion(param_groups_for(model), replicate_mesh=replicate)
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
