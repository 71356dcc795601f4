"""The study's gate for each matrix: all replicas choose alike, by the score, within the budget of bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest
import torch
from choosing import Choosing, choosing, fragments_of, in_order
from simulation import Replicas, Setting, options_of
from test_simulation import take, tiny
from torch import Tensor, nn
from variants import OuterVariant

from curvadion.consensus import register_consensus
from curvadion.consensus.fragments import Part
from curvadion.rules import Step

K, STEPS, BLOCK = 3, 26, 128
OURS = {"bits": 1, "interval": 6, "kept": 0.5, "outer_lr": 1.4, "momentum": 0.8}
# One fragment of each parameter but the norm, which goes with the one before it.
MEMBERS = [["up.weight"], ["down.weight"], ["embedding.weight"], ["head.weight", "norm.weight"]]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


class Watch:
    """What a replica would have to look at, kept by hand."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.X_0 = {name: x.clone() for name, x in replicas.X.items()}
        self.norms = [[0.0] * len(MEMBERS) for _ in range(K)]
        self.rmmc = [[0.0] * len(MEMBERS) for _ in range(K)]
        self.change = [[0.0] * len(MEMBERS) for _ in range(K)]

    def momenta(self, k: int, members: list[str]) -> list[Tensor]:
        states = [
            self.replicas._replicas[k].opt.state[self.replicas.models[k].get_parameter(n)] for n in members
        ]
        return [s["momentum" if "momentum" in s else "exp_avg"] for s in states]

    def look(self) -> None:
        for k in range(K):
            for f, members in enumerate(MEMBERS):
                before, self.norms[k][f] = self.norms[k][f], norm(self.momenta(k, members))
                self.rmmc[k][f] = abs(self.norms[k][f] - before) / before if before else 0.0
                self.change[k][f] += self.rmmc[k][f]

    def score(self, name: str, X: Mapping[str, Tensor], turn: int, sent: list[int]) -> list[float]:
        values = []
        for f, members in enumerate(MEMBERS):
            apart = [norm([X[n][k] - self.X_0[n][k] for n in members]) for k in range(K)]
            here = norm([self.X_0[n][0] for n in members])
            size = sum(self.X_0[n][0].numel() for n in members)
            squares = sum(a * a for a in apart) / K
            values.append(
                {
                    "staleness": turn - sent[f],
                    "drift": math.sqrt(squares) / here,
                    "spread": math.sqrt(squares / size),
                    "rmmc": sum(of[f] for of in self.rmmc) / K,
                    "change": sum(of[f] for of in self.change) / K,
                }[name]
            )
        return values


