"""What an outer step sends when: the matrices that score highest, at a fixed budget of bits, as a gate for
each matrix; or embeddings, heads and norms more seldom than matrices."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from rounding import codec_named
from torch import Tensor
from variants import OuterVariant

from curvadion.consensus.fragments import Part, parts_of
from curvadion.rules import Step
from curvadion.sharding.journey import Residuals
from curvadion.sharding.layout import local_tensor

MEASURED = ("drift", "spread", "rmmc", "change")
SCORES = ("staleness", "chance", *MEASURED)


class Choosing(OuterVariant):
    """The outer step, of the matrices that score highest.

    A fragment is a parameter; one of few elements goes with the one before it. A synchronized step may spend
    the bits of 1 / outer_fragments of all elements, and what the last one has left. It sends fragments in the
    order of their scores while there is something left; the last of them may overdraw it. Before all others
    go fragments that have waited `patience` times as long as they would by the clock; of equal scores the one
    whose turn it is. Scores, the same on all replicas:

        staleness   synchronized steps since it was sent, this one included: the clock's rotation
        chance      a hash of the step's number and the fragment's
        drift       sqrt(E_i ||X_i - X_0||^2 / ||X_0||^2)
        spread      sqrt(E_i ||X_i - X_0||^2 / elements)
        rmmc        E_i | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||, m being the momentum, or AdamW's first moment
        change      rmmc, summed over the steps since it was sent

    or a product of some, "drift*staleness". The last four are averaged over the replicas by one all-reduce of
    a float32 for each fragment and score (purpose "scores"), in each synchronized step but those of the
    warm-up, which send all. Over the shards there are SUMs of as many numbers: of drift and spread before
    that, of rmmc and change in every step.

    Attributes:
        score: how fragments are ordered.
        rich: the share of the elements that may be sent which goes by `richer` in place of the codec: of the
            fragments that score highest. So much less is sent of the others.
    """

    score, rich, richer, patience = "staleness", 0.0, "lloyd:4:128", 3

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self.leaves_apart = True
        self._codecs = self._turning, codec_named(self.richer)
        self._scores = self.score.split("*")
        self._fragments: list[list[int]] = []
        self._start()

    def _start(self) -> None:
        self._left, self._lavish = 0.0, set[int]()
        self._sent = [0] * len(self._fragments)  # how many synchronized steps there were by then
        self._norms = self._change = self._rmmc = torch.zeros(len(self._fragments))

    def forget(self) -> None:
        super().forget()
        self._start()

    def step(self, step: Step, *, synchronize: bool) -> None:
        fragments = fragments_of(sizes_of(step))
        if fragments != self._fragments:
            self._fragments, self._residuals = fragments, [Residuals() for _ in fragments]
            self._start()
        super().step(step, synchronize=synchronize)
        if not synchronize:
            self._look(step)

    def _parts(self, step: Step, fragment: int) -> list[Part]:
        return parts_in(step, fragment, self._fragments[fragment])

    def _due(self, step: Step) -> list[int]:
        self._look(step)
        turn, count, sizes = step.schedule.synchronized_steps, len(self._fragments), sizes_of(step)
        if step.schedule.warming_up:
            chosen, self._lavish = list(range(count)), set()
        else:
            elements = [sum(sizes[i] for i in members) for members in self._fragments]
            order = in_order(self._score(step), [turn - t for t in self._sent], turn, self._patience)
            chosen, self._lavish = self._spend(order, elements)
        for fragment in chosen:
            self._sent[fragment] = turn
            self._change[fragment] = 0.0
        return chosen

    @property
    def _patience(self) -> int:
        return self.patience * self._o.fragments

    def _spend(self, order: Sequence[int], elements: Sequence[int]) -> tuple[list[int], set[int]]:
        """Return the fragments to send, and those of them that are sent richly."""
        plain, richly = (32.0 if codec is None else codec.bits_per_value for codec in self._codecs)
        share = sum(elements) / self._o.fragments
        self._left += share * plain
        chosen, lavish, ample = list[int](), set[int](), share * self.rich
        for fragment in order:
            if self._left <= 0:
                break
            if ample > 0:
                lavish.add(fragment)
            ample -= elements[fragment]
            self._left -= elements[fragment] * (richly if fragment in lavish else plain)
            chosen.append(fragment)
        return chosen, lavish

    def _depart(self, step: Step, fragment: int) -> None:
        self._turning = self._codecs[fragment in self._lavish]
        super()._depart(step, fragment)

    # ---- scores

    def _score(self, step: Step) -> list[float]:
        """Return the score of each fragment."""
        count, turn = len(self._fragments), step.schedule.synchronized_steps
        values = {
            "staleness": [float(turn - sent) for sent in self._sent],
            "chance": [random.Random(f"{turn} {k}").random() for k in range(count)],
        }
        names = [name for name in MEASURED if name in self._scores]
        if names:
            own = torch.cat([self._measure(step, name) for name in names])
            axes = step.table.shards.axes
            _, [mean] = step.exchange.mean_over_replicas([own], [()], [axes], "scores")
            for name, numbers in zip(names, mean.view(-1, count), strict=True):
                values[name] = (numbers.sqrt() if name in ("drift", "spread") else numbers).tolist()
        return [math.prod(values[name][k] for name in self._scores) for k in range(count)]

    def _measure(self, step: Step, name: str) -> Tensor:
        """Return this replica's number for each fragment, (F,) float32; of drift and spread the squares."""
        if name in ("rmmc", "change"):
            return self._rmmc if name == "rmmc" else self._change
        whole = parts_of(step.table, 0, 1)
        X_0 = self._references(step.X, whole, range(len(whole)))
        drift = self._squares(step, torch._foreach_sub(list(step.X), X_0))
        if name == "drift":
            return drift / self._squares(step, X_0).clamp_min(1e-30)
        sizes = sizes_of(step)
        return drift / drift.new_tensor([sum(sizes[i] for i in members) for members in self._fragments])

    def _look(self, step: Step) -> None:
        """Learn how the norms of the momenta have changed in this step."""
        if not {"rmmc", "change"} & set(self._scores):
            return
        states = [step.store.states[p] for p in step.table.params]
        momenta = [local_tensor(s["momentum" if "momentum" in s else "exp_avg"]) for s in states]
        norms = self._squares(step, momenta).sqrt()
        before, self._norms = self._norms.to(norms), norms  # those it begins with are on the CPU
        self._rmmc = torch.where(before > 0, (self._norms - before).abs() / before, 0.0)
        self._change = self._change.to(self._rmmc) + self._rmmc

    def _squares(self, step: Step, tensors: Sequence[Tensor]) -> Tensor:
        """Return ||t||^2 of each fragment's tensors, (F,) float32, summed over the shards."""
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])
        counted = norms.square() * norms.new_tensor([float(first) for first in step.table.first])
        squares = torch.stack([counted[members].sum() for members in self._fragments])
        return step.exchange.sum_over_all_shards(squares, "scores")


