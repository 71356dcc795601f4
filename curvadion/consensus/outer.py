"""consensus="outer": replicas send each other how far they have come since they were last equal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from curvadion.consensus.base import Consensus
from curvadion.consensus.codec import CODECS, codec_of
from curvadion.consensus.fragments import Part, parts_of, put_all, take_all
from curvadion.rules import local_step
from curvadion.rules.base import Step
from curvadion.sharding.flat import shaped
from curvadion.sharding.journey import Fused, Residuals, RoundedMean, UnderWay
from curvadion.state.batch import Batch
from curvadion.state.store import Store
from curvadion_kernels.reference import Fixed, compute_dtype


@dataclass(frozen=True)
class OuterOptions:
    """Options of `CurvaDion`, without their prefix outer_.

    Attributes:
        lr, momentum: outer learning rate and Nesterov momentum; 1 and 0 are plain averaging.
        bits: the name of a codec, see `CODECS`.
        fragments: the number of parts that take turns.
        delay: steps for which a pseudo-gradient is under way.
        on_host: keep X_0 in pinned memory of the host; it is fetched for each outer step.
        residual_kept: kappa, the share of a replica's own residual that stays in its parameters.
    """

    lr: float
    momentum: float
    bits: int | str
    fragments: int
    delay: int
    on_host: bool
    residual_kept: float


@dataclass
class Flight:
    """Pseudo-gradients under way: of which fragment, their shapes, and for how many steps already."""

    fragment: int
    parts: list[Part]
    like: list[Tensor]
    mean: UnderWay
    age: int = 0


class Outer(Consensus):
    """A local step always, and pseudo-gradients after the synchronized ones.

        D = C(E_i[C(X_0 - X_i)]),   U <- mu U + D,   X = X_0 - outer_lr (D + mu U),   X_0 <- X
        X_i <- X - kappa e_i,   e_i <- (1 - kappa) e_i

    C rounds with error feedback, and e_i is what it has kept back of this replica's own (`Exchange.
    start_mean_over_replicas`). The share kappa of that stays in this replica's parameters: it is in its next
    X_0 - X_i, and no longer in e_i. X_0 is what all have in common. With a delay, X_i moves by X - kappa e_i
    - X_i of the departure when D arrives, so that it keeps what this replica did meanwhile. With fragments,
    each outer step is one of them, in turn; those of the warm-up are of all.

    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
    arXiv:2311.08105, and "Streaming DiLoCo", arXiv:2501.18512, for fragments and delay.

    Attributes:
        journey: how a buffer that is rounded comes to its mean.
    """

    journey: type[RoundedMean] = RoundedMean

    keeps_parameters = keeps_own_gradients = True
    own_options = (
        "outer_lr",
        "outer_momentum",
        "outer_bits",
        "outer_fragments",
        "outer_delay",
        "outer_on_host",
        "outer_residual_kept",
    )

    def __init__(self, options: Mapping[str, Any]):
        self._o = OuterOptions(**{name.removeprefix("outer_"): options[name] for name in self.own_options})
        self.keeps_momentum = self._o.momentum > 0
        self.leaves_apart = self._o.fragments > 1 or self._o.delay > 0 or self._o.residual_kept > 0
        self.can_lose_replicas = not self._o.delay
        self._codec = codec_of(self._o.bits, options)
        self._X0: Fixed[Tensor] = Fixed()
        self._stale = True  # X_0 is still to be taken from the parameters
        self._residuals = [Residuals() for _ in range(self._o.fragments)]
        self._like: dict[int, list[Tensor]] = {}
        self._flights: list[Flight] = []
        self._apart: Tensor | None = None

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        if options.get("payload_dtype") is not None:
            raise ValueError(
                "payload_dtype is of factors and gradients, which consensus='outer' does not send; got "
                f"{options['payload_dtype']}; try outer_bits=16"
            )
        if options["outer_residual_kept"] and CODECS[options["outer_bits"]] is None:
            raise ValueError(
                "outer_residual_kept is a share of what rounding keeps back, which needs outer_bits that "
                f"round; got {options['outer_residual_kept']} with outer_bits={options['outer_bits']!r}; try "
                "outer_bits=1"
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
        if self._o.on_host and store.table.device.type == "cuda":  # the host reads what may be on its way
            torch.cuda.current_stream(store.table.device).synchronize()
        return {"X_0": self._X0} | ({"U": store.outer_momenta} if self.keeps_momentum else {})

    def allocate(self, X: Sequence[Tensor]) -> None:
        self._like.clear()  # also where shards are alike, as of whole tensors that are not
        where = [torch.device("cpu") if self._o.on_host else x.device for x in X]
        like = [(x.shape, x.dtype, device) for x, device in zip(X, where, strict=True)]
        if like == [(x0.shape, x0.dtype, x0.device) for x0 in self._X0]:
            self._X0 = Fixed(self._X0)
            return
        self._X0 = Fixed(
            torch.empty_like(x, device=device, pin_memory=self._o.on_host and x.is_cuda)
            for x, device in zip(X, where, strict=True)
        )
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
                for fragment in self._due(step):
                    self._depart(step, fragment)

    def _due(self, step: Step) -> Iterable[int]:
        """Return the fragments that a synchronized step sends, the same on all ranks of all replicas."""
        count = self._o.fragments
        return range(count) if step.schedule.warming_up else [step.schedule.synchronized_steps % count]

    def _parts(self, step: Step, fragment: int) -> list[Part]:
        """Return what belongs to a fragment, one part of each parameter."""
        return parts_of(step.table, fragment, self._o.fragments)

    def stand_still(self, step: Step) -> None:
        self._advance(step)

    def settle(self, step: Step) -> None:
        """Wait for what is under way, and take from the parameters what rounding has kept back."""
        self.land(step)
        for fragment, residuals in enumerate(self._residuals):
            if not residuals.in_use:
                continue
            parts = self._parts(step, fragment)
            X = take_all(parts, step.X, range(len(parts)))
            wide = [x.to(compute_dtype(x.dtype), copy=True) for x in X]
            step.exchange.settle_residuals_(
                wide, [step.table.copied[part.index] for part in parts], residuals
            )
            put_all(parts, step.X, range(len(parts)), wide)

    def bytes_sent(self, step: Step, index: int, batch: Batch | None, *, apart: bool) -> float:
        layout = step.table.layouts[index] if batch is None else batch.layout
        numel, dtype = math.prod(layout.shape), step.table.params[index].dtype
        share = numel / self._o.fragments
        if self._codec is None:
            return share * compute_dtype(dtype).itemsize
        return share * self._codec.bits_per_value / 8 * (1 + 1 / step.exchange.replicas)

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
        failures = []
        for flight in [flight for flight in self._flights if flight.age >= self._o.delay]:
            try:
                self._arrive(step, flight)
            except RuntimeError as error:  # others wait for the rest
                failures.append(error)
        if failures:
            raise failures[0]

    def _depart(self, step: Step, fragment: int) -> None:
        """Send a fragment's pseudo-gradients on their way; without a delay also arrive."""
        for flight in [flight for flight in self._flights if flight.fragment == fragment]:
            self._arrive(step, flight)
        parts = self._parts(step, fragment)
        if fragment not in self._like:
            self._like[fragment] = [part.like(step.X[part.index]) for part in parts]
        like = self._like[fragment]
        way = partial(self._way, step.X, parts, like)
        mean = step.exchange.start_mean_over_replicas(
            like,
            [step.table.copied[part.index] for part in parts],
            "pseudo_gradients",
            self._codec.on(step.ops) if isinstance(self._codec, Fused) else self._codec,
            self._residuals[fragment],
            self.journey,
            make=way,
            keep_own=self._o.delay > 0,
            show_residuals=self._o.residual_kept > 0,
        )
        self._flights.append(Flight(fragment, parts, like, mean))
        if not self._o.delay:
            self._arrive(step, self._flights[-1])

    def _way(
        self, X: Fixed[Tensor], parts: Sequence[Part], like: Sequence[Tensor], indices: list[int]
    ) -> Tensor:
        """Return X_0 - X of the parts with these indices, as one flat buffer."""
        shapes, device = [like[i] for i in indices], X[indices[0]].device
        flat = torch.empty(sum(t.numel() for t in shapes), dtype=shapes[0].dtype, device=device)
        views = shaped(flat, shapes)
        torch._foreach_copy_(views, self._references(X, parts, indices))
        torch._foreach_sub_(views, take_all(parts, X, indices))
        return flat

    def _arrive(self, step: Step, flight: Flight) -> None:
        """End a flight, buffer by buffer."""
        self._flights.remove(flight)
        norms: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            for indices, D, own, residual in flight.mean.arrivals():
                if own is None:  # nobody has moved since
                    own = self._way(step.X, flight.parts, flight.like, indices)
                norms |= self._move(step, flight, indices, D, own, residual)
                if residual is not None:
                    self._residuals[flight.fragment].given = self._o.residual_kept
                del D, own, residual  # before the next come
        finally:
            flight.mean.let_pass()  # whatever happened here, others wait for it
        if norms:
            both = zip(*(norms[i] for i in range(len(flight.parts))), strict=True)
            self._apart = torch.stack([torch.stack(some) for some in both]).square().sum(1)

    def _move(
        self, step: Step, flight: Flight, indices: list[int], D: Tensor, own: Tensor, residual: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Move the parts in a buffer by their D, in the memory of D and `own`, and by what they keep of their
        residual; return the norms of own - D and of D, by part."""
        o, parts, shapes = self._o, flight.parts, [flight.like[i] for i in indices]
        X, U, d, ours = step.X, step.store.outer_momenta, shaped(D, shapes), shaped(own, shapes)
        if o.delay:
            apart = shaped(own - D, shapes)
        else:
            own.sub_(D)
            apart = ours
        norms = zip(torch._foreach_norm(apart), torch._foreach_norm(d), strict=True)
        del apart
        if U:
            u = take_all(parts, U, indices)
            torch._foreach_mul_(u, o.momentum)
            torch._foreach_add_(u, d)
            put_all(parts, U, indices, u)
            torch._foreach_add_(d, u, alpha=o.momentum)
        if o.delay:
            own.sub_(D, alpha=o.lr)
            if residual is not None:
                own.sub_(residual, alpha=o.residual_kept)
            torch._foreach_add_(ours, take_all(parts, X, indices))
            put_all(parts, X, indices, ours)
        torch._foreach_copy_(ours, self._references(X, parts, indices))
        own.sub_(D, alpha=o.lr)
        self._keep(parts, indices, ours)
        if not o.delay:
            if residual is not None:
                own.sub_(residual, alpha=o.residual_kept)
            put_all(parts, X, indices, ours)
        return dict(zip(indices, norms, strict=True))

    def _keep(self, parts: Sequence[Part], indices: list[int], values: Sequence[Tensor]) -> None:
        """Put values into X_0. On the host only whole tensors arrive without a wait, so a fragment is put
        where it comes from."""
        if not self._o.on_host:
            return put_all(parts, self._X0, indices, values)
        for i, x0 in zip(indices, values, strict=True):
            kept = self._X0[i]
            if parts[i].whole:
                kept.copy_(x0, non_blocking=True)
                continue
            fetched = kept.to(x0.device, non_blocking=True)
            parts[i].put(fetched, x0)
            kept.copy_(fetched, non_blocking=True)

    def _references(self, X: Sequence[Tensor], parts: Sequence[Part], indices: list[int]) -> list[Tensor]:
        """Return X_0 of these parts where X is. Cut there: on the host it may still be on its way."""
        if not self._o.on_host:
            return take_all(parts, self._X0, indices)
        return [parts[i].take(self._X0[i].to(X[i].device, non_blocking=True)) for i in indices]
