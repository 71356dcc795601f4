"""What is registered from outside, with options of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from support.models import Toy
from torch import Tensor

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.allowed import Allowed, Option
from curvadion.consensus import CODECS, CONSENSUS, Consensus, register_codec, register_consensus
from curvadion.consensus.codec import Grid, bits_per_value
from curvadion.rules import RULES, Rule, Step, local_step, register_rule
from curvadion.sharding.group import ThreadGroup
from curvadion.signals import SIGNALS, Reading, Signal, register_signal
from curvadion.state.batch import Batch

SHARE = Option(0.5, Allowed(lambda v: 0 <= v <= 1, "in [0, 1]", "try 0.5"))


class Signed(Rule):
    """X <- (1 - lr wd) X - lr_local sqrt(m/n) (share sign(m) + (1 - share) m)."""

    options: ClassVar = {"sign_share": SHARE}

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        for b in batches:
            step.move(b, torch.lerp(b.momentum, b.momentum.sign(), step.groups[b.group]["sign_share"]))
        step.postpone_decay(batches)


class EveryNth(Signal):
    options: ClassVar = {"nth": Option(3, Allowed(lambda v: v > 0, "above 0", "try 3"))}

    def __init__(self, options: Mapping[str, Any]):
        self._nth = options["nth"]

    def opens(self, step: Step, reading: Reading, taus: list[float]) -> Tensor:
        return torch.tensor(step.schedule.steps % self._nth == 0)


class Partly(Consensus):
    """A local step, and on a synchronized one X_i <- X_i + pull (E[X] - X_i)."""

    options: ClassVar = {"pull": Option(1.0, Allowed(lambda v: 0 <= v <= 1, "in [0, 1]", "try 1"))}

    def __init__(self, options: Mapping[str, Any]):
        self._pull = options["pull"]
        self.leaves_apart = self._pull < 1

    def step(self, step: Step, *, synchronize: bool) -> None:
        local_step(step, begun=not synchronize)
        if synchronize:
            mean = [x.clone() for x in step.X]
            step.exchange.average_(mean, step.table.copied, "parameters")
            torch._foreach_lerp_(list(step.X), mean, self._pull)


class Scaled(Grid):
    options: ClassVar = {"width": Option(4, Allowed(lambda v: v in (2, 4, 8), "2, 4 or 8", "try 4"))}

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options["width"])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_rule("signed", Signed())
    register_signal("every_nth", EveryNth)
    register_consensus("partly", Partly)
    register_codec("scaled", Scaled)
    yield
    del RULES["signed"], SIGNALS["every_nth"], CONSENSUS["partly"], CODECS["scaled"]


def train(opt: CurvaDion, toy: Toy, steps: range, replica: int = 0) -> list[bool]:
    synchronized = []
    for step in steps:
        toy.set_gradients(step, replica)
        opt.step()
        synchronized.append(bool(opt.metrics()["curvadion/synchronized"]))
    return synchronized


def test_a_rules_option_is_a_groups() -> None:
    def moved(**options: Any) -> dict[str, Tensor]:
        toy = Toy(dense={})
        names = list(toy.matrices)
        groups = [
            {"params": [(names[0], toy.params[names[0]])], "sign_share": 1.0},
            {"params": [(name, toy.params[name]) for name in names[1:]]},
        ]
        opt = CurvaDion(groups, lr=0.1, weight_decay=0, local_update="signed", tau=math.inf, **options)
        assert [g["sign_share"] for g in opt.param_groups] == [1.0, options.get("sign_share", 0.5)]
        train(opt, toy, range(1))
        before = toy.whole()
        train(opt, toy, range(1, 2))
        M = {name: opt.state[p]["momentum"] / 0.95 for name, p in toy.params.items()}
        scale = {name: 0.1 * math.sqrt(p.shape[0] / p.shape[1]) for name, p in toy.params.items()}
        shares = dict(zip(names, [1.0, *[opt.param_groups[1]["sign_share"]] * 2], strict=True))
        for name, x in toy.whole().items():
            wanted = before[name] - scale[name] * (
                shares[name] * M[name].sign() + (1 - shares[name]) * M[name]
            )
            torch.testing.assert_close(x, wanted)
        return toy.whole()

    first, second = moved(), moved(sign_share=0.25)
    assert [torch.equal(first[name], second[name]) for name in first] == [True, False, False]


def test_a_signals_option_and_a_consensuss() -> None:
    def replica(group: ThreadGroup) -> tuple[list[bool], list[Tensor]]:
        toy = Toy()
        options: dict[str, Any] = {"consensus": "partly", "local_update": "muon", "pull": 0.25, "nth": 2}
        opt = CurvaDion(toy.groups(), replicate_mesh=group, gate="every_nth", **options)
        return train(opt, toy, range(5), group.rank), [p.detach().clone() for p in toy.params.values()]

    (one, X), (other, theirs) = ThreadGroup.run(2, replica)
    assert one == other == [True, False, True, False, True]
    assert not any(map(torch.equal, X, theirs)), "pull=0.25 leaves replicas apart"


def test_a_codecs_option() -> None:
    def bytes_sent(**options: Any) -> float:
        def replica(group: ThreadGroup) -> float:
            toy = Toy()
            preset = LOW_COMMUNICATION(outer_bits="scaled", **options)
            opt = CurvaDion(toy.groups(), replicate_mesh=group, **preset)
            train(opt, toy, range(1), group.rank)
            return opt.ledger.bytes["replicate", "pseudo_gradients"]

        return ThreadGroup.run(2, replica)[0]

    assert bytes_sent(width=8) / bytes_sent() == pytest.approx((8 + 1 / 8) / (4 + 1 / 8))
    assert (bits_per_value("scaled"), bits_per_value("scaled", width=2)) == (4.125, 2.125)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sign_share": 2.0}, ValueError, r"sign_share must be in \[0, 1\]; got 2.0.*try 0.5"),
        ({"sing_share": 0.1}, TypeError, "got 'sing_share'; did you mean 'sign_share'"),
        ({"sign_share": 0.1}, ValueError, "sign_share belongs to local_update='signed'; got sign_share=0.1"),
        ({"pull": -1.0, "consensus": "partly"}, ValueError, r"pull must be in \[0, 1\]; got -1.0"),
        ({"pull": 0.5}, ValueError, "pull belongs to consensus='partly'; got pull=0.5 with.*'average'"),
        ({"nth": 2}, ValueError, "nth belongs to gate='every_nth'"),
        ({"width": 2, "consensus": "outer"}, ValueError, "width belongs to outer_bits='scaled'"),
    ],
    ids=str,
)
def test_declared_options_are_checked_as_the_others_are(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CurvaDion(Toy().groups(), **options)
    with pytest.raises(ValueError, match="may hold known options|common to all groups|must|belongs to"):
        CurvaDion([{"params": list(Toy().params.values())[:3], **options}])


def test_a_declared_option_goes_through_a_checkpoint_and_a_change() -> None:
    toy, other = Toy(), Toy(seed=1)
    opt = CurvaDion(toy.groups(sign_share=0.75), local_update="signed")
    train(opt, toy, range(2))
    fresh = CurvaDion(other.groups(), local_update="signed")
    fresh.load_state_dict(opt.state_dict())
    assert [group["sign_share"] for group in fresh.param_groups] == [0.75, 0.5]
    fresh.param_groups[0]["sign_share"] = 3.0
    with pytest.raises(ValueError, match="sign_share must be in"):
        train(fresh, other, range(1))


def test_an_optimizer_built_before_goes_on() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups())
    train(opt, toy, range(1))
    register_rule("later", type("Later", (Signed,), {"options": {"late_share": SHARE}})())
    try:
        train(opt, toy, range(1, 3))
        opt.param_groups[0]["local_update"] = "later"
        with pytest.raises(ValueError, match="late_share went missing"):
            train(opt, toy, range(3, 4))
    finally:
        del RULES["later"]


@pytest.mark.parametrize("name", ["lr", "outer_bits", "pull"])
def test_a_declared_name_must_be_new(name: str) -> None:
    register_rule("rival", type("Rival", (Signed,), {"options": {name: Option(0.1, SHARE.allowed)}})())
    try:
        with pytest.raises(ValueError, match=f"an option's name must be new; got '{name}'"):
            CurvaDion(Toy().groups())
    finally:
        del RULES["rival"]