class Seldom(OuterVariant):
    """The outer step, of the matrices each time, of all other parameters every n-th time and in the warm-up.

    Attributes:
        every: n.
    """

    every = 2

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self.leaves_apart = True
        self._residuals = [Residuals(), Residuals()]

    def _parts(self, step: Step, fragment: int) -> list[Part]:
        return parts_in(step, fragment, step.table.scalars if fragment else step.table.weights)

    def _due(self, step: Step) -> list[int]:
        schedule = step.schedule
        everything = schedule.warming_up or schedule.synchronized_steps % self.every == 0
        return [0, 1] if everything else [0]


def parts_in(step: Step, fragment: int, members: Collection[int]) -> list[Part]:
    """Return a part for each parameter: all of these, and nothing of the others; made once for a fragment."""
    if (fragment, 0) not in step.table.parts:  # of no fragments `parts_of` makes none
        nothing = ((), slice(0, 0))
        step.table.parts[fragment, 0] = [
            Part(i) if i in members else Part(i, tuple(layout.local_shape), *nothing)
            for i, layout in enumerate(step.table.layouts)
        ]
    return step.table.parts[fragment, 0]


def seldom(every: int) -> type[Seldom]:
    """Return a `Seldom` with this number."""
    return type(f"Seldom {every}", (Seldom,), {"every": every})


def sizes_of(step: Step) -> list[int]:
    """Return the number of elements of each parameter, of all shards."""
    return [math.prod(layout.shape) for layout in step.table.layouts]


def fragments_of(sizes: Sequence[int]) -> list[list[int]]:
    """Return which parameters are a fragment: each its own, but those below 1/64 of all elements, which go
    with the one before."""
    fragments: list[list[int]] = []
    for i, size in enumerate(sizes):
        if fragments and size < sum(sizes) / 64:
            fragments[-1].append(i)
        else:
            fragments.append([i])
    return fragments


def in_order(scores: Sequence[float], waited: Sequence[int], turn: int, patience: int) -> list[int]:
    """Return the fragments, those that are to be sent first before the others."""
    count = len(scores)
    return sorted(range(count), key=lambda k: (waited[k] <= patience, -scores[k], (k - turn) % count))


def choosing(score: str, rich: float = 0.0) -> type[Choosing]:
    """Return a `Choosing` with these attributes. Raises ValueError for a score that there is not."""
    if not set(score.split("*")) <= set(SCORES):
        raise ValueError(f"a score is one of {', '.join(SCORES)}, or a product; got {score!r}; try 'drift'")
    return type(f"Choosing {score} {rich}", (Choosing,), {"score": score, "rich": rich})
