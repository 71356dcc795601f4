"""consensus="outer": replicas send each other how far they have come since they were last equal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from curvadion.consensus.base import Consensus
from curvadion.consensus.codec import codec_of
from curvadion.consensus.fragments import Part, parts_of
from curvadion.rules import local_step
from curvadion.rules.base import Step
from curvadion.sharding.journey import Residuals, RoundedMean, UnderWay
from curvadion.state.store import Store, copy_into
from curvadion_kernels.reference import compute_dtype


@dataclass(frozen=True)
class OuterOptions:
    """Options of `CurvaDion`, without their prefix outer_.

    Attributes:
        lr, momentum: outer learning rate and Nesterov momentum; 1 and 0 are plain averaging.
        bits: the name of a codec, see `CODECS`.
        fragments: the number of parts that take turns.
        delay: steps for which a pseudo-gradient is under way.
        on_host: keep X_0 in pinned memory of the host; it is fetched for each outer step.
    """

    lr: float
    momentum: float
    bits: int | str
    fragments: int
    delay: int
    on_host: bool


@dataclass
class _Flight:
    """Pseudo-gradients under way: of which fragment, what this replica put in, and for how many steps
    already."""

    fragment: int
    parts: list[Part]
    own: list[Tensor]
    mean: UnderWay
    age: int = 0


class Outer(Consensus):
    """A local step always, and pseudo-gradients after the synchronized ones.

        D = C(E_i[C(X_0 - X_i)]),   U <- mu U + D,   X = X_0 - outer_lr (D + mu U),   X_0 <- X

    C rounds with error feedback (`Exchange.start_mean_over_replicas`). With a delay, X_i moves by X - X_i of
    the departure when D arrives, so that it keeps what this replica did meanwhile. With fragments, each outer
    step is one of them, in turn; those of the warm-up are of all.

    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
    arXiv:2311.08105, and "Streaming DiLoCo", arXiv:2501.18512, for fragments and delay.

    Attributes:
        journey: how a buffer that is rounded comes to its mean.
    """

    journey: type[RoundedMean] = RoundedMean

    keeps_own_gradients = True
    own_options = (
        "outer_lr",
        "outer_momentum",
        "outer_bits",
        "outer_fragments",
        "outer_delay",
        "outer_on_host",
    )

    def __init__(self, options: Mapping[str, Any]):
        self._o = OuterOptions(**{name.removeprefix("outer_"): options[name] for name in self.own_options})
        self.keeps_momentum = self._o.momentum > 0
        self.leaves_apart = self._o.fragments > 1 or self._o.delay > 0
        self._codec = codec_of(self._o.bits, options)
        self._X0: list[Tensor] = []
        self._stale = True  # X_0 is still to be taken from the parameters
        self._residuals = [Residuals() for _ in range(self._o.fragments)]
        self._flights: list[_Flight] = []
        self._apart: Tensor | None = None

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        if options.get("payload_dtype") is not None:
            raise ValueError(
                "payload_dtype is of factors and gradients, which consensus='outer' does not send; got "
                f"{options['payload_dtype']}; try outer_bits=16"
            )

    @property
    def under_way(self) -> bool:  # type: ignore[override]
        """Whether there is an X_0 that the parameters have left."""
        return not self._stale

    def drift(self) -> Tensor | None:
        return self._apart

    def common(self, store: Store) -> Mapping[str, Sequence[Tensor]]:
        if self._stale:
            return {}
        return {"X_0": self._X0} | ({"U": store.outer_momenta} if self.keeps_momentum else {})

    def allocate(self, X: Sequence[Tensor]) -> None:
        if [x.shape for x in X] == [x0.shape for x0 in self._X0]:
            return
        device = torch.device("cpu") if self._o.on_host else None
        self._X0 = [torch.empty_like(x, device=device, pin_memory=self._o.on_host and x.is_cuda) for x in X]
        self.forget()

    def remember(self, X: Sequence[Tensor]) -> None:
        """X_0 <- X_i, at the start and after `forget`."""
        if self._stale:
            for x0, x in zip(self._X0, X, strict=True):
                x0.copy_(x, non_blocking=True)
            self._stale = False

    def forget(self) -> None:
        self._stale = True
        self._flights.clear()
        for residuals in self._residuals:
            residuals.clear()

    def step(self, step: Step, *, synchronize: bool) -> None:
        local_step(step, begun=not synchronize)
        if not (synchronize or self._flights):
            return
        with record_function("curvadion::outer_step"):
            self._advance(step)
            if synchronize:
                turn = step.schedule.synchronized_steps % self._o.fragments
                for fragment in range(self._o.fragments) if step.schedule.warming_up else [turn]:
                    self._depart(step, fragment)

    def stand_still(self, step: Step) -> None:
        self._advance(step)

    def settle(self, step: Step) -> None:
        """Wait for what is under way, and take from the parameters what rounding has kept back."""
        self.land(step)
        for fragment, residuals in enumerate(self._residuals):
            if not residuals.in_use:
                continue
            parts = parts_of(step.table, fragment, self._o.fragments)
            X = [part.take(step.X[part.index]) for part in parts]
            wide = [x.to(compute_dtype(x.dtype), copy=True) for x in X]
            step.exchange.settle_residuals_(
                wide, [step.table.copied[part.index] for part in parts], residuals
            )
            for part, x in zip(parts, wide, strict=True):
                part.put(step.X[part.index], x)

    def land(self, step: Step) -> None:
        """Wait for what is under way."""
        for flight in list(self._flights):
            self._arrive(step, flight)

    def _advance(self, step: Step) -> None:
        """Let a step pass for what is under way; every rank calls it in every step, also where it takes
        none."""
        for flight in self._flights:
            flight.age += 1
            if self._codec is not None and flight.age == -(-self._o.delay // 2):
                flight.mean.start_next_leg()
        arriving = [flight for flight in self._flights if flight.age >= self._o.delay]
        for flight in arriving:  # first all that others wait for
            flight.mean.arrived()
        for flight in arriving:
            self._arrive(step, flight)

    def _depart(self, step: Step, fragment: int) -> None:
        """Send a fragment's pseudo-gradients on their way; without a delay also arrive."""
        for flight in [flight for flight in self._flights if flight.fragment == fragment]:
            self._arrive(step, flight)
        parts = parts_of(step.table, fragment, self._o.fragments)
        X0 = self._references(step.X, parts)
        pairs = zip(X0, parts, strict=True)
        own = [x0.to(compute_dtype(x0.dtype)) - part.take(step.X[part.index]) for x0, part in pairs]
        axes = [step.table.copied[part.index] for part in parts]
        mean = step.exchange.start_mean_over_replicas(
            own, axes, "pseudo_gradients", self._codec, self._residuals[fragment], self.journey
        )
        self._flights.append(_Flight(fragment, parts, own, mean))
        if not self._o.delay:
            self._arrive(step, self._flights[-1], X0)

    def _arrive(self, step: Step, flight: _Flight, X0: list[Tensor] | None = None) -> None:
        """End a flight; X_0 of its parts is fetched unless it is given."""
        self._flights.remove(flight)
        parts, own, D = flight.parts, flight.own, flight.mean.arrived()
        if not parts:
            return
        o = self._o
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (torch._foreach_sub(own, D), D)]
        self._apart = torch.stack(norms).square().sum(1)
        if step.store.outer_momenta:
            momenta = [step.store.outer_momenta[part.index] for part in parts]
            U = [part.take(u) for part, u in zip(parts, momenta, strict=True)]
            torch._foreach_mul_(U, o.momentum)
            torch._foreach_add_(U, D)
            for part, momentum, u in zip(parts, momenta, U, strict=True):
                part.put(momentum, u)
            D = list(torch._foreach_add(D, U, alpha=o.momentum))
        X0 = self._references(step.X, parts) if X0 is None else X0
        X0 = [x0.to(d.dtype).sub(d, alpha=o.lr) for x0, d in zip(X0, D, strict=True)]
        moved = X0
        if o.delay:
            pairs = zip(parts, own, D, strict=True)
            moved = [part.take(step.X[part.index]) + ours.sub(d, alpha=o.lr) for part, ours, d in pairs]
        if all(part.whole for part in parts):
            copy_into([step.X[part.index] for part in parts], moved)
        else:
            for part, x in zip(parts, moved, strict=True):
                part.put(step.X[part.index], x)
        for part, x0 in zip(parts, X0, strict=True):
            self._keep(part, x0)

    def _keep(self, part: Part, x0: Tensor) -> None:
        """Put these values of a part into X_0. On the host only whole tensors arrive without a wait, so a
        fragment is put where it comes from."""
        kept = self._X0[part.index]
        if part.whole or not self._o.on_host:
            return part.put(kept, x0)
        fetched = kept.to(x0.device, non_blocking=True)
        part.put(fetched, x0)
        kept.copy_(fetched, non_blocking=True)

    def _references(self, X: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
        """Return X_0 of these parts where X is. Cut there: on the host it may still be on its way."""
        return [part.take(self._X0[part.index].to(X[part.index].device, non_blocking=True)) for part in parts]