@pytest.mark.sample
@pytest.mark.parametrize("rich", [0.0, 0.5])
@pytest.mark.parametrize("score", ["staleness", "drift", "spread", "rmmc", "change", "drift*staleness"])
def test_what_is_sent_follows_the_score_on_all_replicas_alike(
    score: str, rich: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from parameters and momenta as they are when a replica chooses; then bytes by purpose."""
    seen: list[tuple[Any, list[int], set[int], dict[str, Tensor]]] = []
    due = Choosing._due

    def told(self: Choosing, step: Step) -> list[int]:
        X = {name: x.clone() for name, x in zip(step.table.names, step.X, strict=True)}
        seen.append((self, chosen := due(self, step), set(self._lavish), X))
        return chosen

    monkeypatch.setattr(Choosing, "_due", told)
    setting = Setting("", fragments=2, choice=score, rich=rich, **OURS)
    plain, richly = 1.125, 2.125
    with closing(Replicas(tiny(), setting, K)) as replicas:
        watch, sent, left, payload, synchronized = Watch(replicas), [0] * len(MEMBERS), 0.0, 0, 0
        sizes = [sum(replicas.X[n][0].numel() for n in members) for members in MEMBERS]
        orders = set()
        for step in range(STEPS):
            take(replicas, step)
            seen.clear()
            replicas.step()
            watch.look()  # a synchronization leaves momenta alone
            assert len(seen) == (K if step % 3 == 0 else 0)
            if not seen:
                continue
            by_replica = {id(r.opt._consensus): k for k, r in enumerate(replicas._replicas)}
            X = {name: torch.empty_like(x) for name, x in replicas.X.items()}
            for consensus, _, _, mine in seen:
                for name, x in mine.items():
                    X[name][by_replica[id(consensus)]] = x
            _, chosen, lavish, _ = seen[0]
            assert all(other[1:3] == (chosen, lavish) for other in seen), f"step {step}"

            turn, order, rest = synchronized, list(range(len(MEMBERS))), set(chosen)
            if step:
                parts = [watch.score(name, X, turn, sent) for name in score.split("*")]
                scores = [math.prod(values) for values in zip(*parts, strict=True)]
                order = sorted(
                    order, key=lambda f: (turn - sent[f] <= 6, -scores[f], (f - turn) % len(MEMBERS))
                )
                left += sum(sizes) / 2 * plain
                expected, ample, lavishly = [], sum(sizes) / 2 * rich, set()
                for f in order:
                    if left > 0:
                        expected.append(f)
                        lavishly |= {f} if ample > 0 else set()
                        ample -= sizes[f]
                        left -= sizes[f] * (richly if f in lavishly else plain)
                assert chosen == expected and lavish == lavishly, f"step {step}: {scores}"
                assert 0 < len(rest) < len(MEMBERS)
                orders.add(tuple(chosen))
            for f in chosen:
                sent[f] = turn
                blocks = -(-sizes[f] // (BLOCK * K)) * K
                bits = richly if f in lavish else plain
                payload += blocks * int(BLOCK * bits / 8) + blocks // K * int(BLOCK * bits / 8)
                for k in range(K):
                    watch.change[k][f] = 0.0
            common = [
                dict(zip(o._built.table.names, o._consensus.common(o._built.store)["X_0"], strict=True))
                for o in (r.opt for r in replicas._replicas)
            ]
            for name in replicas.X:
                moved = any(name in MEMBERS[f] for f in chosen)
                assert torch.equal(common[0][name], watch.X_0[name][0]) != moved, f"step {step}, {name}"
                for k in range(K):
                    assert torch.equal(common[k][name], common[0][name]), "X_0 is common"
                    watch.X_0[name][k] = common[k][name]
            synchronized += 1
        assert replicas.sent["pseudo_gradients"] == payload
        measured = sum(name != "staleness" for name in score.split("*"))
        assert replicas.sent.get("scores", 0) == 4 * len(MEMBERS) * measured * (synchronized - 1)
        assert len(orders) > 1, "it would always have sent the same"
        spent = synchronized - 1, sum(sizes) / 2 * plain
        assert -max(sizes) * richly < left <= 0, f"{spent} are in the budget"


class Equal(nn.Module):
    """Four matrices, so that a quarter of the elements is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.tanh(self.up(x))))


class Rotation(OuterVariant):
    """The clock's fragments, in the order of the optimizer, each one matrix."""

    def _parts(self, step: Step, fragment: int) -> list[Part]:
        parts = step.table.parts
        if (fragment, -1) not in parts:
            sizes = [tuple(layout.local_shape) for layout in step.table.layouts]
            parts[fragment, -1] = [
                Part(i) if i == fragment else Part(i, size, (), slice(0, 0)) for i, size in enumerate(sizes)
            ]
        return parts[fragment, -1]


def test_by_staleness_it_is_bitwise_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    register_consensus("rotation", Rotation)
    setting = Setting("", fragments=4, choice="staleness", **(OURS | {"interval": 8}))
    by_clock = options_of(setting) | {"consensus": "rotation"}
    torch.manual_seed(0)
    model = Equal()
    with closing(Replicas(model, setting, K)) as chosen:
        monkeypatch.setattr("simulation.options_of", lambda _: by_clock)
        with closing(Replicas(model, setting, K)) as rotating:
            for step in range(24):
                for replicas in (chosen, rotating):
                    take(replicas, step)
                    replicas.step(last=step == 23)
                for name, x in chosen.X.items():
                    assert torch.equal(x, rotating.X[name]), f"step {step}, {name}"
            assert chosen.sent == rotating.sent and chosen.synchronized == 13
            assert type(rotating._replicas[0].opt._consensus) is Rotation


def test_nothing_starves_and_ties_go_by_the_clock() -> None:
    assert in_order([1.0, 3.0, 2.0], [1, 1, 1], 0, 6) == [1, 2, 0]
    assert in_order([1.0, 3.0, 2.0], [7, 1, 1], 0, 6) == [0, 1, 2]
    assert in_order([1.0] * 4, [1] * 4, 6, 6) == [2, 3, 0, 1]


def test_small_parameters_go_with_the_one_before() -> None:
    assert fragments_of([640, 10, 9, 640, 10]) == [[0, 1, 2], [3, 4]]
    assert fragments_of([1, 640, 640]) == [[0], [1], [2]]


def test_a_score_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'drift\*size'"):
        choosing("drift*size")
    with pytest.raises(ValueError, match="a score is one of"):
        options_of(Setting("", bits=1, rich=0.5))
