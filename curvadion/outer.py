"""The outer step of consensus="outer": what replicas send each other is how far they have come since they were last equal."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvadion.collectives import Collectives, Residuals, UnderWay
from curvadion.layout import Axes
from curvadion.payload import Codec
from curvadion.state import copy_into
from curvadion_kernels.reference import compute_dtype


@dataclass
class _Flight:
    """Pseudo-gradients that are under way: of which parameters, what this replica put in, and for how many steps already."""

    turn: int
    members: list[int]
    own: list[Tensor]
    mean: UnderWay
    age: int = 0


class Outer:
    """Keeps the reference X_0 of a replica's parameters, what is under way, and what rounding has kept back.

    Args:
        lr, momentum: outer learning rate and Nesterov momentum; 1 and 0 are plain averaging.
        bits: per parameter on the wire, 32 for none rounded.
        fragments: the number of parts that take turns.
        delay: steps that a pseudo-gradient is under way.
        on_host: keep X_0 in pinned memory of the host, between two outer steps of no use to anybody.
    """

    def __init__(self, *, lr: float, momentum: float, bits: int, fragments: int, delay: int, on_host: bool):
        self.lr, self.momentum, self.bits, self.fragments, self.delay, self.on_host = lr, momentum, bits, fragments, delay, on_host
        self._codec = Codec(bits) if bits < 32 else None
        self._reference: list[Tensor] = []
        self._stale = True
        self._residuals = [Residuals() for _ in range(fragments)]
        self._flights: list[_Flight] = []
        self.apart: Tensor | None = None  # of the last step: sums of squares of (X_0 - X_i) - D and of D, on this rank

    @property
    def under_way(self) -> bool:
        """Whether there is an X_0 that the parameters have left."""
        return not self._stale

    @property
    def in_flight(self) -> bool:
        """Whether pseudo-gradients are under way: the same on all ranks."""
        return bool(self._flights)

    def allocate(self, X: Sequence[Tensor]) -> None:
        """Make room for X_0, unless there is some for just these."""
        if [x.shape for x in X] == [x0.shape for x0 in self._reference]:
            return
        device = torch.device("cpu") if self.on_host else None
        self._reference = [torch.empty_like(x, device=device, pin_memory=self.on_host and x.is_cuda) for x in X]
        self.forget()

    def remember(self, X: Sequence[Tensor]) -> None:
        """X_0 <- X_i, at the start and after `forget`."""
        if self._stale:
            for x0, x in zip(self._reference, X, strict=True):
                x0.copy_(x, non_blocking=True)
            self._stale = False

    def forget(self) -> None:
        """Start anew: replicas are equal."""
        self._stale = True
        self._flights.clear()
        for residuals in self._residuals:
            residuals.clear()

    def depart_(
        self,
        X: Sequence[Tensor],
        U: Sequence[Tensor],
        *,
        turn: int,
        sizes: Sequence[int],
        copied: Sequence[Axes],
        collectives: Collectives,
    ) -> None:
        """Send the pseudo-gradients on their way; without a delay also arrive, which makes the parameters of all replicas equal.

            D = C(E_i[C(X_0 - X_i)]),   U <- mu U + D,   X = X_0 - lr (D + mu U),   X_0 <- X

        With a delay, X_i moves by X - X_i of the departure when D arrives, so that it keeps what this replica did meanwhile.

        Args:
            X, U: local shards of parameters and of outer momentum; U is empty if mu = 0.
            turn: counts the outer steps; says which fragment it is.
            sizes: elements of each whole parameter.
            copied: for each parameter, the axes over which it is the same.

        Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105, and "Streaming
        DiLoCo", arXiv:2501.18512, for fragments and delay.
        """
        turn %= self.fragments
        for flight in [flight for flight in self._flights if flight.turn == turn]:
            self._arrive_(flight, X, U)
        members = self._members(sizes, turn)
        X0 = self._references(members, X)
        own = [x0.to(compute_dtype(x0.dtype)) - X[i] for i, x0 in zip(members, X0, strict=True)]
        axes = [copied[i] for i in members]
        mean = collectives.start_mean_over_replicas(own, axes, "pseudo_gradients", self._codec, self._residuals[turn])
        self._flights.append(_Flight(turn, members, own, mean))
        if not self.delay:
            self._arrive_(self._flights[-1], X, U, X0)

    def advance_(self, X: Sequence[Tensor], U: Sequence[Tensor]) -> None:
        """Let a step pass for what is under way; every rank of every replica calls it in every step, also where it takes none."""
        for flight in self._flights:
            flight.age += 1
            if self._codec is not None and flight.age == -(-self.delay // 2):
                flight.mean.start_next_leg()
        arriving = [flight for flight in self._flights if flight.age >= self.delay]
        for flight in arriving:  # first all that others wait for
            flight.mean.arrived()
        for flight in arriving:
            self._arrive_(flight, X, U)

    def _arrive_(self, flight: _Flight, X: Sequence[Tensor], U: Sequence[Tensor], X0: list[Tensor] | None = None) -> None:
        """End a flight; X_0 of its parameters is fetched unless it is given."""
        self._flights.remove(flight)
        members, own, D = flight.members, flight.own, flight.mean.arrived()
        if not members:
            return
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (torch._foreach_sub(own, D), D)]
        self.apart = torch.stack(norms).square().sum(1)
        if U:
            outer_momenta = [U[i] for i in members]
            torch._foreach_mul_(outer_momenta, self.momentum)
            torch._foreach_add_(outer_momenta, D)
            D = list(torch._foreach_add(D, outer_momenta, alpha=self.momentum))
        X0 = self._references(members, X) if X0 is None else X0
        X0 = [x0.to(d.dtype).sub(d, alpha=self.lr) for x0, d in zip(X0, D, strict=True)]
        if self.delay:
            copy_into([X[i] for i in members], [X[i] + o.sub(d, alpha=self.lr) for i, o, d in zip(members, own, D, strict=True)])
        else:
            copy_into([X[i] for i in members], X0)
        for i, x0 in zip(members, X0, strict=True):
            self._reference[i].copy_(x0, non_blocking=True)

    def settle_(
        self, X: Sequence[Tensor], U: Sequence[Tensor], *, sizes: Sequence[int], copied: Sequence[Axes], collectives: Collectives
    ) -> None:
        """Wait for what is under way, and take from the parameters what rounding has kept back, so that their mean lacks nothing."""
        for flight in list(self._flights):
            self._arrive_(flight, X, U)
        for turn, residuals in enumerate(self._residuals):
            if not residuals.in_use:
                continue
            members = self._members(sizes, turn)
            wide = [X[i].to(compute_dtype(X[i].dtype), copy=True) for i in members]
            collectives.settle_residuals_(wide, [copied[i] for i in members], residuals)
            copy_into([X[i] for i in members], wide)

    def _references(self, members: Sequence[int], X: Sequence[Tensor]) -> list[Tensor]:
        """Return X_0 of these parameters where X is."""
        return [self._reference[i].to(X[i].device, non_blocking=True) for i in members]

    def _members(self, sizes: Sequence[int], turn: int) -> list[int]:
        """Return the parameters of a fragment: neighbours, about as many elements in each fragment."""
        ends = list(itertools.accumulate(sizes, initial=0))
        middle = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        return [i for i, at in enumerate(middle) if int(self.fragments * at / max(ends[-1], 1)) == turn]
